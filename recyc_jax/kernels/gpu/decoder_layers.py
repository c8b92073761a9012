"""The stack of decoder layers in a decode step of a few rows, with one kernel per group of matrix products
(`products.py`).

A product of a few rows takes as long as its weights take to be read; norms, gates, rotations and residuals beside it
cost little arithmetic and, as kernels of their own, some 2 us each. So each product takes them in: six kernels per
layer of Llama, one more where heads have norms, and two more where the norms of attention and feed-forward come after
them: those need all of a product before they can begin."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recyc_jax import sharding
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.kernels.gpu import normed, products
from recyc_jax.kernels.gpu.products import Linear
from recyc_jax.kernels.gpu.rows import Norm, Stream, times_normed
from recyc_jax.model import Heads, Params, norm_factors, positioned
from recyc_jax.rope import Positions


def applies(config: LlamaConfig, rows: int, dtype: Any, width: int = 1) -> bool:
    """Whether the kernels take that many rows of `width` tokens of this model. Not over a mesh, over which only XLA can
    split products; and not in float16, where x times a norm's scale can overflow before it is divided by its root mean
    square."""
    if products.head_columns(config) is None:
        _say_once(f"head_dim={config.head_dim} is no multiple of 16: a decode step runs the model's own layers")
        return False
    most = products.MOST_ROWS if width == 1 else products.MOST_BLOCK_ROWS
    return rows * width <= most and jnp.dtype(dtype) != jnp.float16 and sharding.unsplit()


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
    """All decoder layers, as `model.DecoderLayers`: `model.DecoderLayer` again, from its parameters."""
    layers = [params[f"layers_{layer}"] for layer in range(config.num_hidden_layers)]
    eps = config.rms_norm_eps

    def factors(norms: Any, name: str) -> Array | None:
        """What a norm multiplies by; None for a norm that the model does not have."""
        if name not in norms:
            return None
        scale = norms[name]["scale"]
        return scale.astype(x.dtype) if config.norm_scale == "rounded" else norm_factors(scale, config.norm_scale)

    def added(out: Array, linear: Linear, stream: Stream, norms: Any, after: str, following: Array | None) -> Stream:
        """The stream with a projection added, which is normed first where the model has the norm `after`."""
        its_factors = factors(norms, after)
        if its_factors is None:
            return products.added(out, linear, stream, following)
        return normed.added_normed(out, linear, stream, Norm(its_factors, eps), following)

    stream = products.begin(x, factors(layers[0], "attention_norm"))
    states_after = []
    for number, (layer, (cached, state)) in enumerate(zip(layers, states, strict=True)):
        attention, mlp = layer["attention"], layer["mlp"]
        to_heads = [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        slot, rotation = cached.place(attend.slot), by_layer[number].rotation
        # the new keys and values are written into the cache by the kernel that computes them
        q_factors, k_factors = factors(attention, "q_norm"), factors(attention, "k_norm")
        norms = None if q_factors is None or k_factors is None else [Norm(q_factors, eps), Norm(k_factors, eps)]
        if x.shape[1] > 1:  # several tokens a row, which `attend` writes
            raw = products.projected(stream, to_heads, eps)
            heads = _heads(config, [one.reshape(*x.shape[:2], -1) for one in raw], norms, by_layer[number])
            out, (cached, state) = attend(number, heads, (cached, state))
        else:
            if products.finishes_heads(config) or rotation is None:
                raw = products.projected(stream, to_heads, eps)
                made = normed.finished_heads(raw, norms, by_layer[number], cached, slot)
            else:
                made = products.to_heads(stream, to_heads, *rotation, cached, slot, eps, norms)
            q, q_before_rope, k, v, written = made
            cached = attend.with_ended_rows(cached, written)
            out, state = attend.read_written(number, Heads(q, k, v, q_before_rope), cached, state)
        states_after.append((cached, state))
        out, mlp_norm = out.reshape(*x.shape[:2], -1), factors(layer, "mlp_norm")
        stream = added(out, _linear(attention, "o_proj"), stream, layer, "attention_out_norm", mlp_norm)
        hidden = products.gated(
            stream, _linear(mlp, "gate_proj"), _linear(mlp, "up_proj"), eps, activation=config.activation
        )
        is_last = number + 1 == config.num_hidden_layers
        following = None if is_last else factors(layers[number + 1], "attention_norm")
        stream = added(hidden, _linear(mlp, "down_proj"), stream, layer, "mlp_out_norm", following)
    return stream.x, tuple(states_after)


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
