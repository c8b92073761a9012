"""The matrix products of a decoder layer with what stands right before and after each of them.

A product of a few rows takes as long as its weights take to be read; norms, gates, rotations and residuals beside it cost
little in arithmetic and much in kernels of their own. So a layer asks for its products with these in them, and an
implementation (`projections_gpu.py`) may make one kernel of each. Here they are plain.

Letters: B batch, T queries, D model, F features, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import rope
from recyc_jax.cache import LayerCache


class Heads(NamedTuple):
    """What a layer hands to its attention function."""

    q: Array  # [B, T, N, H], after RoPE
    k: Array  # [B, T, K, H], after RoPE
    v: Array  # [B, T, K, H]
    plain_q: Array  # [B, T, N, H]: q before RoPE, by which some policies tell queries alike


class Linear(NamedTuple):
    """A projection's parameters."""

    kernel: Array  # [D, F]
    bias: Array | None = None  # [F]


class Norm(NamedTuple):
    """An RMS norm's."""

    scale: Array  # [D]
    eps: float


class Stream(NamedTuple):
    """Hidden states between two products, with what an implementation has made ready for the norm that follows."""

    x: Array  # [B, T, D]
    scaled: Array | None = None  # [B, T, D]: x times that norm's scale
    squares: Array | None = None  # float32 [B, T, P]: sums of parts of x squared


class ToHeads(NamedTuple):
    """The three projections to heads."""

    q: Linear
    k: Linear
    v: Linear


@runtime_checkable
class Projections(Protocol):
    """What a layer calls, as the functions of this module document it."""

    def begin(self, x: Array, after: Norm | None) -> Stream: ...

    def heads(self, stream: Stream, norm: Norm, linears: ToHeads, cos: Array, sin: Array, dim: int) -> Heads: ...

    def heads_appended(
        self,
        stream: Stream,
        norm: Norm,
        linears: ToHeads,
        cos: Array,
        sin: Array,
        dim: int,
        cached: LayerCache,
        slot: Array,
    ) -> tuple[Heads, LayerCache]: ...

    def gated(self, stream: Stream, norm: Norm, gate: Linear, up: Linear) -> Array: ...

    def added(self, x: Array, linear: Linear, residual: Stream, after: Norm | None) -> Stream: ...


def rms_norm(x: Float[Array, "... D"], norm: Norm) -> Float[Array, "... D"]:
    """x over its root mean square, times a scale; the variance is taken in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + norm.eps)
    return norm.scale.astype(x.dtype) * wide.astype(x.dtype)


def _product(x: Float[Array, "... D"], linear: Linear) -> Float[Array, "... F"]:
    out = lax.dot_general(x, linear.kernel, (((x.ndim - 1,), (0,)), ((), ())))
    return out if linear.bias is None else out + linear.bias


def begin(x: Float[Array, "B T D"], after: Norm | None) -> Stream:
    """Hidden states as the first layer takes them; `after` is its norm."""
    return Stream(x)


def heads(
    stream: Stream,
    norm: Norm,
    linears: ToHeads,
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    dim: int,
) -> Heads:
    """Queries, keys and values of x after its norm, in heads of `dim`, rotated by their angles (`rope.angles`)."""
    x = rms_norm(stream.x, norm)
    # XLA for TPU would take the split into heads back into the product, and turn the weights around for it at each step
    flat = lax.optimization_barrier([_product(x, linear) for linear in linears])
    q, k, v = (one.reshape(*x.shape[:2], -1, dim) for one in flat)
    return Heads(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, q)


def heads_appended(
    stream: Stream,
    norm: Norm,
    linears: ToHeads,
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    dim: int,
    cached: LayerCache,
    slot: Int[Array, ""],
) -> tuple[Heads, LayerCache]:
    """`heads`, and the cache with their keys and values from `slot` on."""
    made = heads(stream, norm, linears, cos, sin, dim)
    return made, cached.append(made.k, made.v, slot)


def gated(stream: Stream, norm: Norm, gate: Linear, up: Linear) -> Float[Array, "... F"]:
    """The SiLU of one projection of x after its norm, times another."""
    x = rms_norm(stream.x, norm)
    return jax.nn.silu(_product(x, gate)) * _product(x, up)


def added(x: Float[Array, "... F"], linear: Linear, residual: Stream, after: Norm | None) -> Stream:
    """A projection of x on top of a residual; `after` is the norm that follows, if it is known."""
    return Stream(residual.x + _product(x, linear))
