"""Attention of a few queries per row on NVIDIA GPUs: further turns, blocks of drafted tokens, and the scores of a prompt's
last queries.

Fewer queries than fill a GPU are to read a long cache once. As for one query (`decode_attention.py`), the slots are split
among programs and a second kernel merges their softmaxes; as in prefill, a program multiplies a tile of queries: those of
all query heads that share a key/value head, so that every key is loaded once for all of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax import sharding
from recyc_jax.attention import selection
from recyc_jax.attention.reference import MASKED
from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.decode_attention import LEAST, merge

TILE = 128
"""Queries (of all heads of a group) that a program multiplies at a time, at most."""
LEAST_TILE = 64
"""Fewer queries take longer: Hopper multiplies 64 rows at a time. On an H100 those of a block of 8 tokens in a tile
of 32 made the pass over it 5 ms longer than those of 9 tokens in a tile of 64 (8B shape, 3 x 131,072 slots)."""
PROGRAMS = 264
"""Programs that fill a GPU: two for each of an H100's processors."""


class _Split(NamedTuple):
    """How slots are split among programs."""

    block: int  # slots that a program reads at a time
    programs: int
    warps: int
    stages: int


# measured on an H200 at 131,072 slots of an 8B shape (docs/results/lossless.md)
_SMALL = _Split(32, 2 * PROGRAMS, warps=4, stages=4)
_LARGE = _Split(64, PROGRAMS, warps=8, stages=3)
SCORED = 64
"""Slots that a program scores."""


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> Float[Array, "B C N H"]:
    """As `prefill_attention.chunk`."""
    return block(q, keys, values, starts, jnp.broadcast_to(offset, starts.shape))


def block(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    begins: Int[Array, " B"],
) -> Float[Array, "B C N H"]:
    """As `Implementation.block`."""
    return _attend(q, keys, values, starts, begins)[0]


def block_with_scores(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    begins: Int[Array, " B"],
) -> tuple[Float[Array, "B C N H"], Float[Array, "B K S"]]:
    """As `Implementation.block_with_scores`; the pass that makes the output also writes the first query's logits."""
    out, normaliser, logits = _attend(q, keys, values, starts, begins, with_logits=True)
    return out, selection.group_maximum(logits - normaliser[:, :, 0, :, None])


