"""The decoder over whole sequences, as training runs it: layers stacked and scanned, recomputed for the gradient.

Training holds the parameters with all layers' leaves stacked into one, [L, ...]: one layer is compiled instead of L.
`stack_layers` and `unstack_layers` go between this and the form that decoding and checkpoints of others use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import model, rope
from recyc_jax.attention.training import Attention, keeps
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Params, Project
from recyc_jax.projections import Stream
from train import loss

Remat = Literal["full", "dots", "none"]
"""What is computed again for a layer's gradient: all but its attention, all but its matrix products too, or nothing."""


def stack_layers(params: Params, layers: int) -> Params:
    """The parameters with `layers_0`, `layers_1`, ... as one subtree `layers` of leaves [L, ...]."""
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
    remat: Remat = "full",
    z_loss: float = 0.0,
    shares: int = 1,
    place: Callable[[Array], Array] = lambda x: x,
) -> Float[Array, "B T_minus_1"]:
    """For each token but the last the negative log-probability of the one after it, in nats, float32.

    `params` are stacked. `segments` tells the documents of a row apart: positions begin anew with each. `z_loss` and
    `shares` are `loss.token_losses`'s. `place` may constrain where hidden states [B, T, D] lie.
    """
    hidden = _hidden_states(params, config, tokens, segments, attention, remat, place)[:, :-1]
    return loss.token_losses(hidden, model.output_embedding(params, config), tokens[:, 1:], z_loss, shares)


def _hidden_states(
    params: Params,
    config: LlamaConfig,
    tokens: Array,
    segments: Array | None,
    attention: Attention,
    remat: Remat,
    place: Callable[[Array], Array],
) -> Float[Array, "B T D"]:
    x = place(jnp.take(params["embedding"], tokens, axis=0))
    cos, sin = rope.angles(config, _positions(tokens, segments))
    block = model.Block(config, 0)

    def attend(layer: int, project: Project, state: Any) -> tuple[Array, Any]:
        heads = project()
        return attention(heads.q, heads.k, heads.v, segments), state

    def layer(x: Array, layer_params: Params) -> tuple[Array, None]:
        out: Any = block.apply({"params": layer_params}, Stream(x), cos, sin, attend, None)
        return place(out[0].x), None

    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    policies = {"full": keeps, "dots": jax.checkpoint_policies.save_from_both_policies(keeps, dots)}
    if remat != "none":
        layer = jax.checkpoint(layer, policy=policies[remat], prevent_cse=False)  # a scan is boundary enough
    x, _ = lax.scan(layer, x, params["layers"])
    norm: Any = model.RMSNorm(config.rms_norm_eps).apply({"params": params["final_norm"]}, x)
    return norm


def _positions(tokens: Array, segments: Array | None) -> Int[Array, "B T"]:
    """Each token's place in its document."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        return places
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], jnp.bool_), segments[:, 1:] != segments[:, :-1]], axis=1)
    return places - lax.cummax(jnp.where(begins, places, 0), axis=1)
