"""Attention of prefill on TPUs: a Pallas kernel with a running softmax over a cache with the slots last."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from recyc_jax import sharding
from recyc_jax.attention.reference import MASKED
from recyc_jax.kernels.tpu.tiles import LANES, precision, round_up, sum_over_slots

QUERIES, KEYS = 256, 512
"""Queries (of each query head of a group) and keys per grid step."""


def _chunk_kernel(
    scalars: Any,  # int32 [1 + B]: the first query's slot, and each row's first slot
    q: Any,  # [1, 1, G, Q, H]
    keys: Any,  # [1, 1, H, W]
    values: Any,
    out: Any,  # [1, 1, G, Q, H]
    peak: Any,
    total: Any,
    sums: Any,
    *,
    capacity: int,
) -> None:
    """One program: a block of queries of all query heads of a group, and a block of keys."""
    row, piece, block, blocks = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    groups, queries, dim = q.shape[2:]
    width = keys.shape[-1]
    offset, start = scalars[0], scalars[1 + row]

    @pl.when(block == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    last_query = offset + (piece + 1) * queries - 1

    @pl.when((block * width <= last_query) & ((block + 1) * width > start))
    def _() -> None:
        query_slots = offset + piece * queries + lax.broadcasted_iota(jnp.int32, (groups, queries, 1), 1)
        query_slots = query_slots.reshape(groups * queries, 1)
        key_slots = block * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
        stacked = q[0, 0].reshape(groups * queries, dim)
        products = jnp.dot(stacked, keys[0, 0], preferred_element_type=jnp.float32, precision=precision(stacked))
        is_slot = key_slots < capacity  # the block's slots past the end of the cache hold undefined values
        seen = (key_slots <= query_slots) & (key_slots >= start) & is_slot
        logits = jnp.where(seen, products * dim**-0.5, MASKED)
        new_peak = jnp.maximum(peak[:, :1], jnp.max(logits, axis=1, keepdims=True))
        shrink = jnp.exp(peak[:, :1] - new_peak)
        weights = jnp.where(seen, jnp.exp(logits - new_peak), 0)
        block_values = jnp.where(is_slot, values[0, 0], 0)  # 0 x NaN is NaN
        sums[...] = sums[...] * shrink + sum_over_slots(weights.astype(block_values.dtype), block_values)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        peak[...] = jnp.broadcast_to(new_peak, peak.shape)

    @pl.when(block == blocks - 1)
    def _() -> None:
        sum_of_weights = jnp.maximum(total[:, :1], jnp.finfo(jnp.float32).tiny)
        out[0, 0] = (sums[...] / sum_of_weights).astype(out.dtype).reshape(groups, queries, dim)


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> Float[Array, "B C N H"]:
    """The output of `reference.chunk`. The logits stay in the chip's memory, and key blocks that no query sees are not
    fetched.

    The outputs of queries of padding tokens, which see nothing, are zeros.
    """
    batch, length, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    # padded to whole tiles of 16 rows; the padding's queries see slots after the chunk, and are cut off at the end
    queries = (
        min(round_up(QUERIES * 4 // groups, 16), round_up(length, 16))
        if groups > 4
        else min(QUERIES, round_up(length, 16))
    )
    padded = round_up(length, queries)
    stacked = jnp.pad(q, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
    stacked = stacked.reshape(batch, padded, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)

    def local(scalars: Array, starts: Array, q: Array, keys: Array, values: Array) -> Array:
        batch, kv_heads = q.shape[:2]
        width = min(KEYS, round_up(capacity, LANES))
        blocks = pl.cdiv(capacity, width)

        def needed(b: Any, k: Any, piece: Any, block: Any, scalars: Any) -> tuple[Any, ...]:
            """The key block to fetch: the block itself, or, if no query sees it, the nearest block that is seen, which
            has been fetched already."""
            last = jnp.minimum((scalars[0] + (piece + 1) * queries - 1) // width, blocks - 1)
            return b, k, 0, jnp.clip(block, jnp.minimum(scalars[1 + b] // width, last), last)

        query_block = pl.BlockSpec(
            (1, 1, groups, queries, dim), lambda b, k, piece, block, scalars: (b, k, 0, piece, 0)
        )
        # the average number of query-key pairs: how much of a prompt is already in the cache is not known
        pairs = batch * kv_heads * groups * padded * capacity // 2
        rows = groups * queries
        return pl.pallas_call(
            functools.partial(_chunk_kernel, capacity=capacity),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, kv_heads, padded // queries, blocks),
                in_specs=[
                    query_block,
                    pl.BlockSpec((1, 1, dim, width), needed),
                    pl.BlockSpec((1, 1, dim, width), needed),
                ],
                out_specs=query_block,
                scratch_shapes=[
                    pltpu.VMEM((rows, LANES), jnp.float32),
                    pltpu.VMEM((rows, LANES), jnp.float32),
                    pltpu.VMEM((rows, dim), jnp.float32),
                ],
            ),
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=4 * pairs * dim,
                bytes_accessed=batch * kv_heads * padded // queries * capacity * dim * keys.dtype.itemsize,
                transcendentals=pairs,
            ),
            name="prefill_chunk",
        )(jnp.concatenate([scalars, starts]), q, keys, values)

    call = sharding.split_kernel(local, batch, ("-", "B", "BK---", "BK--", "BK--"), "BK---")
    out = call(offset[None], starts, stacked, keys.swapaxes(2, 3), values.swapaxes(2, 3))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, dim)[:, :length]
