"""The stack of decoder layers in a decode step of a few rows, with one kernel per group of matrix products
(`products.py`).

A product of a few rows takes as long as its weights take to be read; norms, gates, rotations and residuals beside it
cost little arithmetic and, as kernels of their own, some 2 us each. So each product takes them in: six kernels per
layer of Llama, one more where heads have norms or are few (`products.makes_heads_at_once`), and two more where the norms
of attention and feed-forward come after them: those need all of a product before they can begin."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recyc_jax import sharding
from recyc_jax.cache import LayerCache
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.kernels.gpu import normed, products
from recyc_jax.kernels.gpu.products import Linear
from recyc_jax.kernels.gpu.rows import Norm, Stream, times_normed
from recyc_jax.model import Heads, Params, norm_factors, positioned
from recyc_jax.rope import Positions


def applies(config: LlamaConfig, rows: int, dtype: Any, width: int = 1) -> bool:
    """Whether the kernels take that many rows of `width` tokens of this model. Not in float16, where x times a norm's
    scale can overflow before it is divided by its root mean square; and over a mesh not where devices that share a row's
    heads would have to norm all of them together."""
    split = sharding.split_of(rows)
    if split.tensor > 1 and config.qk_norm == "projection":
        _say_once("norms over all heads are not split over devices: a decode step runs the model's own layers")
        return False
    local = _on_device(config, split)
    if local is None:
        _say_once(
            f"heads or features do not divide among {split.tensor} devices: a decode step runs the model's own layers"
        )
        return False
    if products.head_columns(local) is None:
        _say_once(f"head_dim={config.head_dim} is no multiple of 16: a decode step runs the model's own layers")
        return False
    most = products.MOST_ROWS if width == 1 else products.MOST_BLOCK_ROWS
    return split.rows * width <= most and jnp.dtype(dtype) != jnp.float16


def _on_device(config: LlamaConfig, split: sharding.Split) -> LlamaConfig | None:
    """The shape of what one device computes; None if heads or features do not divide."""
    parts = {
        "num_attention_heads": split.tensor,
        "num_key_value_heads": split.tensor // split.group,
        "intermediate_size": split.tensor,
    }
    if any(getattr(config, name) % count for name, count in parts.items()):
        return None
    return dataclasses.replace(config, **{name: getattr(config, name) // count for name, count in parts.items()})


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def run(
    params: Params,
    config: LlamaConfig,
    x: Float[Array, "B T D"],
    by_layer: Sequence[Positions],
    attend: CachedAttention,
    states: Sequence[Any],
) -> tuple[Array, tuple[Any, ...]]:
    """All decoder layers, as `model.DecoderLayers`: `model.DecoderLayer` again, from its parameters. Over a mesh a layer is
    two functions of each device's rows and heads (`_to_heads`, `_after_attention`), with attention between them; the
    second adds up what devices that share rows have made, once for attention and once for the feed-forward."""
    layers = [params[f"layers_{layer}"] for layer in range(config.num_hidden_layers)]
    local = _on_device(config, sharding.split_of(x.shape[0]))
    assert local is not None  # `applies` has seen it
    made = _Factors(config, x.dtype)
    stream = products.begin(x, made.of(layers[0], "attention_norm"))
    states_after = []
    for number, (layer, (cached, state)) in enumerate(zip(layers, states, strict=True)):
        positions, slot = by_layer[number], cached.place(attend.slot)
        heads, written = _to_heads(local, stream, layer["attention"], made, positions, cached, slot)
        if x.shape[1] > 1:  # several tokens a row, which `attend` writes
            out, (cached, state) = attend(number, heads, (cached, state))
        else:
            cached = attend.with_ended_rows(cached, written)
            out, state = attend.read_written(number, heads, cached, state)
        states_after.append((cached, state))
        is_last = number + 1 == config.num_hidden_layers
        following = None if is_last else made.of(layers[number + 1], "attention_norm")
        stream = _after_attention(config, out, stream, layer, made, following)
    return stream.x, tuple(states_after)


class _Factors(NamedTuple):
    """Finds what norms multiply by."""

    config: LlamaConfig
    dtype: Any

    def of(self, norms: Any, name: str) -> Array | None:
        """None for a norm that the model does not have."""
        if name not in norms:
            return None
        scale = norms[name]["scale"]
        if self.config.norm_scale == "rounded":
            return scale.astype(self.dtype)
        return norm_factors(scale, self.config.norm_scale)


def _to_heads(
    config: LlamaConfig,
    stream: Stream,
    attention: Any,
    made: _Factors,
    positions: Positions,
    cached: LayerCache,
    slot: Array,
) -> tuple[Heads, LayerCache]:
    """The heads of the normed stream; and where rows have one token each the cache with its key and value in place of
    `Heads.k` and `Heads.v`: the kernel that computes them writes them. `config` is the shape on one device."""
    eps, rows = config.rms_norm_eps, stream.x.shape[0]
    linears = tuple(_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj"))
    factors = tuple(made.of(attention, name) for name in ("q_norm", "k_norm"))
    multiplier = positions.query_multiplier

    def on_device(
        stream: Stream, linears: Any, factors: Any, rotation: Any, by: Any, cached: LayerCache, slot: Array
    ) -> tuple[Heads, LayerCache]:
        if cached.window is None:
            slot = slot - sharding.first_slot(cached.capacity)
        norms = None if factors[0] is None else [Norm(one, eps) for one in factors]
        its = Positions(rotation, multiplier if by is None else by)
        if stream.x.shape[1] > 1:
            raw = products.projected(stream, linears, eps)
            return _heads(config, [one.reshape(*stream.x.shape[:2], -1) for one in raw], norms, its), cached
        if products.makes_heads_at_once(config):
            assert rotation is not None
            cos, sin = rotation
            q, q_before_rope, cached = products.to_heads(stream, linears, cos, sin, cached, slot, eps, norms)
        else:
            raw = products.projected_in_shares(stream, linears, eps, products.shares(config))
            q, q_before_rope, cached = normed.finished_heads(raw, norms, its, cached, slot)
        return Heads(q, None, None, q_before_rope), cached

    by = multiplier if isinstance(multiplier, jax.Array) else None
    by_query, by_key = Linear("-N", "N"), Linear("-K", "K")
    inputs = ("B", (by_query, by_key, by_key), "-", "B", "B", cached.letters, "B" if slot.ndim else "")
    of_new = "B-K-" if stream.x.shape[1] > 1 else None
    outputs = (Heads(*cast(Any, ("B-N-", of_new, of_new, "B-N-"))), cached.letters)
    local = sharding.split_kernel(on_device, rows, inputs, outputs)
    return local(stream, linears, factors, positions.rotation, by, cached, slot)


def _after_attention(
    config: LlamaConfig,
    out: Float[Array, "B T N H"],
    stream: Stream,
    layer: Any,
    made: _Factors,
    following: Array | None,
) -> Stream:
    """The stream after attention's output has been projected and added, and the feed-forward too; `following` are the
    factors of the next layer's norm."""
    eps, tensor = config.rms_norm_eps, sharding.split_of(stream.x.shape[0]).tensor
    mlp = layer["mlp"]

    def added(x: Array, linear: Linear, stream: Stream, after: Array | None, following: Array | None) -> Stream:
        """The stream with a projection added, which is normed first where the model has a norm after it."""
        if tensor == 1:
            if after is None:
                return products.added(x, linear, stream, following)
            return normed.added_normed(x, linear, stream, Norm(after, eps), following)
        (part,) = products.projected(Stream(x), [linear], eps, jnp.float32)
        whole = sharding.over_heads(lax.psum, part.reshape(stream.x.shape))
        if after is not None:
            whole = whole * lax.rsqrt(jnp.mean(whole**2, axis=-1, keepdims=True) + eps)
            whole = times_normed(whole, after, x.dtype).astype(jnp.float32)
        return products.begin((stream.x.astype(jnp.float32) + whole).astype(x.dtype), following)

    def on_device(out: Array, stream: Stream, linears: Any, factors: Any) -> Stream:
        (o_proj, gate, up, down), (out_norm, mlp_norm, mlp_out_norm, following) = linears, factors
        stream = added(out.reshape(*out.shape[:2], -1), o_proj, stream, out_norm, mlp_norm)
        hidden = products.gated(stream, gate, up, eps, activation=config.activation)
        return added(hidden, down, stream, mlp_out_norm, following)

    linears = _linear(layer["attention"], "o_proj"), *(_linear(mlp, f"{name}_proj") for name in ("gate", "up", "down"))
    factors = (*(made.of(layer, name) for name in ("attention_out_norm", "mlp_norm", "mlp_out_norm")), following)
    by_row, by_column = Linear("N-", "-"), Linear("-N", "N")
    inputs = ("B-N-", "B", (by_row, by_column, by_column, by_row), "-")
    return sharding.split_kernel(on_device, stream.x.shape[0], inputs, "B")(out, stream, linears, factors)


def _heads(config: LlamaConfig, flat: Sequence[Array], norms: Sequence[Norm] | None, positions: Positions) -> Heads:
    """Heads [B, T, _, H] from the projections `flat` [B, T, _], as `model.Attention` makes them."""

    def normed_by(norm: Norm, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.eps)
        return times_normed(wide, norm.factors, x.dtype)

    q, k, v = flat
    if norms is not None and config.qk_norm == "projection":
        q, k = (normed_by(norm, one) for norm, one in zip(norms, (q, k), strict=True))
    q, k, v = (one.reshape(*one.shape[:2], -1, config.head_dim) for one in (q, k, v))
    if norms is not None and config.qk_norm == "head":
        q, k = (normed_by(norm, one) for norm, one in zip(norms, (q, k), strict=True))
    return positioned(q, k, v, positions)


def _linear(parameters: Any, name: str) -> Linear:
    return Linear(parameters[name]["kernel"], parameters[name].get("bias"))
