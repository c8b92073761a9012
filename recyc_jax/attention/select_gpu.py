"""Exact top-k on NVIDIA GPUs without a sort: Pallas (Triton) kernels that find the last score to keep, then gather.

`lax.top_k` sorts, though of a recycled set only the entries that leave before the next refresh need an order. A radix
search for the k-th largest score reads the scores eight times (four bits a time, by counting), one more pass writes the
slots down; all layers' rows go through at once. Scores become integers of the same order first, so ranks are exact, ties to
the lower slot.

Letters: X rows (layers, batch and heads), S slots, R the best of them.
"""

from __future__ import annotations

import functools
from typing import Any

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
BITS = 4
"""Bits of the k-th largest key that one reading of the scores finds."""
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


def _top_slots(scores: Float[Array, "L B K S"], count: int, ordered: int) -> Int[Array, "L B K R"]:
    rows = scores.reshape(-1, scores.shape[-1])
    best_keys, best = _partition(rows.astype(jnp.float32), None, count, keep_rest=False)
    parted_keys, parted = _partition(best_keys, best, count - ordered, keep_rest=True)
    first = count - ordered
    _, tail = lax.sort((~parted_keys[:, first:], parted[:, first:]), dimension=1, num_keys=1, is_stable=True)
    return jnp.concatenate([parted[:, :first], tail], axis=1).reshape(*scores.shape[:-1], count)


def _keys(loaded: Float[Array, " s"] | Int[Array, " s"]) -> Int[Array, " s"]:
    """Integers in the order that a sort takes the scores in, -0 below +0; keys stay as they are."""
    if loaded.dtype == jnp.int32:
        return loaded
    bits = lax.bitcast_convert_type(loaded, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _call(kernel: Any, rows: int, shapes: list[jax.ShapeDtypeStruct], name: str) -> Any:
    params = plt.CompilerParams(num_warps=8, num_stages=1)
    return pl.pallas_call(
        kernel, out_shape=shapes, grid=(rows,), compiler_params=params, interpret=triton.INTERPRET, name=name
    )


def _partition(
    scores: Float[Array, "X S"] | Int[Array, "X S"], slots: Int[Array, "X S"] | None, count: int, *, keep_rest: bool
) -> tuple[Int[Array, "X R"], Int[Array, "X R"]]:
    """Keys and slots of the `count` largest scores (or keys) in the order that they stand in, then, if they are kept, those
    of the rest. What has no token is dropped, and leaves -1 at the end of its part. `slots=None` counts them."""
    rows, width = scores.shape
    last, above = _call(
        functools.partial(_search, count=count), rows, [jax.ShapeDtypeStruct((rows,), jnp.int32)] * 2, "kth_largest"
    )(scores)
    size = width if keep_rest else count
    # one place more: masked stores go there, never on a live one
    best_keys, best = _call(
        functools.partial(_gather, count=count, keep_rest=keep_rest),
        rows,
        [jax.ShapeDtypeStruct((rows, size + 1), jnp.int32)] * 2,
        "gather_largest",
    )(*(() if slots is None else (slots,)), scores, last, above)
    return best_keys[:, :size], best[:, :size]


def _search(scores_ref: Any, last_ref: Any, above_ref: Any, *, count: int) -> None:
    """The `count`-th largest key of a row, and how many are larger."""
    row = pl.program_id(0)
    width = scores_ref.shape[1]
    lanes, digits = jnp.arange(BLOCK), jnp.arange(1 << BITS)

    def find(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        last, above = carry
        candidates = last + (digits << (32 - BITS - BITS * turn))

        def tally(block: Array, counts: Array) -> Array:
            slot = block * BLOCK + lanes
            key = _keys(plt.load(scores_ref.at[row, jnp.minimum(slot, width - 1)], mask=slot < width, other=0))
            reached = (key[:, None] >= candidates[None, :]) & (slot < width)[:, None]
            return counts + reached.astype(jnp.int32)

        start = jnp.zeros((BLOCK, 1 << BITS), jnp.int32)
        counts = jnp.sum(lax.fori_loop(0, pl.cdiv(width, BLOCK), tally, start), axis=0)
        enough = counts >= count
        digit = jnp.sum((enough & (digits > 0)).astype(jnp.int32))
        fewer = jnp.max(jnp.where(enough, -1, counts))  # the candidate after the last that is reached often enough
        return last + (digit << (32 - BITS - BITS * turn)), jnp.where(fewer < 0, above, fewer)

    last, above = lax.fori_loop(0, 32 // BITS, find, (jnp.int32(LOWEST), jnp.int32(0)))
    plt.store(last_ref.at[row], last)
    plt.store(above_ref.at[row], above)


def _gather(*refs: Any, count: int, keep_rest: bool) -> None:
    """Write a row's largest keys and their slots side by side; of those equal to the last one the first."""
    *slots_ref, scores_ref, last_ref, above_ref, best_keys_ref, best_ref = refs
    row = pl.program_id(0)
    width, places = scores_ref.shape[1], best_ref.shape[1]
    trash = places - 1
    lanes = jnp.arange(BLOCK)
    last, above = plt.load(last_ref.at[row]), plt.load(above_ref.at[row])
    ties = jnp.where(last > NOTHING, count - above, 0)
    last = jnp.maximum(last, NOTHING)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        larger, equal, rest = carry
        place = block * BLOCK + lanes
        inside = place < width
        near = jnp.minimum(place, width - 1)
        key = _keys(plt.load(scores_ref.at[row, near], mask=inside, other=0))
        slot = plt.load(slots_ref[0].at[row, near], mask=inside, other=-1) if slots_ref else place
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
    larger, equal, rest = lax.fori_loop(0, pl.cdiv(width, BLOCK), visit, start)
    found = larger + jnp.minimum(equal, ties)

    def clear(block: Array, carry: Array) -> Array:
        place = block * BLOCK + lanes
        unwritten = (place < places) & (((place >= found) & (place < count)) | (place >= count + rest))
        to = jnp.where(unwritten, place, trash)
        plt.store(best_ref.at[row, to], jnp.full(BLOCK, -1, jnp.int32), mask=unwritten)
        plt.store(best_keys_ref.at[row, to], jnp.full(BLOCK, NOTHING, jnp.int32), mask=unwritten)
        return carry

    lax.fori_loop(0, pl.cdiv(places, BLOCK), clear, jnp.int32(0))
