"""Attention of prefill on NVIDIA GPUs: a Pallas (Triton) kernel in the manner of FlashAttention-2
(https://arxiv.org/abs/2307.08691), over a cache whose length is not known at compile time.

A program computes a block of queries of one head and loops over the slots that these queries see, with a running
softmax. Only blocks of slots that contain the row's first token or the queries' own slots are masked."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax import sharding
from recyc_jax.kernels.gpu import triton_call

TILE = 128, 64
"""Queries per program, and slots that a program reads at a time."""
STRIDED = 64, 128
"""`TILE` for queries that stand several slots apart, which are few."""
MASKED = -1e30


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    window: int | None = None,
) -> Float[Array, "B C N H"]:
    """The output of `reference.chunk`, but `offset` need not be a multiple of C."""
    inputs = ("B-N-", "BK--", "BK--", "B", "-")
    local = functools.partial(_chunk, window=window)
    return sharding.split_kernel(local, q.shape[0], inputs, "B-N-")(q, keys, values, starts, jnp.reshape(offset, 1))


def chunk_part(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"]]:
    """As `reference.chunk_part`, on one device; the output is rounded to q's dtype."""
    arrays = q, keys, values, starts, jnp.reshape(offset, 1)
    out, normaliser = _call(*arrays, "chunk_attention", TILE, dim=q.shape[-1], step=1, keep_normaliser=True)
    return out[:, : q.shape[1], :, : q.shape[-1]], normaliser[:, : q.shape[1]] / math.log2(math.e)


def _chunk(q: Array, keys: Array, values: Array, starts: Array, offset: Array, window: int | None) -> Array:
    """`chunk` on one device's share of rows and heads."""
    options = {"dim": q.shape[-1], "step": 1, "window": window}
    (out,) = _call(q, keys, values, starts, offset, "chunk_attention", TILE, **options)
    return out[:, : q.shape[1], :, : q.shape[-1]]


def strided(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    first: int,
    step: int,
    dim: int,
) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"]]:
    """The attention of the tokens `first`, `first + step`, ... to all tokens up to themselves, and the log2 of each
    query's sum of exponentials, on one device. Head dims are padded to a power of two; the first `dim` lanes hold
    data."""
    starts, offset = jnp.zeros(q.shape[0], jnp.int32), jnp.full(1, first, jnp.int32)
    arrays = q, keys, values, starts, offset
    out, normaliser = _call(*arrays, "selecting_attention", STRIDED, dim=dim, step=step, keep_normaliser=True)
    return out[:, : q.shape[1]], normaliser[:, : q.shape[1]]


def _call(
    q: Array,
    keys: Array,
    values: Array,
    starts: Array,
    offset: Array,
    name: str,
    tile: tuple[int, int],
    *,
    dim: int,
    step: int,
    window: int | None = None,
    keep_normaliser: bool = False,
) -> list[Array]:
    """The outputs, padded to whole blocks of queries and to a power of two of lanes, then, with `keep_normaliser`, the
    queries' normalisers."""
    batch, width, heads, _ = q.shape
    queries = min(tile[0], max(16, pl.next_power_of_2(width)))
    blocks = pl.cdiv(width, queries)
    lanes = max(16, pl.next_power_of_2(q.shape[-1]))
    # programs read and write whole blocks and tiles; callers cut the padding off
    padded = jnp.pad(q, ((0, 0), (0, blocks * queries - width), (0, 0), (0, lanes - q.shape[-1])))
    shapes = [jax.ShapeDtypeStruct(padded.shape, q.dtype)]
    if keep_normaliser:
        shapes.append(jax.ShapeDtypeStruct(padded.shape[:3], jnp.float32))
    return triton_call.call(
        _attend,
        [padded, keys, values, starts, offset],
        shapes,
        (blocks, heads, batch),
        name,
        warps=4,
        stages=2,
        dim=dim,
        queries=queries,
        slots=tile[1],
        step=step,
        window=window,
    )


