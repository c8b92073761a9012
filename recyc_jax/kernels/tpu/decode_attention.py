"""Attention of one query per row over the full cache on TPUs: a Pallas kernel with a running softmax.

The cache is stored with the slots last, [B, K, H, S]: a TPU lays out the last dimension in 128 lanes, so with a head
dim of 64 in that place the cache would take twice its bytes; and XLA itself prefers the slots last. On a CPU the kernel
runs only under `jax.experimental.pallas.tpu.force_tpu_interpret_mode()`. Letters: W slots of a block.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from recyc_jax import sharding
from recyc_jax.attention.reference import MASKED
from recyc_jax.kernels.tpu.tiles import BLOCK, LANES, precision, round_up, sum_over_slots


def _decode_kernel(
    bounds: Any,  # int32 [B, 2]: the first and one past the last visible slot
    q: Any,  # [1, 1, G, H]
    keys: Any,  # [1, 1, H, W]
    values: Any,
    out: Any,  # [1, 1, G, H]
    *rest: Any,  # `with_logits`: logits [1, 1, G, W] and normaliser [1, 1, G, 128]; then scratch
    with_logits: bool,
) -> None:
    """One program: a block of slots of one key/value head."""
    peak, total, sums = rest[-3:]
    row, block, blocks = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    width = keys.shape[-1]

    @pl.when(block == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    slots = block * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
    seen = (slots >= bounds[row, 0]) & (slots < bounds[row, 1])
    products = jnp.dot(q[0, 0], keys[0, 0], preferred_element_type=jnp.float32, precision=precision(q))
    logits = jnp.where(seen, products * q.shape[-1] ** -0.5, MASKED)
    if with_logits:
        rest[0][0, 0] = logits
    new_peak = jnp.maximum(peak[:, :1], jnp.max(logits, axis=1, keepdims=True))
    shrink = jnp.exp(peak[:, :1] - new_peak)
    # a block without a visible slot must add nothing, even while the peak is still `MASKED`, where exp(0) would be 1
    weights = jnp.where(seen, jnp.exp(logits - new_peak), 0)
    # the block's slots past the end of the cache hold undefined values, and 0 x NaN is NaN
    block_values = jnp.where(seen, values[0, 0], 0)
    sums[...] = sums[...] * shrink + sum_over_slots(weights.astype(block_values.dtype), block_values)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    peak[...] = jnp.broadcast_to(new_peak, peak.shape)

    @pl.when(block == blocks - 1)
    def _() -> None:
        sum_of_weights = jnp.maximum(total[...], jnp.finfo(jnp.float32).tiny)
        out[0, 0] = (sums[...] / sum_of_weights[:, :1]).astype(out.dtype)
        if with_logits:
            rest[1][0, 0] = peak[...] + jnp.log(sum_of_weights)


def _decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
    with_logits: bool,
) -> tuple[Array, ...]:
    """The output [B, N, H]; `with_logits`, also the scaled logits [B, K, G, S] and their logsumexp [B, K, G], in
    float32."""
    batch, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    # the visible slots of a row are contiguous
    first = jnp.argmax(visible, axis=1).astype(jnp.int32)
    bounds = jnp.stack([first, first + jnp.sum(visible, axis=1, dtype=jnp.int32)], axis=1)
    grouped = q.reshape(batch, kv_heads, groups, dim)

    def local(bounds: Array, q: Array, keys: Array, values: Array) -> tuple[Array, ...]:
        batch, kv_heads = q.shape[:2]
        width = min(BLOCK, round_up(capacity, LANES))
        blocks = pl.cdiv(capacity, width)
        whole = pl.BlockSpec((1, 1, groups, dim), lambda b, k, s, bounds: (b, k, 0, 0))
        cached = pl.BlockSpec((1, 1, dim, width), lambda b, k, s, bounds: (b, k, 0, s))
        out_specs, out_shapes = [whole], [jax.ShapeDtypeStruct(q.shape, q.dtype)]
        if with_logits:
            out_specs += [
                pl.BlockSpec((1, 1, groups, width), lambda b, k, s, bounds: (b, k, 0, s)),
                pl.BlockSpec((1, 1, groups, LANES), lambda b, k, s, bounds: (b, k, 0, 0)),
            ]
            out_shapes += [
                jax.ShapeDtypeStruct((batch, kv_heads, groups, capacity), jnp.float32),
                jax.ShapeDtypeStruct((batch, kv_heads, groups, LANES), jnp.float32),
            ]
        entries = batch * kv_heads * capacity
        return pl.pallas_call(
            functools.partial(_decode_kernel, with_logits=with_logits),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, kv_heads, blocks),
                in_specs=[whole, cached, cached],
                out_specs=tuple(out_specs),
                scratch_shapes=[
                    pltpu.VMEM((groups, LANES), jnp.float32),
                    pltpu.VMEM((groups, LANES), jnp.float32),
                    pltpu.VMEM((groups, dim), jnp.float32),
                ],
            ),
            out_shape=tuple(out_shapes),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=4 * entries * groups * dim,
                bytes_accessed=entries * (2 * dim * keys.dtype.itemsize + 4 * groups * with_logits),
                transcendentals=entries * groups,
            ),
            name="full_decode",
        )(bounds, q, keys, values)

    specs = ("BK--", "BK--", "BK--") if with_logits else ("BK--",)
    call = sharding.split_kernel(local, batch, ("B-", "BK--", "BK--", "BK--"), specs)
    out, *logits_and_normaliser = call(bounds, grouped, keys.swapaxes(2, 3), values.swapaxes(2, 3))
    out = out.reshape(q.shape)
    return (out, logits_and_normaliser[0], logits_and_normaliser[1][..., 0]) if with_logits else (out,)


def full(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """The output of `reference.full`, where each row's visible slots are contiguous. The logits stay in the chip's
    memory."""
    return _decode(q, keys, values, visible, with_logits=False)[0]


def full_with_log_probabilities(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
    """The results of `reference.full_with_log_probabilities`, where each row's visible slots are contiguous: output and
    logits in one pass over the cache."""
    out, logits, normaliser = _decode(q, keys, values, visible, with_logits=True)
    return out, logits - normaliser[..., None]