def chunk_part(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"]]:
    """As `reference.chunk_part`."""
    return block_part(q, keys, values, starts, jnp.broadcast_to(offset, starts.shape), with_logits=False)[:2]


def block_part(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    begins: Int[Array, " B"],
    with_logits: bool,
) -> tuple[Array, Array, Any]:
    """As `Implementation.block_part`."""
    out, normaliser, *logits = _attend(q, keys, values, starts, begins, with_logits, unrounded=True)
    return out, normaliser.swapaxes(1, 2).reshape(q.shape[:3]), next(iter(logits), None)


def window_scores(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    length: Int[Array, ""],
) -> Float[Array, "B K S"]:
    """As `reference.window_scores`: a pass for the queries' normalisers, and one in which every slot is scored."""
    return window_scores_by(q, keys, starts, length, window_normaliser(q, keys, values, starts, length))


def window_normaliser(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    length: Int[Array, ""],
) -> Float[Array, "B K W G"]:
    """Each query's logsumexp."""
    return _attend(q, keys, values, starts, jnp.broadcast_to(length - q.shape[1], starts.shape))[1]


def window_scores_by(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    length: Int[Array, ""],
    normaliser: Float[Array, "B K W G"],
) -> Float[Array, "B K S"]:
    """The scores by these normalisers."""
    offsets = jnp.broadcast_to(length - q.shape[1], starts.shape)
    inputs = ("B-N-", "BK--", "BK-G", "B", "B")
    local = sharding.split_kernel(_scores_on_device, q.shape[0], inputs, "BK-")
    return local(q, keys, normaliser, starts, offsets)


def _attend(
    q: Array,
    keys: Array,
    values: Array,
    starts: Array,
    offsets: Array,
    with_logits: bool = False,
    unrounded: bool = False,
) -> tuple[Array, ...]:
    """The output [B, C, N, H] (`unrounded`: in float32), each query's logsumexp [B, K, C, G], and if asked for the first
    token's logits [B, K, G, S].
    `offsets` [B] are the slots of the rows' first queries."""
    inputs, outputs = ("B-N-", "BK--", "BK--", "B", "B"), ("B-N-", "BK-G", *(("BKG-",) if with_logits else ()))
    local = functools.partial(_attend_on_device, with_logits=with_logits, unrounded=unrounded)
    return sharding.split_kernel(local, q.shape[0], inputs, outputs)(q, keys, values, starts, offsets)


def _by_kv_head(q: Array, kv_heads: int) -> Array:
    """[B, C, N, H] as [B, K, C G, H], the queries of a token side by side."""
    batch, width, heads, dim = q.shape
    grouped = q.reshape(batch, width, kv_heads, heads // kv_heads, dim)
    return grouped.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, -1, dim)


def _attend_on_device(
    q: Array, keys: Array, values: Array, starts: Array, offsets: Array, with_logits: bool, unrounded: bool
) -> tuple[Array, ...]:
    batch, width, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups, rows, lanes = heads // kv_heads, width * (heads // kv_heads), max(LEAST, pl.next_power_of_2(dim))
    tile = min(TILE, max(LEAST_TILE, pl.next_power_of_2(rows)))
    split = _SMALL if tile < TILE else _LARGE
    tiles, blocks = pl.cdiv(rows, tile), pl.cdiv(keys.shape[2], split.block)
    parts = max(1, min(blocks, split.programs // (batch * kv_heads * tiles)))
    padded = jnp.pad(_by_kv_head(q, kv_heads), [(0, 0), (0, 0), (0, tiles * tile - rows), (0, lanes - dim)])
    shape = (batch, kv_heads, parts, tiles * tile)
    shapes = [(*shape, lanes), shape, shape]
    if with_logits:  # a masked store goes one past the end, never to a live index
        shapes.append((batch, kv_heads, groups + 1, blocks * split.block))
    outs, peaks, totals, *logits = triton_call.call(
        _attend_part,
        [padded, keys, values, starts, offsets],
        [jax.ShapeDtypeStruct(one, jnp.float32) for one in shapes],
        (tiles, batch * kv_heads, parts),
        "turn_attention",
        warps=split.warps,
        stages=split.stages,
        tile=tile,
        block_slots=split.block,
        groups=groups,
        width=width,
        dim=dim,
    )
    out, normaliser = merge(outs, peaks, totals, (), rows, dim, jnp.dtype(jnp.float32) if unrounded else q.dtype)
    out = out.reshape(batch, kv_heads, width, groups, dim).transpose(0, 2, 1, 3, 4).reshape(q.shape)
    normaliser = normaliser.reshape(batch, kv_heads, width, groups)
    return (out, normaliser, *(one[:, :, :groups, : keys.shape[2]] for one in logits))


def _load_block(ref: Any, row: Array, head: Array, slot: Array, lane: Array) -> Array:
    """The keys or values of some slots; zeros past the end of the cache and of the head dim."""
    capacity, dim = ref.shape[2:]
    in_range, mask = jnp.minimum(slot, capacity - 1)[:, None], (slot < capacity)[:, None]
    if lane.size == dim:  # unclamped: Triton must see that lanes are adjacent
        index, mask = (row, head, in_range, lane[None, :]), jnp.broadcast_to(mask, (slot.size, lane.size))
    else:
        index, mask = (row, head, in_range, jnp.minimum(lane, dim - 1)[None, :]), mask & (lane < dim)[None, :]
    return plt.load(ref.at[index], mask=mask, other=0)


def _attend_part(
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    starts_ref: Any,
    offsets_ref: Any,
    out_ref: Any,
    peak_ref: Any,
    total_ref: Any,
    *logits_ref: Any,
    tile: int,
    block_slots: int,
    groups: int,
    width: int,
    dim: int,
) -> None:
    """One program: the running softmax of a tile of queries over its share of a head's slots."""
    number, of_head, part = (pl.program_id(axis) for axis in range(3))
    kv_heads, parts = keys_ref.shape[1], peak_ref.shape[2]
    row, head = of_head // kv_heads, of_head % kv_heads
    query, lane, lanes = number * tile + jnp.arange(tile), jnp.arange(q_ref.shape[3]), jnp.arange(block_slots)
    start, offset = plt.load(starts_ref.at[row]), plt.load(offsets_ref.at[row])
    # queries may stand before or behind a part of a cache
    query_slot = jnp.minimum(offset + jnp.minimum(query // groups, width - 1), keys_ref.shape[2] - 1)
    q = plt.load(q_ref.at[row, head, query[:, None], lane[None, :]])

    def attend_block(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        slot = block * block_slots + lanes
        logits = plt.dot(q, _load_block(keys_ref, row, head, slot, lane).T, allow_tf32=False).astype(jnp.float32)
        seen = (slot[None, :] <= query_slot[:, None]) & (slot >= start)[None, :]
        logits = jnp.where(seen, logits * dim**-0.5, MASKED)
        for ref in logits_ref:
            index = (row, head, jnp.minimum(query, groups)[:, None], slot[None, :])
            plt.store(ref.at[index], logits, mask=jnp.broadcast_to((query < groups)[:, None], logits.shape))
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink, weights = jnp.exp(peak - new_peak), jnp.exp(logits - new_peak[:, None])
        v = _load_block(values_ref, row, head, slot, lane)
        block_out = plt.dot(weights.astype(v.dtype), v, allow_tf32=False).astype(jnp.float32)
        return new_peak, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + block_out

    carry = (
        jnp.full(tile, MASKED, jnp.float32),
        jnp.zeros(tile, jnp.float32),
        jnp.zeros((tile, lane.size), jnp.float32),
    )
    first = jnp.maximum(start, 0) // block_slots
    end = (jnp.clip(offset + width, 0, keys_ref.shape[2]) + block_slots - 1) // block_slots
    share = (jnp.maximum(end - first, 0) + parts - 1) // parts
    begin = first + part * share
    peak, total, out = lax.fori_loop(begin, jnp.minimum(begin + share, end), attend_block, carry)
    plt.store(out_ref.at[row, head, part, query[:, None], lane[None, :]], out)
    plt.store(peak_ref.at[row, head, part, query], peak)
    plt.store(total_ref.at[row, head, part, query], total)


# --- the scores of slots under the last queries ----------------------------------------------------------------------


def _scores_on_device(q: Array, keys: Array, normaliser: Array, starts: Array, offsets: Array) -> Array:
    batch, width, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups, lanes = heads // kv_heads, max(LEAST, pl.next_power_of_2(dim))
    tile, blocks = max(LEAST, pl.next_power_of_2(width)), pl.cdiv(capacity, SCORED)
    q = q.reshape(batch, width, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)  # [B, K, G, W, H]
    q = jnp.pad(q, [(0, 0)] * 3 + [(0, tile - width), (0, lanes - dim)])
    normaliser = jnp.pad(normaliser.swapaxes(2, 3), [(0, 0)] * 3 + [(0, tile - width)])
    (scores,) = triton_call.call(
        _score_block,
        [q, keys, normaliser, starts, offsets],
        [jax.ShapeDtypeStruct((batch, kv_heads, blocks * SCORED), jnp.float32)],
        (blocks, batch * kv_heads),
        "window_scores",
        warps=4,
        stages=2,
        width=width,
        dim=dim,
    )
    return sharding.over_heads(lax.pmax, scores[:, :, :capacity], (sharding.GROUP,))


def _score_block(
    q_ref: Any,
    keys_ref: Any,
    normaliser_ref: Any,
    starts_ref: Any,
    offsets_ref: Any,
    score_ref: Any,
    *,
    width: int,
    dim: int,
) -> None:
    """One program: the scores of a block of slots under one key/value head."""
    block, of_head = (pl.program_id(axis) for axis in range(2))
    kv_heads, groups, tile = keys_ref.shape[1], q_ref.shape[2], q_ref.shape[3]
    row, head = of_head // kv_heads, of_head % kv_heads
    query, lane, slot = jnp.arange(tile), jnp.arange(q_ref.shape[4]), block * SCORED + jnp.arange(SCORED)
    start, offset = plt.load(starts_ref.at[row]), plt.load(offsets_ref.at[row])
    query_slot = offset + query
    is_query = (query < width) & (query_slot >= start)
    seen = (slot[None, :] <= query_slot[:, None]) & is_query[:, None]
    k = _load_block(keys_ref, row, head, slot, lane)
    best = jnp.full(SCORED, MASKED, jnp.float32)
    for group in range(groups):
        q = plt.load(q_ref.at[row, head, group, query[:, None], lane[None, :]])
        logits = plt.dot(q, k.T, allow_tf32=False).astype(jnp.float32) * dim**-0.5
        normaliser = plt.load(normaliser_ref.at[row, head, group, query])
        logits = jnp.where(seen, logits - normaliser[:, None], MASKED)
        peak = jnp.max(logits, axis=0)
        best = jnp.maximum(best, peak + jnp.log(jnp.sum(jnp.exp(logits - peak[None, :]), axis=0)))
    plt.store(score_ref.at[row, head, slot], best)