def _attend(
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    starts_ref: Any,
    offset_ref: Any,
    out_ref: Any,
    *normaliser_ref: Any,
    dim: int,
    queries: int,
    slots: int,
    step: int,
    window: int | None,
) -> None:
    """One program: a block of queries of one head, each `step` slots after the one before it. With `window`, a query
    sees the latest slots up to its own alone, so many."""
    number, head, row = (pl.program_id(axis) for axis in range(3))
    kv_head = head // (q_ref.shape[2] // keys_ref.shape[1])
    capacity = keys_ref.shape[2]
    query, lane, lanes = number * queries + jnp.arange(queries), jnp.arange(q_ref.shape[3]), jnp.arange(slots)
    start, offset = plt.load(starts_ref.at[row]), plt.load(offset_ref.at[jnp.int32(0)])
    query_slot = jnp.minimum(offset + query * step, capacity - 1)  # queries may stand behind a part of a cache
    stored_dim = keys_ref.shape[3]
    lane_in_range = lane if lane.size == stored_dim else jnp.minimum(lane, stored_dim - 1)
    q = plt.load(q_ref.at[row, query[:, None], head, lane[None, :]])
    scale = dim**-0.5 * math.log2(math.e)

    def load(ref: Any, slot: Array, masked: bool) -> Array:
        if not masked and lane.size == stored_dim:
            return plt.load(ref.at[row, kv_head, slot[:, None], lane[None, :]])
        slot_in_range = jnp.minimum(slot, capacity - 1)[:, None]
        mask = jnp.broadcast_to((lane < stored_dim)[None, :] & (slot < capacity)[:, None], (lanes.size, lane.size))
        return plt.load(ref.at[row, kv_head, slot_in_range, lane_in_range[None, :]], mask=mask, other=0)

    def attend_block(block: Array, carry: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        slot = block * slots + lanes
        logits = plt.dot(q, load(keys_ref, slot, masked).T, allow_tf32=False).astype(jnp.float32) * scale
        if masked:
            seen = (slot[None, :] <= query_slot[:, None]) & (slot >= start)[None, :]
            if window is not None:
                seen = seen & (slot[None, :] > query_slot[:, None] - window)
            logits = jnp.where(seen, logits, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits - new_peak[:, None])
        v = load(values_ref, slot, masked)
        block_out = plt.dot(weights.astype(v.dtype), v, allow_tf32=False).astype(jnp.float32)
        return new_peak, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + block_out

    carry = (
        jnp.full(queries, MASKED, jnp.float32),
        jnp.zeros(queries, jnp.float32),
        jnp.zeros((queries, lane.size), jnp.float32),
    )
    # a row may begin before the first slot, and the queries may stand before it or behind the last one
    first = jnp.maximum(start, 0) // slots
    # the first block with slots that some of the queries do not see
    unmasked_end = jnp.clip(offset + number * queries * step, 0, capacity) // slots
    unmasked_end = jnp.maximum(unmasked_end, first)
    if window is not None:  # every block holds such slots
        first = jnp.maximum(jnp.maximum(start, offset + number * queries - window + 1), 0) // slots
        unmasked_end = first
    end = jnp.maximum(offset + ((number + 1) * queries - 1) * step + slots, 0) // slots
    end = jnp.minimum(end, pl.cdiv(capacity, slots))
    unmasked_begin = jnp.minimum(first + 1, unmasked_end)
    carry = lax.fori_loop(first, unmasked_begin, functools.partial(attend_block, masked=True), carry)
    carry = lax.fori_loop(unmasked_begin, unmasked_end, functools.partial(attend_block, masked=False), carry)
    peak, total, out = lax.fori_loop(unmasked_end, end, functools.partial(attend_block, masked=True), carry)
    # queries of padding tokens see nothing: their output is meaningless, but must be finite
    total = jnp.where(total > 0, total, 1)
    plt.store(out_ref.at[row, query[:, None], head, lane[None, :]], (out / total[:, None]).astype(out_ref.dtype))
    for ref in normaliser_ref:
        plt.store(ref.at[row, query, head], peak + jnp.log2(total))
