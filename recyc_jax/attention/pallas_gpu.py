"""Attention on NVIDIA GPUs: Pallas (Triton) kernels for decoding, the plain functions elsewhere.

One query a row is too little work to fill a GPU unless the slots are split among many programs (split-K, as in
flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html); each leaves a running softmax, and XLA puts
these together. A prototype read rows of 256 bytes by index as fast as in order, so nothing is copied at a refresh
(`COPIES` is False), and who has left a set is told by bounds (`INDEXES`), so partial steps keep no books.

The kernels don't run on a CPU unless `triton.INTERPRET` is set. Whatever the head dim, group size and capacity, tiles are
powers of two, and what lies outside is masked.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import sharding
from recyc_jax.attention import triton
from recyc_jax.attention.reference import (
    MASKED,
    chunk,
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
    "full_with_scores",
    "full_with_weights",
    "pieces_with_weights",
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
BLOCK = 128
"""Slots that a program reads at a time."""
PROGRAMS = 512
"""Programs aimed at, some four for each multiprocessor of an H100; no more than this unless rows and heads are more."""


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
    return out, jnp.max(logits - normaliser[..., None], axis=2)


def selected(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
) -> Float[Array, "B N H"]:
    """As `reference.selected`; the slots are read where they stand."""
    everything = jnp.full(q.shape[0], slots.shape[2], jnp.int32)
    nothing = jnp.zeros(q.shape[0], jnp.int32)
    return recycled(q, keys, values, slots, everything, nothing, jnp.zeros((), jnp.int32))


def recycled(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
    kept: Int[Array, " B"],
    first: Int[Array, " B"],
    length: Int[Array, ""],
) -> Float[Array, "B N H"]:
    """As `reference.recycled`; listed slots are read where they stand, the newest in order, and nothing else is."""
    bounds = jnp.stack(jnp.broadcast_arrays(kept, first, length), axis=1).astype(jnp.int32)
    out, _, _ = _attend(q, keys, values, slots, bounds)
    return out


def _attend(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    listed: Int[Array, "B S"] | Int[Array, "B K R"],
    bounds: Int[Array, "B 3"] | None = None,
    keep_logits: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G"], Float[Array, "B K G S"] | None]:
    """The output, the log of the sum of exponentials of each query head, and the logits if they are wanted. `listed` says
    of each slot whether it is visible; or, with `bounds`, it holds slots, and a row's bounds are the number of them
    that count, and the first slot and the end of a range that is read as well."""
    inputs = ("BK-", "BK--", "BK--", *(("B-",) if bounds is None else ("BK-", "B-")))
    outputs = ("BK-", "BK-", "BK--" if keep_logits else None)
    local = functools.partial(_attend_here, keep_logits=keep_logits)
    arrays = (q, keys, values, listed, *(() if bounds is None else (bounds,)))
    return sharding.split_kernel(local, q.shape[0], inputs, outputs)(*arrays)


def _attend_here(
    q: Array, keys: Array, values: Array, listed: Array, bounds: Array | None = None, *, keep_logits: bool
) -> tuple[Array, Array, Array | None]:
    """`_attend` on one device's share."""
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    count = listed.shape[-1]
    blocks = pl.cdiv(count, BLOCK)
    programs = min(blocks, max(1, PROGRAMS // (batch * kv_heads)))
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
        shapes.append(jax.ShapeDtypeStruct((batch, kv_heads, rows, programs * share * BLOCK), jnp.float32))
    moved = batch * kv_heads * count * dim * (keys.dtype.itemsize + values.dtype.itemsize)
    parts_out = pl.pallas_call(
        functools.partial(_part, share=share, programs=programs, indexed=bounds is not None),
        out_shape=shapes,
        grid=(batch, kv_heads, programs),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * count * dim, transcendentals=batch * heads * count, bytes_accessed=moved
        ),
        interpret=triton.INTERPRET,
        name="full_attention" if bounds is None else "recycled_attention",
    )(*(() if bounds is None else (bounds,)), q.reshape(batch, kv_heads, groups, dim), keys, values, listed)
    unscaled, peaks, totals = (part[:, :, :, :groups] for part in parts_out[:3])
    unscaled = unscaled[..., :dim]
    logits = parts_out[3][:, :, :groups, :count] if keep_logits else None
    peak = jnp.max(peaks, axis=2, keepdims=True)
    weight = jnp.exp(peaks - peak)
    total = jnp.sum(totals * weight, axis=2)
    out = jnp.sum(unscaled * weight[..., None], axis=2) / total[..., None]
    return out.astype(q.dtype).reshape(q.shape), peak[:, :, 0] + jnp.log(total), logits


def _part(*refs: Any, share: int, programs: int, indexed: bool) -> None:
    """One program: the softmax of its share of a head's slots, `share` blocks of what is listed and every `programs`-th
    of the range."""
    bounds_ref, (q_ref, keys_ref, values_ref, listed_ref, out_ref, peak_ref, total_ref, *logits_ref) = (
        (refs[0], refs[1:]) if indexed else (None, refs)
    )
    row, head, part = (pl.program_id(axis) for axis in range(3))
    groups, dim = q_ref.shape[2:]
    count, capacity = listed_ref.shape[-1], keys_ref.shape[2]
    query, lane, lanes = jnp.arange(_power(groups)), jnp.arange(_power(dim)), jnp.arange(BLOCK)
    # loads past the end are brought back inside and masked; stores past it go where nothing is read
    near_query, near_lane = jnp.minimum(query, groups - 1), jnp.minimum(lane, dim - 1)
    to_query, to_lane = jnp.minimum(query, groups), jnp.minimum(lane, dim)
    is_query, is_lane = (query < groups)[:, None], (lane < dim)[None, :]
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

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        entry = (part * share + block) * BLOCK + lanes
        near_entry = jnp.minimum(entry, count - 1)
        if bounds_ref is not None:
            counts = entry < jnp.minimum(count, plt.load(bounds_ref.at[row, jnp.int32(0)]))
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
    state = lax.fori_loop(0, share, visit, state)
    if bounds_ref is not None:
        first, end = plt.load(bounds_ref.at[row, jnp.int32(1)]), plt.load(bounds_ref.at[row, jnp.int32(2)])

        def visit_newest(turn: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            at = first + (part + turn * programs) * BLOCK + lanes
            return over(jnp.minimum(at, capacity - 1), at < end, carry)[0]

        blocks = (end - first + BLOCK - 1) // BLOCK
        turns = jnp.maximum(blocks - part + programs - 1, 0) // programs
        state = lax.fori_loop(0, turns, visit_newest, state)
    peak, total, out = state
    plt.store(out_ref.at[row, head, part, to_query[:, None], to_lane[None, :]], out, mask=is_query & is_lane)
    plt.store(peak_ref.at[row, head, part, to_query], peak, mask=query < groups)
    plt.store(total_ref.at[row, head, part, to_query], total, mask=query < groups)
