"""The stack of decoder layers in a decode step of a few rows, with one kernel per group of matrix products
(`products.py`).

A product of a few rows takes as long as its weights take to be read; norms, gates, rotations and residuals beside it
cost little arithmetic and, as kernels of their own, some 2 us each. So each product takes them in: six kernels per
layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from recyc_jax import sharding
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.kernels.gpu import products
from recyc_jax.kernels.gpu.products import Linear
from recyc_jax.model import Heads, Params


def applies(config: LlamaConfig, rows: int, dtype: Any) -> bool:
    """Whether the kernels take that many rows of this model. `run` repeats `model.DecoderLayer` from its parameters: a
    model whose layers have more (norms of q and k, say) must be refused here. Not over a mesh, over which only XLA can
    split products; and not in float16, where x times a norm's scale can overflow before it is divided by its root mean
    square."""
    fits = rows <= products.MOST_ROWS and products.head_columns(config) is not None
    return fits and jnp.dtype(dtype) != jnp.float16 and sharding.unsplit()


def run(
    params: Params,
    config: LlamaConfig,
    x: Float[Array, "B 1 D"],
    cos: Float[Array, "B 1 H2"],
    sin: Float[Array, "B 1 H2"],
    attend: CachedAttention,
    states: Sequence[Any],
) -> tuple[Array, tuple[Any, ...]]:
    """All decoder layers, as `model.DecoderLayers`."""
    layers = [params[f"layers_{layer}"] for layer in range(config.num_hidden_layers)]
    eps = config.rms_norm_eps
    following_norms = [after["attention_norm"]["scale"] for after in layers[1:]] + [None]
    stream = products.begin(x, layers[0]["attention_norm"]["scale"])
    states_after = []
    for number, (layer, (cached, state), norm_after) in enumerate(zip(layers, states, following_norms, strict=True)):
        attention, mlp = layer["attention"], layer["mlp"]
        to_heads = [_linear(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
        # the new keys and values are written into the cache by the kernel that computes them
        q, q_before_rope, k, v, cached = products.to_heads(stream, to_heads, cos, sin, cached, attend.slot, eps)
        out, state = attend.read(number, Heads(q, k, v, q_before_rope), cached, state)
        states_after.append((cached, state))
        out = out.reshape(*x.shape[:2], -1)
        stream = products.added(out, _linear(attention, "o_proj"), stream, layer["mlp_norm"]["scale"])
        hidden = products.gated(stream, _linear(mlp, "gate_proj"), _linear(mlp, "up_proj"), eps)
        stream = products.added(hidden, _linear(mlp, "down_proj"), stream, norm_after)
    return stream.x, tuple(states_after)


def _linear(parameters: Any, name: str) -> Linear:
    return Linear(parameters[name]["kernel"], parameters[name].get("bias"))
