"""Attention on NVIDIA GPUs: Pallas (Triton) kernels for decoding, prefill and selection; the plain functions elsewhere.

One query a row is too little work to fill a GPU unless the slots are split among many programs (split-K, as in
flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html); each leaves a running softmax, and one more kernel
puts these together. Rows are read by index where they stand, so nothing is copied at a refresh (`COPIES` is False), and
who has left a set is told by bounds (`INDEXES`), so partial steps keep no books.

The kernels don't run on a CPU unless `triton.INTERPRET` is set. Whatever the head dim, group size and capacity, tiles are
powers of two, and what lies outside is masked. A program takes up to 140 KB of shared memory, as an A100 or H100 has;
GPUs with 99 KB do not run them at a head dim of 128. What was measured is in docs/results/speed.md.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import projections_gpu as projections
from recyc_jax import sharding
from recyc_jax.attention import prefill_gpu, reference, triton
from recyc_jax.attention.reference import (
    MASKED,
    chunk_with_mass,
    compact,
    full_with_weights,
    pieces_with_weights,
    selected_with_weights,
    window_scores,
)
from recyc_jax.attention.select_gpu import top_slots

__all__ = [
    "chunk",
    "chunk_with_mass",
    "compact",
    "full",
    "full_or_recycled",
    "full_with_scores",
    "full_with_weights",
    "pieces_with_weights",
    "projections",
    "recycled",
    "selected",
    "selected_with_weights",
    "top_slots",
    "window_scores",
]

SLOTS_LAST: bool = False
COPIES: bool = False
INDEXES: bool = True

LEAST = 16
"""The smallest side of a tile that Triton multiplies."""


class _Split(NamedTuple):
    """How slots are split among programs."""

    block: int  # slots that a program reads at a time
    programs: int  # aimed at: no more than these unless rows and heads are more
    warps: int = 4
    stages: int = 3  # blocks on their way or at hand


FULL = _Split(128, 264)
IN_FLIGHT = 2**17
"""Bytes of keys and values that a program has on their way at most: A100 and H100 have room for a little more."""
RECYCLED = _Split(32, 512, warps=2, stages=4)


def _power(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))


def full(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """As `reference.full`; every slot is read once."""
    out, _, _ = _attend(q, keys, values, visible.astype(jnp.int8))
    return out


def full_with_scores(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K S"]]:
    """As `reference.full_with_scores`; the pass that makes the output leaves the logits too, 4 bytes a slot and head."""
    out, normaliser, logits = _attend(q, keys, values, visible.astype(jnp.int8), keep_logits=True)
    assert logits is not None
    return out, _scores(logits, normaliser)


def _scores(logits: Float[Array, "B K G S"], normaliser: Float[Array, "B K G"], due: Array | None = None) -> Array:
    """What `full_with_scores` returns; -inf for rows that are not due."""
    scores = jnp.max(logits - normaliser[..., None], axis=2)
    if due is not None:
        scores = jnp.where(due[:, None, None], scores, -jnp.inf)
    # else XLA may take this into the pooling that follows, and do it for every slot of a window
    return lax.optimization_barrier(scores)


def selected(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
) -> Float[Array, "B N H"]:
    """As `reference.selected`; the slots are read where they stand."""
    return recycled(q, keys, values, slots, jnp.zeros(q.shape[0], jnp.int32), jnp.zeros((), jnp.int32), evict=False)


def recycled(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
    since: Int[Array, " B"],
    length: Int[Array, ""],
    evict: bool,
) -> Float[Array, "B N H"]:
    """As `reference.recycled`; listed slots are read where they stand, the newest in order, and nothing else is."""
    out, _, _ = _attend(q, keys, values, slots, (since, jnp.reshape(length, 1)), evict)
    return out


def full_or_recycled(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
    due: Bool[Array, " B"],
    slots: Int[Array, "B K R"],
    since: Int[Array, " B"],
    length: Int[Array, ""],
    evict: bool,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K S"]]:
    """As `reference.full_or_recycled`. Each row's programs read what the row attends to: two kernels, of which one has
    nothing to do for the row, in place of a cond, at which the device waits. (Scores are made of every row, due or not:
    4 bytes a slot and query head are read.)"""
    whole, normaliser, logits = _attend(q, keys, values, visible.astype(jnp.int8), keep_logits=True, wanted=due)
    few, _, _ = _attend(q, keys, values, slots, (since, jnp.reshape(length, 1)), evict, wanted=~due)
    assert logits is not None
    return jnp.where(due[:, None, None], whole, few), _scores(logits, normaliser, due)


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> Float[Array, "B C N H"]:
    """As `reference.chunk`, and that itself for float32 and for head dims above 128: tensor cores multiply no float32, and
    larger tiles don't fit in registers."""
    narrow = q.dtype.itemsize == 2 and q.shape[-1] <= 128
    return (prefill_gpu.chunk if narrow else reference.chunk)(q, keys, values, starts, offset)


