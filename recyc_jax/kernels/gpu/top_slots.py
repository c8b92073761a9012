"""Exact top-k on NVIDIA GPUs without a full sort: Pallas (Triton) kernels that find the k-th largest score by a radix
search, and then gather the slots of the k largest scores.

`lax.top_k` sorts all selected slots, although a recycled set needs an order only of the entries that leave it before
the next refresh. The radix search finds the k-th largest score by counting, a few bits at a time, and one more pass
writes the slots; one call handles the rows of all layers. Most scores are excluded beforehand: a sample of every few
slots gives a bound that somewhat more than k scores should reach. If at least k scores reach the bound, the scores
below it are not among the k largest and are not searched; if fewer than k reach it, or too many, all scores are
searched. Scores are first mapped to integers of the same order, so ranks are exact; ties go to the lower slot.

Letters: X rows (layers, batch and heads), S slots, R the best of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax import sharding
from recyc_jax.attention import selection
from recyc_jax.kernels.gpu import triton_call

BLOCK = 1024
"""Slots that a program reads at a time."""
COARSE_BITS = 24
"""Leading bits of the candidates' bound that are determined; its other bits are 0."""
SAMPLED = 64
"""The sample is dense enough that at least this many of the best scores are expected in it."""
HELD = 16384
"""The most keys of a row that a program holds at once, instead of loading them again for every digit."""
SEGMENT = 4096
"""Slots that a program searches for candidates."""
LOWEST = -(2**31)
"""The smallest key."""
NOTHING = -(2**31) + 0x7FFFFF
"""The key of -inf, which is the score of a slot without a token."""


