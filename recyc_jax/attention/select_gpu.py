"""Exact top-k on NVIDIA GPUs without a sort: Pallas (Triton) kernels that find the last score to keep, then gather.

`lax.top_k` sorts, though of a recycled set only the entries that leave before the next refresh need an order. Here a radix
search finds the k-th largest score by counting, a few bits a time, and one more pass writes the slots down; all layers'
rows go through at once. Most scores are left out of it: a sample of every few slots tells a bound that somewhat more than
k scores should reach. If at least k do, the others are not among the best; if not, or if too many do, all scores are
searched. Scores become integers of the same order first, so ranks are exact, ties to the lower slot.

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
from recyc_jax.attention import select, triton

BLOCK = 1024
"""Slots that a program looks at a time."""
COARSE_BITS = 24
"""Bits of the bound that the candidates reach."""
SAMPLED = 64
"""Of the best, so many are in the sample at least."""
HELD = 16384
"""Keys of a row that a program can hold at once."""
SEGMENT = 4096
"""Slots that a program looks through for candidates."""
LOWEST = -(2**31)
"""The first key."""
NOTHING = -(2**31) + 0x7FFFFF
"""The key of -inf: a slot without a token."""


def top_slots(scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
    """As `select.top_slots`, but only the last `ordered` of the R = min(budget, S) entries are in rank order: those before
    them rank above them, in any order. -1 stands where the score is -inf, at the end of either part."""
    count = min(budget, scores.shape[-1])
    if ordered >= count:
        return select.top_slots(scores, budget)
    local = functools.partial(_top_slots, count=count, ordered=ordered)
    return sharding.split_kernel(local, scores.shape[1], ("-BK-",), "-BK-")(scores)


def top_slots_here(scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
    """`top_slots` on one device's share, as it is inside of `shard_map`. Where no order is asked for, slots stand in their
    own."""
    count = min(budget, scores.shape[-1])
    return select.top_slots(scores, budget) if ordered >= count else _top_slots(scores, count, ordered)


def _top_slots(scores: Float[Array, "L B K S"], count: int, ordered: int) -> Int[Array, "L B K R"]:
    rows = scores.reshape(-1, scores.shape[-1]).astype(jnp.float32)
    width = rows.shape[1]
    step = min(32, count // SAMPLED)
    room = 3 * count
    if step < 2 or room >= width:
        best = _best_of_all(rows, count)
    else:
        found = _candidates(rows, 1 << (step.bit_length() - 1), count)
        none_left_out = found.bound <= NOTHING + 1
        enough = (found.number >= count) | none_left_out
        best = lax.cond(
            jnp.all(enough & (found.number <= room)),
            lambda: _best_of_candidates(rows, found, room, count),
            lambda: _best_of_all(rows, count),
        )
    best_keys, slots = best
    if ordered == 0:
        return slots.reshape(*scores.shape[:-1], count)
    parted_keys, parted = _partition(best_keys, slots, None, count - ordered, keep_rest=True)
    first = count - ordered
    _, tail = lax.sort((~parted_keys[:, first:], parted[:, first:]), dimension=1, num_keys=1, is_stable=True)
    return jnp.concatenate([parted[:, :first], tail], axis=1).reshape(*scores.shape[:-1], count)


class _Candidates(NamedTuple):
    """What may be among the best of a row."""

    bound: Array  # int32 [X]: candidates' keys are not below it
    by_segment: Array  # int32 [X, segments]
    number: Array  # int32 [X]


def _best_of_all(rows: Float[Array, "X S"], count: int) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    return _partition(rows, None, None, count, keep_rest=False)


def _best_of_candidates(
    rows: Float[Array, "X S"], found: _Candidates, room: int, count: int
) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    number, segments = found.by_segment.shape
    firsts = jnp.cumsum(found.by_segment, axis=1) - found.by_segment
    keys, slots = _call(_compact, [rows, found.bound, firsts], 2 * [(number, room + 1)], segments, "compact_candidates")
    return _partition(keys, slots, found.number, count, keep_rest=False)


def _candidates(rows: Float[Array, "X S"], step: int, count: int) -> _Candidates:
    """Which scores reach the bound that a sample, every `step`-th slot, gives for the `count` largest, with a tenth and
    four standard deviations to spare: one row of which too few reach it sends all rows the slow way."""
    number, width = rows.shape
    segments = pl.cdiv(width, SEGMENT)
    expected = count / step
    wanted = min(math.ceil(1.1 * expected + 4 * math.sqrt(expected)), width // step)
    bound, _ = _call(
        _search, [rows], 2 * [(number,)], None, "kth_largest_sample", count=wanted, bits=COARSE_BITS, step=step
    )
    bound = jnp.maximum(bound, NOTHING + 1)
    (by_segment,) = _call(_count, [rows, bound], [(number, segments)], segments, "count_candidates")
    return _Candidates(bound, by_segment, jnp.sum(by_segment, axis=1))


def _keys(loaded: Float[Array, " s"] | Int[Array, " s"]) -> Int[Array, " s"]:
    """Integers in the order that a sort takes the scores in, -0 below +0; keys stay as they are."""
    if loaded.dtype == jnp.int32:
        return loaded
    bits = lax.bitcast_convert_type(loaded, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _call(
    kernel: Any,
    arrays: list[Array],
    shapes: list[tuple[int, ...]],
    segments: int | None,
    name: str,
    **options: Any,
) -> list[Array]:
    """A program for each row, or for each of its segments."""
    rows = shapes[0][0]
    grid = (rows,) if segments is None else (rows, segments)
    outputs = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return triton.call(kernel, arrays, outputs, grid, name, warps=8, stages=1, **options)


def _partition(
    scores: Float[Array, "X S"] | Int[Array, "X S"],
    slots: Int[Array, "X S"] | None,
    number: Int[Array, " X"] | None,
    count: int,
    *,
    keep_rest: bool,
) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    """Keys and slots of the `count` largest scores (or keys) in the order that they stand in, then, if they are kept, those
    of the rest. What has no token is dropped, and leaves -1 at the end of its part. `slots=None` counts them; with
    `number` only so many of each row are there."""
    rows, width = scores.shape
    numbers = () if number is None else (number,)
    last, above = _call(_search, [scores, *numbers], 2 * [(rows,)], None, "kth_largest", count=count, bits=32)
    size = width if keep_rest else count
    listed = () if slots is None else (slots,)
    # one place more: masked stores go there, never on a live one
    best_keys, best = _call(
        _gather,
        [*listed, scores, last, above, *numbers],
        2 * [(rows, size + 1)],
        None,
        "gather_largest",
        count=count,
        keep_rest=keep_rest,
        listed=bool(listed),
    )
    return best_keys[:, :size], best[:, :size]


def _load_keys(ref: Any, row: Array, place: Array, end: Array | int) -> Int[Array, " s"]:
    """The keys at these places of a row; `LOWEST` from `end` on."""
    width = ref.shape[1]
    near = place if width % place.size == 0 else jnp.minimum(place, width - 1)
    inside = place < end
    return jnp.where(inside, _keys(plt.load(ref.at[row, near], mask=inside, other=0)), LOWEST)


def _count(scores_ref: Any, bound_ref: Any, by_segment_ref: Any) -> None:
    """One program: a segment's candidates."""
    row, segment = pl.program_id(0), pl.program_id(1)
    bound = plt.load(bound_ref.at[row])
    lanes = jnp.arange(BLOCK)

    def visit(block: Array, counts: Array) -> Array:
        place = segment * SEGMENT + block * BLOCK + lanes
        return counts + (_load_keys(scores_ref, row, place, scores_ref.shape[1]) >= bound).astype(jnp.int32)

    counts = lax.fori_loop(0, SEGMENT // BLOCK, visit, jnp.zeros(BLOCK, jnp.int32))
    plt.store(by_segment_ref.at[row, segment], jnp.sum(counts))


def _compact(scores_ref: Any, bound_ref: Any, firsts_ref: Any, keys_ref: Any, slots_ref: Any) -> None:
    """One program: a segment's candidates, written where those of the segments before it end."""
    row, segment = pl.program_id(0), pl.program_id(1)
    bound = plt.load(bound_ref.at[row])
    lanes, trash = jnp.arange(BLOCK), keys_ref.shape[1] - 1

    def visit(block: Array, first: Array) -> Array:
        place = segment * SEGMENT + block * BLOCK + lanes
        key = _load_keys(scores_ref, row, place, scores_ref.shape[1])
        wanted = (key >= bound).astype(jnp.int32)
        to = jnp.where(wanted > 0, first + jnp.cumsum(wanted) - wanted, trash)
        plt.store(keys_ref.at[row, to], key, mask=wanted > 0)
        plt.store(slots_ref.at[row, to], place, mask=wanted > 0)
        return first + jnp.sum(wanted)

    lax.fori_loop(0, SEGMENT // BLOCK, visit, plt.load(firsts_ref.at[row, segment]))


def _search(scores_ref: Any, *refs: Any, count: int, bits: int, step: int = 1) -> None:
    """The `count`-th largest of every `step`-th key of a row (of its first bits: what is below them is 0), and how many are
    larger."""
    *number_ref, last_ref, above_ref = refs
    row = pl.program_id(0)
    width = scores_ref.shape[1]
    end = plt.load(number_ref[0].at[row]) if number_ref else width
    keys = pl.cdiv(width, step)
    held = keys <= HELD
    size = pl.next_power_of_2(keys) if held else BLOCK
    lanes = jnp.arange(size) * step
    first = _load_keys(scores_ref, row, lanes, end) if held else None
    # to sum up counts takes longer than to make them of what is held: then a turn finds two bits by three counts
    at_once = 2 if held else 4
    digits = range(1, 1 << at_once)

    def find(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        last, above = carry
        unit = 1 << (32 - at_once - at_once * turn)
        candidates = [last + digit * unit for digit in digits]

        def tally(block: Array, counts: tuple[Array, ...]) -> tuple[Array, ...]:
            key = _load_keys(scores_ref, row, block * BLOCK * step + lanes, end) if first is None else first
            return tuple(
                reached + (key >= candidate).astype(jnp.int32)
                for reached, candidate in zip(counts, candidates, strict=True)
            )

        start = tuple(jnp.zeros(size, jnp.int32) for _ in digits)
        blocks = pl.cdiv(end, BLOCK * step)
        tallied = tally(jnp.int32(0), start) if held else lax.fori_loop(0, blocks, tally, start)
        digit, fewer = jnp.int32(0), jnp.int32(-1)
        for counts in tallied:  # the candidate after the last that is reached often enough tells how many are larger
            reached = jnp.sum(counts)
            enough = reached >= count
            digit = digit + enough.astype(jnp.int32)
            fewer = jnp.maximum(fewer, jnp.where(enough, -1, reached))
        return last + digit * unit, jnp.where(fewer < 0, above, fewer)

    last, above = lax.fori_loop(0, bits // at_once, find, (jnp.int32(LOWEST), jnp.int32(0)))
    plt.store(last_ref.at[row], last)
    plt.store(above_ref.at[row], above)


def _gather(*refs: Any, count: int, keep_rest: bool, listed: bool) -> None:
    """Write a row's largest keys and their slots side by side; of those equal to the last one the first."""
    slots_ref, (scores_ref, last_ref, above_ref, *number_ref, best_keys_ref, best_ref) = (
        (refs[0], refs[1:]) if listed else (None, refs)
    )
    row = pl.program_id(0)
    width, places = scores_ref.shape[1], best_ref.shape[1]
    end = plt.load(number_ref[0].at[row]) if number_ref else width
    trash = places - 1
    lanes = jnp.arange(BLOCK)
    last, above = plt.load(last_ref.at[row]), plt.load(above_ref.at[row])
    ties = jnp.where(last > NOTHING, count - above, 0)
    last = jnp.maximum(last, NOTHING)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        larger, equal, rest = carry
        place = block * BLOCK + lanes
        inside = place < end
        key = _load_keys(scores_ref, row, place, end)
        slot = place
        if slots_ref is not None:
            slot = plt.load(slots_ref.at[row, jnp.minimum(place, width - 1)], mask=inside, other=-1)
        is_larger, is_equal = (key > last) & inside, (key == last) & (ties > 0) & inside
        larger_before = larger + jnp.cumsum(is_larger.astype(jnp.int32)) - is_larger.astype(jnp.int32)
        equal_before = equal + jnp.cumsum(is_equal.astype(jnp.int32)) - is_equal.astype(jnp.int32)
        taken = is_larger | (is_equal & (equal_before < ties))
        to = jnp.where(taken, larger_before + jnp.minimum(equal_before, ties), trash)
        kept = taken
        if keep_rest:
            left = inside & ~taken & (key > NOTHING)
            rest_before = rest + jnp.cumsum(left.astype(jnp.int32)) - left.astype(jnp.int32)
            to = jnp.where(left, count + rest_before, to)
            kept = taken | left
            rest = rest + jnp.sum(left.astype(jnp.int32))
        plt.store(best_ref.at[row, to], slot, mask=kept)
        plt.store(best_keys_ref.at[row, to], key, mask=kept)
        return larger + jnp.sum(is_larger.astype(jnp.int32)), equal + jnp.sum(is_equal.astype(jnp.int32)), rest

    start = (jnp.int32(0), jnp.int32(0), jnp.int32(0))
    larger, equal, rest = lax.fori_loop(0, pl.cdiv(end, BLOCK), visit, start)
    found = larger + jnp.minimum(equal, ties)

    def clear(block: Array, carry: Array) -> Array:
        place = block * BLOCK + lanes
        unwritten = (place < places) & (((place >= found) & (place < count)) | (place >= count + rest))
        to = jnp.where(unwritten, place, trash)
        plt.store(best_ref.at[row, to], jnp.full(BLOCK, -1, jnp.int32), mask=unwritten)
        plt.store(best_keys_ref.at[row, to], jnp.full(BLOCK, NOTHING, jnp.int32), mask=unwritten)
        return carry

    lax.fori_loop(0, pl.cdiv(places, BLOCK), clear, jnp.int32(0))
