"""The decoder over whole sequences, for training: a scan over stacked layers, which are rematerialised.

Training stacks the parameters of all L layers into leaves [L, ...], so that one layer is compiled instead of L.
`stack_layers` and `unstack_layers` convert between this form and one subtree per layer, which decoding and Hugging Face
checkpoints use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import model, rope, sharding
from recyc_jax.attention.whole_sequence import Attention, keeps_attention
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Heads, Params
from recyc_jax.rope import Positions
from train import loss

Remat = Literal["full", "dots", "none"]
"""What the backward pass recomputes of a layer. full: everything except attention. dots: everything except attention
and matrix products. none: nothing."""


def stack_layers(params: Params, layers: int) -> Params:
    """The parameters with the subtrees `layers_0`, `layers_1`, ... stacked into one subtree `layers` of leaves
    [L, ...]; `layers` is L."""
    others = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    by_layer = [params[f"layers_{layer}"] for layer in range(layers)]
    return others | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *by_layer)}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`."""
    stacked = params["layers"]
    layers = jax.tree.leaves(stacked)[0].shape[0]
    others = {name: leaf for name, leaf in params.items() if name != "layers"}
    return others | {f"layers_{n}": jax.tree.map(lambda leaf, n=n: leaf[n], stacked) for n in range(layers)}


def token_losses(
    params: Params,
    config: LlamaConfig,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    attention: Attention,
    *,
    sliding_attention: Attention | None = None,
    remat: Remat = "full",
    z_loss: float = 0.0,
    shares: int = 1,
    place: Callable[[Array], Array] = lambda x: x,
    look_up: Callable[[Array, Array], Array] = sharding.rows_of,
) -> Float[Array, "B T_minus_1"]:
    """For each token except the last, the negative log-probability of the next token, in nats, float32.

    `params` are stacked (`stack_layers`). `segments` numbers the documents of a row; positions restart at 0 in each
    document. `attention` is that of layers with full attention, `sliding_attention` that of those with a sliding window.
    `z_loss` and `shares` are passed to `loss.token_losses`. `place` may constrain the sharding of the hidden
    states [B, T, D], and `look_up` takes the embeddings of tokens from the table.
    """
    attentions = attention, sliding_attention or attention
    hidden = _hidden_states(params, config, tokens, segments, *attentions, remat, place, look_up)[:, :-1]
    return loss.token_losses(hidden, model.output_embedding(params, config), tokens[:, 1:], z_loss, shares)


def _hidden_states(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    segments: Array | None,
    attention: Attention,
    sliding_attention: Attention,
    remat: Remat,
    place: Callable[[Array], Array],
    look_up: Callable[[Array, Array], Array],
) -> Float[Array, "B T D"]:
    x = place(model.multiplied(look_up(params["embedding"], tokens), config))
    positions = _positions(tokens, segments)
    by_layer = rope.by_layer(config, positions, jnp.max(positions, axis=1) + 1)
    alike, kinds = _kinds(by_layer, config)
    decoder_layer = model.DecoderLayer(config, 0)

    def layer(x: Array, its: tuple[Params, Array | None]) -> tuple[Array, None]:
        layer_params, kind = its

        def attend(layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
            arguments = heads.q, heads.k, heads.v, segments
            if kind is None:
                return (sliding_attention if alike[0][1] else attention)(*arguments), state
            is_sliding = jnp.asarray([bool(window) for _, window in alike])[kind]
            return lax.cond(is_sliding, sliding_attention, attention, *arguments), state

        its_positions = alike[0][0] if kind is None else _chosen([one for one, _ in alike], kind)
        out: Any = decoder_layer.apply({"params": layer_params}, x, its_positions, attend, None)
        return place(out[0]), None

    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    remat_policies = {
        "full": keeps_attention,
        "dots": jax.checkpoint_policies.save_from_both_policies(keeps_attention, dots),
    }
    if remat != "none":
        layer = jax.checkpoint(layer, policy=remat_policies[remat], prevent_cse=False)  # not needed within a scan
    numbers = None if len(alike) == 1 else jnp.asarray(kinds, jnp.int32)
    x, _ = lax.scan(layer, x, (params["layers"], numbers))
    final_norm: Any = model.norm(config)
    return final_norm.apply({"params": params["final_norm"]}, x)


def _kinds(by_layer: Sequence[Positions], config: LlamaConfig) -> tuple[list[tuple[Positions, int | None]], list[int]]:
    """The kinds of layers, by what positions mean to them and by their window, and the number of each layer's kind."""
    kinds: list[tuple[Positions, int | None]] = []
    numbers = []
    for layer, positions in enumerate(by_layer):
        window = config.window(layer)
        known = [number for number, (one, its) in enumerate(kinds) if one is positions and its == window]
        if not known:
            kinds.append((positions, window))
        numbers.append(known[0] if known else len(kinds) - 1)
    return kinds, numbers


def _chosen(positions: Sequence[Positions], kind: Array) -> Positions:
    """What positions mean to a layer of this kind, chosen within a scan. A layer without RoPE turns by no angle."""
    turning = next(one.rotation for one in positions if one.rotation is not None)
    still = rope.Rotation(jnp.ones_like(turning.cos), jnp.zeros_like(turning.sin))
    rotations = [still if one.rotation is None else one.rotation for one in positions]
    stacked = jax.tree.map(lambda *parts: jnp.stack(jnp.broadcast_arrays(*parts))[kind], *rotations)
    return Positions(stacked, positions[0].query_multiplier)


def _positions(tokens: Array, segments: Array | None) -> Int[Array, "B T"]:
    """Each token's position in its document."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        return places
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], jnp.bool_), segments[:, 1:] != segments[:, :-1]], axis=1)
    return places - lax.cummax(jnp.where(begins, places, 0), axis=1)