def top_slots(scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
    """The R = min(budget, S) best slots, as `selection.top_slots` gives them, but with only the last `ordered` entries
    in rank order: the entries before these rank above them, in any order. -1 stands for slots whose score is -inf, at
    the end of either part."""
    count = min(budget, scores.shape[-1])
    if ordered >= count:
        return selection.top_slots(scores, budget)
    local = functools.partial(_top_slots, count=count, ordered=ordered)
    return sharding.split_kernel(local, scores.shape[1], ("-BK-",), "-BK-")(scores)


def top_slots_on_device(scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
    """`top_slots` of one device's share, for callers inside of `shard_map`. With `ordered=0` the slots are in ascending
    order."""
    count = min(budget, scores.shape[-1])
    return selection.top_slots(scores, budget) if ordered >= count else _top_slots(scores, count, ordered)


def _top_slots(scores: Float[Array, "L B K S"], count: int, ordered: int) -> Int[Array, "L B K R"]:
    """`top_slots` of one device's share, for `ordered < count`."""
    rows = scores.reshape(-1, scores.shape[-1]).astype(jnp.float32)
    width = rows.shape[1]
    step = min(32, count // SAMPLED)
    most_candidates = 3 * count
    if step < 2 or most_candidates >= width:
        best = _best_of_all(rows, count)
    else:
        candidates = _candidates(rows, 1 << (step.bit_length() - 1), count)
        is_every_token = candidates.bound <= NOTHING + 1
        is_enough = (candidates.total >= count) | is_every_token
        best = lax.cond(
            jnp.all(is_enough & (candidates.total <= most_candidates)),
            lambda: _best_of_candidates(rows, candidates, most_candidates, count),
            lambda: _best_of_all(rows, count),
        )
    best_keys, slots = best
    if ordered == 0:
        return slots.reshape(*scores.shape[:-1], count)
    split_keys, split_slots = _partition(best_keys, slots, None, count - ordered, keep_rest=True)
    first = count - ordered
    _, tail = lax.sort((~split_keys[:, first:], split_slots[:, first:]), dimension=1, num_keys=1, is_stable=True)
    return jnp.concatenate([split_slots[:, :first], tail], axis=1).reshape(*scores.shape[:-1], count)


class _Candidates(NamedTuple):
    """The scores of a row that may be among its best: those that reach a bound."""

    bound: Array  # int32 [X]: the smallest key of a candidate
    by_segment: Array  # int32 [X, segments]: the number of candidates in each segment
    total: Array  # int32 [X]


def _best_of_all(rows: Float[Array, "X S"], count: int) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    """Keys and slots of the `count` largest scores of each row, in the order of slots."""
    return _partition(rows, None, None, count, keep_rest=False)


def _best_of_candidates(
    rows: Float[Array, "X S"], candidates: _Candidates, most_candidates: int, count: int
) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    """`_best_of_all`, from the candidates alone, of which no row has more than `most_candidates`."""
    row_count, segments = candidates.by_segment.shape
    offsets = jnp.cumsum(candidates.by_segment, axis=1, dtype=jnp.int32) - candidates.by_segment
    keys, slots = _call(
        _compact,
        [rows, candidates.bound, offsets],
        2 * [(row_count, most_candidates + 1)],
        segments,
        "compact_candidates",
    )
    return _partition(keys, slots, candidates.total, count, keep_rest=False)


def _candidates(rows: Float[Array, "X S"], step: int, count: int) -> _Candidates:
    """The scores that reach a bound, which a sample of every `step`-th slot gives for the `count` largest. The bound
    allows for a tenth and four standard deviations more than `count` scores, because a single row with too few
    candidates sends all rows the slow way."""
    row_count, width = rows.shape
    segments = pl.cdiv(width, SEGMENT)
    expected = count / step
    sample_rank = min(math.ceil(1.1 * expected + 4 * math.sqrt(expected)), width // step)
    bound, _ = _call(
        _search,
        [rows],
        2 * [(row_count,)],
        None,
        "kth_largest_sample",
        count=sample_rank,
        bits=COARSE_BITS,
        step=step,
    )
    bound = jnp.maximum(bound, NOTHING + 1)
    (by_segment,) = _call(_count, [rows, bound], [(row_count, segments)], segments, "count_candidates")
    return _Candidates(bound, by_segment, jnp.sum(by_segment, axis=1, dtype=jnp.int32))


def _keys(scores: Float[Array, " s"] | Int[Array, " s"]) -> Int[Array, " s"]:
    """Integer keys in the order in which a sort takes the scores, -0 below +0. Keys are returned as they are."""
    if scores.dtype == jnp.int32:
        return scores
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _call(
    kernel: Any,
    arrays: list[Array],
    shapes: list[tuple[int, ...]],
    segments: int | None,
    name: str,
    **options: Any,
) -> list[Array]:
    """The kernel's int32 outputs of these shapes, from one program per row, or per segment of each row."""
    rows = shapes[0][0]
    grid = (rows,) if segments is None else (rows, segments)
    outputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return triton_call.call(kernel, arrays, outputs, grid, name, warps=8, stages=1, **options)


def _partition(
    scores: Float[Array, "X S"] | Int[Array, "X S"],
    slots: Int[Array, "X S"] | None,
    lengths: Int[Array, " X"] | None,
    count: int,
    *,
    keep_rest: bool,
) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    """Keys and slots of the `count` largest scores (or keys) of each row in their original order, then, with
    `keep_rest`, those of the other scores. Slots without a token are dropped, and -1 fills the end of either part.
    `slots=None` numbers the scores of a row from 0. With `lengths` only the first `lengths[x]` scores of row x are
    valid."""
    rows, width = scores.shape
    row_lengths = () if lengths is None else (lengths,)
    kth_key, above = _call(_search, [scores, *row_lengths], 2 * [(rows,)], None, "kth_largest", count=count, bits=32)
    size = width if keep_rest else count
    listed_slots = () if slots is None else (slots,)
    # one column more, which takes the masked stores: they must not go to a live column
    best_keys, best_slots = _call(
        _gather,
        [*listed_slots, scores, kth_key, above, *row_lengths],
        2 * [(rows, size + 1)],
        None,
        "gather_largest",
        count=count,
        keep_rest=keep_rest,
        has_slots=bool(listed_slots),
    )
    return best_keys[:, :size], best_slots[:, :size]


def _load_keys(ref: Any, row: Array, index: Array, end: Array | int) -> Int[Array, " s"]:
    """The keys of a row at these indices; `LOWEST` at indices from `end` on."""
    width = ref.shape[1]
    index_in_range = index if width % index.size == 0 else jnp.minimum(index, width - 1)
    is_valid = index < end
    return jnp.where(is_valid, _keys(plt.load(ref.at[row, index_in_range], mask=is_valid, other=0)), LOWEST)


def _count(scores_ref: Any, bound_ref: Any, by_segment_ref: Any) -> None:
    """One program: the number of candidates in one segment of a row."""
    row, segment = pl.program_id(0), pl.program_id(1)
    bound = plt.load(bound_ref.at[row])
    lanes = jnp.arange(BLOCK)

    def count_block(block: Array, counts: Array) -> Array:
        slot = segment * SEGMENT + block * BLOCK + lanes
        return counts + (_load_keys(scores_ref, row, slot, scores_ref.shape[1]) >= bound).astype(jnp.int32)

    counts = lax.fori_loop(0, SEGMENT // BLOCK, count_block, jnp.zeros(BLOCK, jnp.int32))
    plt.store(by_segment_ref.at[row, segment], jnp.sum(counts, dtype=jnp.int32))


def _compact(scores_ref: Any, bound_ref: Any, offsets_ref: Any, keys_ref: Any, slots_ref: Any) -> None:
    """One program: the candidates of one segment of a row, written after those of the segments before it."""
    row, segment = pl.program_id(0), pl.program_id(1)
    bound = plt.load(bound_ref.at[row])
    lanes, spare = jnp.arange(BLOCK), keys_ref.shape[1] - 1

    def compact_block(block: Array, offset: Array) -> Array:
        slot = segment * SEGMENT + block * BLOCK + lanes
        key = _load_keys(scores_ref, row, slot, scores_ref.shape[1])
        is_candidate = (key >= bound).astype(jnp.int32)
        store_index = jnp.where(
            is_candidate > 0, offset + jnp.cumsum(is_candidate, dtype=jnp.int32) - is_candidate, spare
        )
        plt.store(keys_ref.at[row, store_index], key, mask=is_candidate > 0)
        plt.store(slots_ref.at[row, store_index], slot, mask=is_candidate > 0)
        return offset + jnp.sum(is_candidate, dtype=jnp.int32)

    lax.fori_loop(0, SEGMENT // BLOCK, compact_block, plt.load(offsets_ref.at[row, segment]))


def _search(scores_ref: Any, *refs: Any, count: int, bits: int, step: int = 1) -> None:
    """One program: the `count`-th largest of every `step`-th key of a row, and how many of these keys are larger. Only
    the first `bits` bits of the `count`-th largest key are determined; its other bits are 0."""
    *length_ref, kth_key_ref, above_ref = refs
    row = pl.program_id(0)
    width = scores_ref.shape[1]
    end = plt.load(length_ref[0].at[row]) if length_ref else width
    key_count = pl.cdiv(width, step)
    is_held = key_count <= HELD
    size = pl.next_power_of_2(key_count) if is_held else BLOCK
    lanes = jnp.arange(size) * step
    held_keys = _load_keys(scores_ref, row, lanes, end) if is_held else None
    # where the program holds the keys, summing a tally takes longer than making it: so an iteration finds two bits with
    # three tallies, not four bits with fifteen
    digit_bits = 2 if is_held else 4
    digits = range(1, 1 << digit_bits)

    def find_digit(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        kth_key, above = carry
        unit = 1 << (32 - digit_bits - digit_bits * number)
        thresholds = [kth_key + digit * unit for digit in digits]

        def tally_block(block: Array, tallies: tuple[Array, ...]) -> tuple[Array, ...]:
            key = _load_keys(scores_ref, row, block * BLOCK * step + lanes, end) if held_keys is None else held_keys
            return tuple(
                tally + (key >= threshold).astype(jnp.int32)
                for tally, threshold in zip(tallies, thresholds, strict=True)
            )

        zeros = tuple(jnp.zeros(size, jnp.int32) for _ in digits)
        blocks = pl.cdiv(end, BLOCK * step)
        tallies = tally_block(jnp.int32(0), zeros) if is_held else lax.fori_loop(0, blocks, tally_block, zeros)
        digit, next_above = jnp.int32(0), jnp.int32(-1)
        # the digit is that of the last threshold that `count` keys reach; the larger keys are those that reach the
        # threshold after it
        for tally in tallies:
            reached = jnp.sum(tally, dtype=jnp.int32)
            is_enough = reached >= count
            digit = digit + is_enough.astype(jnp.int32)
            next_above = jnp.maximum(next_above, jnp.where(is_enough, -1, reached))
        return kth_key + digit * unit, jnp.where(next_above < 0, above, next_above)

    kth_key, above = lax.fori_loop(0, bits // digit_bits, find_digit, (jnp.int32(LOWEST), jnp.int32(0)))
    plt.store(kth_key_ref.at[row], kth_key)
    plt.store(above_ref.at[row], above)


def _gather(*refs: Any, count: int, keep_rest: bool, has_slots: bool) -> None:
    """One program: the largest keys of a row and their slots, side by side; of keys equal to the `count`-th largest the
    first ones. With `keep_rest` the other keys follow."""
    slots_ref, (scores_ref, kth_key_ref, above_ref, *length_ref, best_keys_ref, best_slots_ref) = (
        (refs[0], refs[1:]) if has_slots else (None, refs)
    )
    row = pl.program_id(0)
    width, size = scores_ref.shape[1], best_slots_ref.shape[1]
    end = plt.load(length_ref[0].at[row]) if length_ref else width
    spare = size - 1
    lanes = jnp.arange(BLOCK)
    kth_key, above = plt.load(kth_key_ref.at[row]), plt.load(above_ref.at[row])
    ties = jnp.where(kth_key > NOTHING, count - above, 0)
    kth_key = jnp.maximum(kth_key, NOTHING)

    def gather_block(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        larger, equal, rest = carry
        index = block * BLOCK + lanes
        is_valid = index < end
        key = _load_keys(scores_ref, row, index, end)
        slot = index
        if slots_ref is not None:
            slot = plt.load(slots_ref.at[row, jnp.minimum(index, width - 1)], mask=is_valid, other=-1)
        is_larger, is_equal = (key > kth_key) & is_valid, (key == kth_key) & (ties > 0) & is_valid
        larger_before = larger + jnp.cumsum(is_larger, dtype=jnp.int32) - is_larger.astype(jnp.int32)
        equal_before = equal + jnp.cumsum(is_equal, dtype=jnp.int32) - is_equal.astype(jnp.int32)
        is_best = is_larger | (is_equal & (equal_before < ties))
        store_index = jnp.where(is_best, larger_before + jnp.minimum(equal_before, ties), spare)
        is_stored = is_best
        if keep_rest:
            is_rest = is_valid & ~is_best & (key > NOTHING)
            rest_before = rest + jnp.cumsum(is_rest, dtype=jnp.int32) - is_rest.astype(jnp.int32)
            store_index = jnp.where(is_rest, count + rest_before, store_index)
            is_stored = is_best | is_rest
            rest = rest + jnp.sum(is_rest, dtype=jnp.int32)
        plt.store(best_slots_ref.at[row, store_index], slot, mask=is_stored)
        plt.store(best_keys_ref.at[row, store_index], key, mask=is_stored)
        return larger + jnp.sum(is_larger, dtype=jnp.int32), equal + jnp.sum(is_equal, dtype=jnp.int32), rest

    zeros = (jnp.int32(0), jnp.int32(0), jnp.int32(0))
    larger, equal, rest = lax.fori_loop(0, pl.cdiv(end, BLOCK), gather_block, zeros)
    best_count = larger + jnp.minimum(equal, ties)

    def fill_block(block: Array, carry: Array) -> Array:
        index = block * BLOCK + lanes
        is_unwritten = (index < size) & (((index >= best_count) & (index < count)) | (index >= count + rest))
        store_index = jnp.where(is_unwritten, index, spare)
        plt.store(best_slots_ref.at[row, store_index], jnp.full(BLOCK, -1, jnp.int32), mask=is_unwritten)
        plt.store(best_keys_ref.at[row, store_index], jnp.full(BLOCK, NOTHING, jnp.int32), mask=is_unwritten)
        return carry

    lax.fori_loop(0, pl.cdiv(size, BLOCK), fill_block, jnp.int32(0))
