"""Attention of one query per row on NVIDIA GPUs: a Pallas (Triton) kernel over the full cache or over a kept set.

One query per row is too little work to fill a GPU unless the slots are split among many programs (split-K, as in
flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): each program leaves a running softmax, and a
second kernel merges these. The slots of a kept set are read by index where they lie in the cache, so a refresh copies
nothing.

Whatever the head dim, group size and capacity, tiles are powers of two, and what lies outside is masked. A program
takes up to 140 KB of shared memory, as an A100 or H100 has; GPUs with 99 KB do not run the kernel at a head dim of 128.
Measurements are in docs/results/speed.md."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import sharding
from recyc_jax.attention.kept import Reads
from recyc_jax.attention.reference import MASKED
from recyc_jax.attention.remainder import Moments, Remainder
from recyc_jax.kernels.gpu import triton_call

LEAST = 16
"""The smallest side of a tile that Triton multiplies."""


class _Split(NamedTuple):
    """How slots are split among programs."""

    block: int  # slots that a program reads at a time
    programs: int  # the number aimed at; more only where there are more rows and heads
    warps: int = 4
    stages: int = 3  # blocks in flight or in use


FULL = _Split(128, 264)
KEPT = _Split(32, 512, warps=2, stages=4)
IN_FLIGHT = 2**17
"""The most bytes of keys and values that a program has in flight: A100 and H100 have room for a little more."""


_Running = tuple[Array, Array, tuple[Array, ...]]
"""A running softmax: the peak, the total, and the weighted sums of values, and of keys if they are asked for."""


def _power(size: int) -> int:
    return max(LEAST, pl.next_power_of_2(size))


def full(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """As `reference.full`; every slot is read once."""
    return _attend(q, keys, values, visible.astype(jnp.int8)).out


def full_with_log_probabilities(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
    rows: Bool[Array, " B"] | None,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
    """As `reference.full_with_log_probabilities`. The pass that makes the output also writes the logits, 4 bytes per
    slot and query head. Rows outside of `rows` (None: all rows count) read nothing."""
    seen = _attend(q, keys, values, visible.astype(jnp.int8), with_logits=True, rows=rows)
    return seen.out, seen.logits - seen.normaliser[..., None]


def full_with_moments(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"], Moments]:
    """`full_with_log_probabilities`, and the moments of the attention, with keys, from the same pass over the cache."""
    seen = _attend(q, keys, values, visible.astype(jnp.int8), with_logits=True, with_key=True, unrounded=True)
    return seen.out.astype(q.dtype), seen.logits - seen.normaliser[..., None], _moments(seen)


def kept(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
    reads: Reads,
    rows: Bool[Array, " B"] | None = None,
    rest: Remainder | None = None,
) -> Float[Array, "B N H"]:
    """One query per row over what `reads` names of the listed slots (-1 lists nothing) and of the newest ones, and over
    the token of `rest`. Rows outside of `rows` (None: all rows count) read nothing."""
    newest = (reads.first, jnp.reshape(reads.length, -1))
    return _attend(q, keys, values, slots, newest, reads.most, reads.replacing, rows=rows, rest=rest).out


def kept_moments(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
    reads: Reads,
    with_key: bool,
    rows: Bool[Array, " B"] | None = None,
) -> Moments:
    """`kept`, unrounded, with its logsumexp, and with the mean of the keys if asked for."""
    newest, options = (reads.first, jnp.reshape(reads.length, -1)), {"with_key": with_key, "rows": rows}
    return _moments(_attend(q, keys, values, slots, newest, reads.most, reads.replacing, unrounded=True, **options))


def part(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
    rows: Bool[Array, " B"] | None,
    with_logits: bool,
    with_key: bool,
) -> tuple[Moments, Float[Array, "B K G S"] | None]:
    """As `reference.part`, keys and logits if asked for."""
    options = {"with_logits": with_logits, "with_key": with_key, "rows": rows}
    seen = _attend(q, keys, values, visible.astype(jnp.int8), unrounded=True, **options)
    return _moments(seen), seen.logits


class _Seen(NamedTuple):
    """The results of one pass, or what each of them is split by (`sharding.split_kernel`)."""

    out: Any  # [B, N, H]
    normaliser: Any  # [B, K, G]: the logsumexp
    key: Any  # [B, N, H], float32: the mean of the keys; None if not asked for
    logits: Any  # [B, K, G, S]; None if not asked for


def _moments(seen: _Seen) -> Moments:
    shape = (*seen.normaliser.shape, seen.out.shape[-1])
    return Moments(seen.normaliser, seen.out.reshape(shape), None if seen.key is None else seen.key.reshape(shape))


def _attend(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B S"] | Int[Array, "B K R"],
    newest: tuple[Array, ...] = (),
    most: int = 0,
    replacing: bool = False,
    with_logits: bool = False,
    with_key: bool = False,
    unrounded: bool = False,
    rows: Bool[Array, " B"] | None = None,
    rest: Remainder | None = None,
) -> _Seen:
    """The output (`unrounded`: in float32), the logsumexp of each query head, and if asked for the mean of the keys and
    the logits.

    Without `newest`, `slots` says of each slot of the cache whether it is visible. With `newest`, which are `first` and
    `length` of `Reads`, it lists the slots of a kept set. Of rows that are not in `rows` the results are undefined.
    """
    asked = () if rows is None else (rows.astype(jnp.int32),)
    inputs = (
        "BN-",
        "BK--",
        "BK--",
        *(("BK-", "B", "B" if newest[1].shape[0] > 1 else "-") if newest else ("B-",)),
        *(("B",) if asked else ()),
    )
    more = () if rest is None else (rest.key, rest.value, rest.bias)
    inputs = (*inputs, *(("BKG-", "BKG-", "BKG") if more else ()))
    outputs = _Seen("BN-", "BKG", "BN-" if with_key else None, "BKG-" if with_logits else None)
    local = functools.partial(
        _attend_on_device,
        most=most,
        replacing=replacing,
        with_logits=with_logits,
        with_key=with_key,
        unrounded=unrounded,
        is_kept_set=bool(newest),
        has_rows=bool(asked),
        has_rest=bool(more),
    )
    return sharding.split_kernel(local, q.shape[0], inputs, outputs)(q, keys, values, slots, *newest, *asked, *more)


def _attend_on_device(
    q: Array,
    keys: Array,
    values: Array,
    slots: Array,
    *more: Array,
    most: int,
    replacing: bool,
    with_logits: bool,
    with_key: bool,
    unrounded: bool,
    is_kept_set: bool,
    has_rows: bool,
    has_rest: bool,
) -> _Seen:
    """`_attend` on one device's share of rows and heads."""
    newest_and_rows, rest = more[: len(more) - 3 * has_rest], more[len(more) - 3 * has_rest :]
    batch, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    count = slots.shape[-1]
    split = KEPT if is_kept_set else FULL
    slot_bytes = _power(dim) * (keys.dtype.itemsize + values.dtype.itemsize)
    while split.block > LEAST and slot_bytes * split.block * (split.stages - 1) > IN_FLIGHT:
        split = split._replace(block=split.block // 2)
    blocks = pl.cdiv(max(count, most), split.block)
    programs = min(blocks, max(1, split.programs // (batch * kv_heads)))
    programs = pl.cdiv(blocks, pl.cdiv(blocks, programs))
    share = pl.cdiv(pl.cdiv(count, split.block), programs)  # blocks of `slots` per program
    # where a tile is larger than the array, masked stores go one past the end, never to a live index
    group_rows, lanes = (size + (size < _power(size)) for size in (groups, dim))
    parts = (batch, kv_heads, programs, group_rows)
    shapes = [
        jax.ShapeDtypeStruct(parts, jnp.float32),
        jax.ShapeDtypeStruct(parts, jnp.float32),
        *[jax.ShapeDtypeStruct((*parts, lanes), jnp.float32)] * (1 + with_key),
    ]
    if with_logits:
        padded = programs * share * split.block
        shapes.append(jax.ShapeDtypeStruct((batch, kv_heads, group_rows, padded), jnp.float32))
    moved = batch * kv_heads * count * dim * (keys.dtype.itemsize + values.dtype.itemsize)
    peaks, totals, *sums = triton_call.call(
        _attend_part,
        [*newest_and_rows, q.reshape(batch, kv_heads, groups, dim), keys, values, slots],
        shapes,
        (batch, kv_heads, programs),
        "recycled_attention" if is_kept_set else "full_attention",
        warps=split.warps,
        stages=split.stages,
        work=pl.CostEstimate(
            flops=4 * batch * heads * count * dim, transcendentals=batch * heads * count, bytes_accessed=moved
        ),
        block=split.block,
        share=share,
        programs=programs,
        is_kept_set=is_kept_set,
        has_rows=has_rows,
        replacing=replacing,
        with_key=with_key,
    )
    logits = sums.pop()[:, :, :groups, :count] if with_logits else None
    dtype = jnp.dtype(jnp.float32) if unrounded else q.dtype
    also = (q.reshape(batch, kv_heads, groups, dim), *rest) if rest else ()
    sides = [merge(side, peaks, totals, also, groups, dim, dtype) for side in sums]
    (out, normaliser), key = sides[0], sides[1][0].reshape(q.shape) if with_key else None
    return _Seen(out.reshape(q.shape), normaliser, key, logits)


def merge(
    outs: Array, peaks: Array, totals: Array, also: tuple[Array, ...], groups: int, dim: int, dtype: Any
) -> tuple[Array, Array]:
    """The output [B, K, G, H] of all parts, and its logsumexp [B, K, G]. `also`: the queries, and the key, the value
    and the bias of one more token for each of them."""
    batch, kv_heads = outs.shape[:2]
    # a power of two of lanes: what lies past the head dim is cut off
    shapes = [
        jax.ShapeDtypeStruct((batch, kv_heads, groups, _power(dim)), dtype),
        jax.ShapeDtypeStruct((batch, kv_heads, groups), jnp.float32),
    ]
    grid = (batch, kv_heads, groups)
    out, normaliser = triton_call.call(
        _merge_parts, [outs, peaks, totals, *also], shapes, grid, "attention_parts", warps=4, stages=1, dim=dim
    )
    return out[..., :dim], normaliser


def _merge_parts(outs_ref: Any, peaks_ref: Any, totals_ref: Any, *refs: Any, dim: int) -> None:
    """One program: a query head."""
    *also_refs, out_ref, normaliser_ref = refs
    row, head, query = (pl.program_id(axis) for axis in range(3))
    parts, lane = outs_ref.shape[2], jnp.arange(_power(dim))
    part = jnp.arange(pl.next_power_of_2(parts))
    is_part, part_in_range = part < parts, jnp.minimum(part, parts - 1)
    lane_in_range = lane if lane.size == dim else jnp.minimum(lane, dim - 1)
    peaks = plt.load(peaks_ref.at[row, head, part_in_range, query], mask=is_part, other=MASKED)
    totals = plt.load(totals_ref.at[row, head, part_in_range, query], mask=is_part, other=0)
    index = (row, head, part_in_range[:, None], query, lane_in_range[None, :])
    outs = plt.load(outs_ref.at[index], mask=is_part[:, None], other=0)
    peak = jnp.max(peaks)
    logit = None
    if also_refs:  # as `Remainder.added`
        query_ref, key_ref, value_ref, bias_ref = also_refs
        query_vector, key, value = (
            plt.load(ref.at[row, head, query, lane_in_range], mask=lane < dim, other=0).astype(jnp.float32)
            for ref in (query_ref, key_ref, value_ref)
        )
        logit = jnp.sum(query_vector * key) * dim**-0.5 + plt.load(bias_ref.at[row, head, query])
        peak = jnp.maximum(peak, logit)
    weights = jnp.exp(peaks - peak)
    total, out = jnp.sum(totals * weights), jnp.sum(outs * weights[:, None], axis=0)
    if logit is not None:
        total, out = total + jnp.exp(logit - peak), out + jnp.exp(logit - peak) * value
    total = jnp.where(total > 0, total, 1)  # a row that is not asked for
    out = out / total
    plt.store(out_ref.at[row, head, query, lane], out.astype(out_ref.dtype))
    plt.store(normaliser_ref.at[row, head, query], peak + jnp.log(total))


def _attend_part(
    *refs: Any,
    block: int,
    share: int,
    programs: int,
    is_kept_set: bool,
    has_rows: bool,
    replacing: bool,
    with_key: bool,
) -> None:
    """One program: the running softmax over its share of a head's slots, `share` blocks of what is listed and every
    `programs`-th block of the newest slots; of the values, and `with_key` of the keys as well."""
    refs_left = iter(refs)
    newest_refs = [next(refs_left) for _ in range(2 * is_kept_set)]
    rows_ref = next(refs_left) if has_rows else None
    q_ref, keys_ref, values_ref, slots_ref, peak_ref, total_ref, *output_refs = refs_left
    sum_refs, logits_ref = output_refs[: 1 + with_key], output_refs[1 + with_key :]
    row, head, part = (pl.program_id(axis) for axis in range(3))
    groups, dim = q_ref.shape[2:]
    count, capacity = slots_ref.shape[-1], keys_ref.shape[2]
    left, first, end = jnp.int32(count), jnp.int32(0), jnp.int32(0)
    if is_kept_set:
        first_ref, length_ref = newest_refs
        first = plt.load(first_ref.at[row])
        end = plt.load(length_ref.at[jnp.int32(0) if length_ref.shape[0] == 1 else row])
        if replacing:  # as `Reads.remaining`
            left, first = count - (end - first), jnp.maximum(first, end - count)
    query, lane, lanes = jnp.arange(_power(groups)), jnp.arange(_power(dim)), jnp.arange(block)
    # loads past the end are clamped and masked; stores past it go to an index that nothing reads
    query_in_range, store_query = jnp.minimum(query, groups - 1), jnp.minimum(query, groups)
    is_query = (query < groups)[:, None]
    lane_in_range, store_lane, is_lane = lane, lane, jnp.ones((1, lane.size), jnp.bool_)
    if lane.size != dim:  # otherwise unclamped: Triton must see that lanes are adjacent, or it loads them one by one
        lane_in_range, store_lane, is_lane = jnp.minimum(lane, dim - 1), jnp.minimum(lane, dim), (lane < dim)[None, :]
    q_index = (row, head, query_in_range[:, None], lane_in_range[None, :])
    q = plt.load(q_ref.at[q_index], mask=is_query & is_lane, other=0)

    def weighted(weights: Array, side: Array) -> Array:
        """The sum of a block's values or keys. Differences are taken of sums that come with keys, so their weights are
        not rounded: what 16 bits leave out is multiplied too."""
        coarse = weights.astype(side.dtype)
        total = plt.dot(coarse, side, allow_tf32=False).astype(jnp.float32)
        if with_key and side.dtype.itemsize == 2:
            fine = (weights - coarse.astype(jnp.float32)).astype(side.dtype)
            total = total + plt.dot(fine, side, allow_tf32=False).astype(jnp.float32)
        return total

    def attend_block(slot: Array, is_read: Array, carry: _Running) -> tuple[_Running, Array]:
        """The running softmax with a block of slots added, and their logits."""
        peak, total, sums = carry
        index, mask = (row, head, slot[:, None], lane_in_range[None, :]), is_lane & is_read[:, None]
        k = plt.load(keys_ref.at[index], mask=mask, other=0)
        logits = plt.dot(q, k.T, allow_tf32=False).astype(jnp.float32) * dim**-0.5
        logits = jnp.where(is_read[None, :], logits, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.exp(logits - new_peak[:, None])
        v = plt.load(values_ref.at[index], mask=mask, other=0)
        sums = tuple(
            before * shrink[:, None] + weighted(weights, side)
            for before, side in zip(sums, (v, k) if with_key else (v,), strict=True)
        )
        return (new_peak, total * shrink + jnp.sum(weights, axis=1), sums), logits

    def attend_listed(number: Array, carry: _Running) -> _Running:
        entry = (part * share + number) * block + lanes
        entry_in_range = jnp.minimum(entry, count - 1)
        if is_kept_set:
            is_entry = entry < jnp.minimum(count, left)
            slot = plt.load(slots_ref.at[row, head, entry_in_range], mask=is_entry, other=-1)
            return attend_block(jnp.clip(slot, 0, capacity - 1), (slot >= 0) & (slot < end), carry)[0]
        is_entry = entry < count
        is_visible = plt.load(slots_ref.at[row, entry_in_range], mask=is_entry, other=0) != 0
        carry, logits = attend_block(entry_in_range, is_visible, carry)
        for ref in logits_ref:
            index = (row, head, store_query[:, None], entry[None, :])
            plt.store(ref.at[index], logits, mask=is_query & is_entry[None, :])
        return carry

    carry = (
        jnp.full(query.shape, MASKED, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
        (jnp.zeros((query.size, lane.size), jnp.float32),) * (1 + with_key),
    )
    is_asked = jnp.int32(1) if rows_ref is None else plt.load(rows_ref.at[row])
    carry = lax.fori_loop(0, share if rows_ref is None else share * is_asked, attend_listed, carry)
    if is_kept_set:

        def attend_newest(turn: Array, carry: _Running) -> _Running:
            slot = first + (part + turn * programs) * block + lanes
            return attend_block(jnp.minimum(slot, capacity - 1), slot < end, carry)[0]

        blocks = (end - first + block - 1) // block
        turns = jnp.maximum(blocks - part + programs - 1, 0) // programs * is_asked
        carry = lax.fori_loop(0, turns, attend_newest, carry)
    peak, total, sums = carry
    out_index = (row, head, part, store_query[:, None], store_lane[None, :])
    for ref, total_of_side in zip(sum_refs, sums, strict=True):
        plt.store(ref.at[out_index], total_of_side, mask=is_query & is_lane)
    plt.store(peak_ref.at[row, head, part, store_query], peak, mask=query < groups)
    plt.store(total_ref.at[row, head, part, store_query], total, mask=query < groups)
