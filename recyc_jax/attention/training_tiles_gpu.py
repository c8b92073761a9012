"""What the kernels of recycled attention in training share: tiles of queries, and the entries that these attend to.

A segment is a token that selects and those after it, up to the next. Its queries attend to the keys that it selected, read
by index where they stand, and to its own tokens. Letters beside those of `training.py`: M rows (a segment's queries of a
key/value head, token by token), E entries (selected or new keys) of a tile, P entries with what fills the last tile, U
tokens of all segments and one place of no meaning. Logits stand in base 2, times log2(e), as `exp2` wants them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Int

NOWHERE = 1 << 30
"""The slot of an entry that holds none: behind all others."""
MASKED = -1e30
LEAST = 16
"""The smallest side of a tile that Triton multiplies."""


class Form(NamedTuple):
    """What a program must know of the form. Static."""

    first: int  # the first token that selects
    stride: int
    ranks: int  # entries of a selection that may hold a slot
    evict: bool


class Tiles(NamedTuple):
    """The sides of tiles, the warps that work on them, and the tiles on their way or at hand. Those that the kernels
    take are among the faster of some that were timed on an H100, at 32768 tokens and head dims of 64 and 128
    (docs/results/training_attention.md)."""

    rows: int = 128
    entries: int = 64
    warps: int = 4
    stages: int = 3


def side(size: int, most: int) -> int:
    """Of a tile over so many."""
    return min(most, max(LEAST, pl.next_power_of_2(size)))


class Rows(NamedTuple):
    """A tile of a segment's rows."""

    token: Array  # in the segment, the last one where there is none
    head: Array
    there: Array  # the row is one of the segment's

    def place(self, segment: Array, form: Form) -> Array:
        """Tokens counted from the first that selects."""
        return segment * form.stride + self.token


def apart(index: Int[Array, "*i"], size: int) -> tuple[Int[Array, "*i"], Int[Array, "*i"]]:
    """Quotient and remainder of what is not negative."""
    if size == 1:
        return index, jnp.zeros_like(index)
    sizes = jnp.full_like(index, size)
    return lax.div(index, sizes), lax.rem(index, sizes)


def rows_of(number: Array, size: int, kv_head: Array, groups: int, form: Form) -> Rows:
    """The `number`-th tile of this many."""
    row = number * size + jnp.arange(size)
    token, group = apart(row, groups)
    return Rows(jnp.minimum(token, form.stride - 1), kv_head * groups + group, token < form.stride)


def over_entries(
    step: Callable[[Array, Any, Array | None, Any], Any],
    carry: Any,
    lists: Sequence[Any],  # references: slots, and where ranked keys leave, the last token that sees each
    where: tuple[Array, Array, Array],
    token: Int[Array, " M"],
    last: Array,
    form: Form,
    size: int,
    width: int,
) -> Any:
    """The carry after `step(slots [E], seen [M, E], entries [E], carry)` of all that tokens up to `last` of a segment see.
    `seen` is None where all tokens see all of the tile, `entries` where it holds the segment's own tokens. A segment's
    token 0 sees what it selected. Where entries hold no slot at all, as in what fills a part, nothing is seen."""
    slots_ref, *leaves_ref = lists
    segment = where[0]
    selects, lanes = form.first + segment * form.stride, jnp.arange(size)
    some = (plt.load(slots_ref.at[(*where, jnp.int32(0))]) < width).astype(jnp.int32)

    def ranked(number: Array, carry: Any, whole: bool) -> Any:
        seen: Any
        entry = number * size + lanes
        slot = plt.load(slots_ref.at[(*where, entry)])
        seen = None if whole else jnp.broadcast_to((slot < width)[None, :], (token.size, size))
        if leaves_ref:
            stays = plt.load(leaves_ref[0].at[(*where, entry)])[None, :] >= token[:, None]
            seen = stays if seen is None else seen & stays
        return step(slot if whole else jnp.minimum(slot, width - 1), seen, entry, carry)

    def new(number: Array, carry: Any) -> Any:
        since = 1 + number * size + lanes
        seen = new_seen(since[None], token[:, None], form)
        return step(jnp.minimum(selects + since, width - 1), seen, None, carry)

    held = some * jnp.minimum(form.ranks, selects + 1)  # entries that hold slots stand before those that don't
    whole, tiles = held // size, (held + size - 1) // size
    carry = lax.fori_loop(0, whole, functools.partial(ranked, whole=True), carry)
    carry = lax.fori_loop(whole, tiles, functools.partial(ranked, whole=False), carry)
    return lax.fori_loop(0, some * (last + size - 1) // size, new, carry)


def new_seen(since: Array, token: Array, form: Form) -> Array:
    """Which of a segment's tokens (`since`) its tokens attend to, beside what was selected."""
    seen = (since > 0) & (since <= token)
    return seen & (since > token - form.ranks) if form.evict else seen


def dot(a: Array, b: Array) -> Array:
    return plt.dot(a, b, allow_tf32=False).astype(jnp.float32)


def scale2(dim: int) -> float:
    return dim**-0.5 * math.log2(math.e)


def given(leaves: Array | None) -> tuple[Array, ...]:
    return () if leaves is None else (leaves,)


class Tile(NamedTuple):
    """Where a program that takes a tile of a segment's rows is."""

    segment: Array
    local: Array  # the segment, counted from the first of its part
    kv_head: Array
    batch: Array
    rows: Rows
    last: Array  # the last token of its rows
    place: Array  # of each row in what it reads; where there is no row, of one that is
    to: Array  # of each row in what it writes; the place of no meaning where there is no row


def tile_of(q_ref: Any, keys_ref: Any, places: int, row_tiles: int, size: int, form: Form, begin: Array | int) -> Tile:
    """This program's; the grid is (segments of a part times tiles of rows, key/value heads, batch)."""
    at, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    local, number = apart(at, row_tiles)
    segment = begin + local
    groups = q_ref.shape[2] // keys_ref.shape[1]
    rows = rows_of(number, size, kv_head, groups, form)
    last = jnp.minimum((number * size + size - 1) // groups, form.stride - 1)
    place = jnp.minimum(rows.place(segment, form), places - 1)
    return Tile(segment, local, kv_head, batch, rows, last, place, jnp.where(rows.there, place, places - 1))