def _attend(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    listed: Int[Array, "B S"] | Int[Array, "B K R"],
    ages: tuple[Array, ...] = (),  # int32 [B], [1]
    evict: bool = False,
    keep_logits: bool = False,
    wanted: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G"], Float[Array, "B K G S"] | None]:
    """The output, the log of the sum of exponentials of each query head, and the logits if they are wanted. `listed` says
    of each slot whether it is visible; or, with `ages`, it holds slots, and these are `since` and `length` of
    `reference.recycled`. Rows that are not wanted read nothing, and what comes out for them means nothing."""
    rows = () if wanted is None else (wanted.astype(jnp.int32),)
    inputs = ("BK-", "BK--", "BK--", *(("BK-", "B", "-") if ages else ("B-",)), *(("B",) if rows else ()))
    outputs = ("BK-", "BK-", "BK--" if keep_logits else None)
    local = functools.partial(_attend_here, evict=evict, keep_logits=keep_logits, indexed=bool(ages), asked=bool(rows))
    return sharding.split_kernel(local, q.shape[0], inputs, outputs)(q, keys, values, listed, *ages, *rows)


def _attend_here(
    q: Array,
    keys: Array,
    values: Array,
    listed: Array,
    *told: Array,
    evict: bool,
    keep_logits: bool,
    indexed: bool,
    asked: bool,
) -> tuple[Array, Array, Array | None]:
    """`_attend` on one device's share."""
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    count = listed.shape[-1]
    split = RECYCLED if indexed else FULL
    row = _power(dim) * (keys.dtype.itemsize + values.dtype.itemsize)
    while split.block > LEAST and row * split.block * (split.stages - 1) > IN_FLIGHT:
        split = split._replace(block=split.block // 2)
    blocks = pl.cdiv(count, split.block)
    programs = min(blocks, max(1, split.programs // (batch * kv_heads)))
    share = pl.cdiv(blocks, programs)
    programs = pl.cdiv(blocks, share)
    # where a tile is larger than what there is, masked stores go one past the end, never on a live place
    rows, lanes = (size + (size < _power(size)) for size in (groups, dim))
    parts = (batch, kv_heads, programs, rows)
    shapes = [
        jax.ShapeDtypeStruct((*parts, lanes), jnp.float32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
    ]
    if keep_logits:
        shapes.append(jax.ShapeDtypeStruct((batch, kv_heads, rows, programs * share * split.block), jnp.float32))
    moved = batch * kv_heads * count * dim * (keys.dtype.itemsize + values.dtype.itemsize)
    parts_out = triton.call(
        _part,
        [*told, q.reshape(batch, kv_heads, groups, dim), keys, values, listed],
        shapes,
        (batch, kv_heads, programs),
        "recycled_attention" if indexed else "full_attention",
        warps=split.warps,
        stages=split.stages,
        work=pl.CostEstimate(
            flops=4 * batch * heads * count * dim, transcendentals=batch * heads * count, bytes_accessed=moved
        ),
        block=split.block,
        share=share,
        programs=programs,
        indexed=indexed,
        asked=asked,
        evict=evict,
    )
    logits = parts_out[3][:, :, :groups, :count] if keep_logits else None
    out, normaliser = _together(parts_out[0], parts_out[1], parts_out[2], groups, dim, q.dtype)
    return out.reshape(q.shape), normaliser, logits


def _together(outs: Array, peaks: Array, totals: Array, groups: int, dim: int, dtype: Any) -> tuple[Array, Array]:
    """The output [B, K, G, H] of all parts, and the log of the sum of exponentials [B, K, G]."""
    batch, kv_heads = outs.shape[:2]
    # a power of two of lanes: what lies past the head dim is cut off
    shapes = [
        jax.ShapeDtypeStruct((batch, kv_heads, groups, _power(dim)), dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, groups), jnp.float32),
    ]
    grid = (batch, kv_heads, groups)
    out, normaliser = triton.call(
        _put_together, [outs, peaks, totals], shapes, grid, "attention_parts", warps=4, stages=1, dim=dim
    )
    return out[..., :dim], normaliser


def _put_together(
    outs_ref: Any, peaks_ref: Any, totals_ref: Any, out_ref: Any, normaliser_ref: Any, *, dim: int
) -> None:
    """One program: a query head."""
    row, head, query = (pl.program_id(axis) for axis in range(3))
    parts, lane = outs_ref.shape[2], jnp.arange(_power(dim))
    part = jnp.arange(pl.next_power_of_2(parts))
    is_part, near = part < parts, jnp.minimum(part, parts - 1)
    near_lane = lane if lane.size == dim else jnp.minimum(lane, dim - 1)
    peaks = plt.load(peaks_ref.at[row, head, near, query], mask=is_part, other=MASKED)
    totals = plt.load(totals_ref.at[row, head, near, query], mask=is_part, other=0)
    outs = plt.load(outs_ref.at[row, head, near[:, None], query, near_lane[None, :]], mask=is_part[:, None], other=0)
    peak = jnp.max(peaks)
    weights = jnp.exp(peaks - peak)
    total = jnp.sum(totals * weights)
    total = jnp.where(total > 0, total, 1)  # a row that is not wanted
    out = jnp.sum(outs * weights[:, None], axis=0) / total
    plt.store(out_ref.at[row, head, query, lane], out.astype(out_ref.dtype))
    plt.store(normaliser_ref.at[row, head, query], peak + jnp.log(total))


def _part(*refs: Any, block: int, share: int, programs: int, indexed: bool, asked: bool, evict: bool) -> None:
    """One program: the softmax of its share of a head's slots, `share` blocks of what is listed and every `programs`-th
    of the range."""
    each = iter(refs)
    ages = [next(each) for _ in range(2 * indexed)]
    wanted_ref = next(each) if asked else None
    q_ref, keys_ref, values_ref, listed_ref, out_ref, peak_ref, total_ref, *logits_ref = each
    row, head, part = (pl.program_id(axis) for axis in range(3))
    groups, dim = q_ref.shape[2:]
    count, capacity = listed_ref.shape[-1], keys_ref.shape[2]
    kept, first, end = jnp.int32(count), jnp.int32(0), jnp.int32(0)
    if ages:
        first, end = plt.load(ages[0].at[row]), plt.load(ages[1].at[jnp.int32(0)])
        if evict:  # once all ranked ones have left, the oldest new ones do
            kept, first = count - (end - first), jnp.maximum(first, end - count)
    query, lane, lanes = jnp.arange(_power(groups)), jnp.arange(_power(dim)), jnp.arange(block)
    # loads past the end are brought back inside and masked; stores past it go where nothing is read
    near_query, to_query = jnp.minimum(query, groups - 1), jnp.minimum(query, groups)
    is_query = (query < groups)[:, None]
    near_lane, to_lane, is_lane = lane, lane, jnp.ones((1, lane.size), jnp.bool_)
    if lane.size != dim:  # else Triton would see no longer that lanes lie side by side, and load them one by one
        near_lane, to_lane, is_lane = jnp.minimum(lane, dim - 1), jnp.minimum(lane, dim), (lane < dim)[None, :]
    q = plt.load(q_ref.at[row, head, near_query[:, None], near_lane[None, :]], mask=is_query & is_lane, other=0)

    def over(at: Array, seen: Array, carry: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
        """The running softmax with a block of slots added, and their logits."""
        peak, total, out = carry
        reads = is_lane & seen[:, None]
        k = plt.load(keys_ref.at[row, head, at[:, None], near_lane[None, :]], mask=reads, other=0)
        logits = plt.dot(q, k.T, allow_tf32=False).astype(jnp.float32) * dim**-0.5
        logits = jnp.where(seen[None, :], logits, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.exp(logits - new_peak[:, None])
        v = plt.load(values_ref.at[row, head, at[:, None], near_lane[None, :]], mask=reads, other=0)
        here = plt.dot(weights.astype(v.dtype), v, allow_tf32=False).astype(jnp.float32)
        return (new_peak, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + here), logits

    def visit(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        entry = (part * share + number) * block + lanes
        near_entry = jnp.minimum(entry, count - 1)
        if indexed:
            counts = entry < jnp.minimum(count, kept)
            slot = plt.load(listed_ref.at[row, head, near_entry], mask=counts, other=-1)
            return over(jnp.clip(slot, 0, capacity - 1), slot >= 0, carry)[0]
        is_entry = entry < count
        seen = plt.load(listed_ref.at[row, near_entry], mask=is_entry, other=0) != 0
        carry, logits = over(near_entry, seen, carry)
        for ref in logits_ref:
            plt.store(ref.at[row, head, to_query[:, None], entry[None, :]], logits, mask=is_query & is_entry[None, :])
        return carry

    state = (
        jnp.full(query.shape, MASKED, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
        jnp.zeros((query.size, lane.size), jnp.float32),
    )
    wanted = jnp.int32(1) if wanted_ref is None else plt.load(wanted_ref.at[row])
    state = lax.fori_loop(0, share if wanted_ref is None else share * wanted, visit, state)
    if indexed:

        def visit_newest(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            at = first + (part + turn * programs) * block + lanes
            return over(jnp.minimum(at, capacity - 1), at < end, carry)[0]

        blocks = (end - first + block - 1) // block
        turns = jnp.maximum(blocks - part + programs - 1, 0) // programs * wanted
        state = lax.fori_loop(0, turns, visit_newest, state)
    peak, total, out = state
    plt.store(out_ref.at[row, head, part, to_query[:, None], to_lane[None, :]], out, mask=is_query & is_lane)
    plt.store(peak_ref.at[row, head, part, to_query], peak, mask=query < groups)
    plt.store(total_ref.at[row, head, part, to_query], total, mask=query < groups)
