"""Shared parts of the kernels of recycled attention in training: tiles of queries, and the loop over the entries that
their queries attend to.

A segment is a token that selects and the tokens after it, up to the next token that selects. Its queries attend to the
keys that it selected, which kernels read by index from the array of all keys, and to the keys of the segment's own
tokens. Letters, in addition to those of `recyc_jax/attention/whole_sequence.py`: M rows of a tile (queries of one
segment and one key/value head, token by token), E entries (selected or new keys) of a tile, P entries of a segment with
those that pad the last tile, U tokens of all segments and one spare position. Logits are in base 2, i.e. multiplied by
log2(e), because the kernels use `exp2`."""

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
"""The slot of an entry that holds no slot. It sorts after all slots."""
MASKED = -1e30
LEAST = 16
"""The smallest side of a tile that Triton multiplies."""


class Form(NamedTuple):
    """The parameters of the recycled form that the kernels need. Static."""

    first: int  # the first token that selects
    stride: int
    ranks: int  # entries of a selection that may hold a slot
    evict: bool


class Tiles(NamedTuple):
    """The sides of a kernel's tiles, its warps, and its pipeline stages (tiles in flight or in use). The values that
    the kernels use are among the faster ones of those that were timed on an H100, at 32768 tokens and head dims of 64
    and 128 (docs/results/training_attention.md)."""

    rows: int = 128
    entries: int = 64
    warps: int = 4
    stages: int = 3


def side(size: int, most: int) -> int:
    """The side of a tile over `size` elements: a power of two, from `LEAST` to `most`."""
    return min(most, max(LEAST, pl.next_power_of_2(size)))


class Rows(NamedTuple):
    """A tile of a segment's rows."""

    token: Array  # [M]: counted from the segment's first token; masked rows repeat the segment's last token
    head: Array  # [M]: the query head
    mask: Array  # bool [M]: whether the segment has this row

    def position(self, segment: Array, form: Form) -> Array:
        """The rows' tokens, counted from the first token that selects."""
        return segment * form.stride + self.token


def div_rem(index: Int[Array, "*i"], size: int) -> tuple[Int[Array, "*i"], Int[Array, "*i"]]:
    """Quotient and remainder of an index that is not negative, divided by `size`."""
    if size == 1:
        return index, jnp.zeros_like(index)
    sizes = jnp.full_like(index, size)
    return lax.div(index, sizes), lax.rem(index, sizes)


def rows_of(number: Array, size: int, kv_head: Array, groups: int, form: Form) -> Rows:
    """The `number`-th tile of `size` rows of a segment."""
    row = number * size + jnp.arange(size)
    token, group = div_rem(row, groups)
    return Rows(jnp.minimum(token, form.stride - 1), kv_head * groups + group, token < form.stride)


def over_entries(
    step: Callable[[Array, Any, Array | None, Any], Any],
    carry: Any,
    list_refs: Sequence[Any],  # slots and, where ranked keys leave the set, the last token that sees each of them
    index: tuple[Array, Array, Array],  # (segment, batch, key/value head)
    token: Int[Array, " M"],
    last: Array,
    form: Form,
    size: int,
    width: int,
) -> Any:
    """The carry after `step(slots [E], seen [M, E], entries [E], carry)` for each tile of the keys that the tokens of a
    segment, up to token `last`, see: the keys that the segment selected, then those of its own tokens. `seen` is None
    where all tokens see all keys of the tile, `entries` is None where the keys are those of the segment's own tokens.
    Token 0 of a segment sees the keys that it selected. A segment whose entries hold no slot at all, as the segments
    that pad a part, sees nothing."""
    slots_ref, *leaves_ref = list_refs
    segment = index[0]
    selects, lanes = form.first + segment * form.stride, jnp.arange(size)
    has_slots = (plt.load(slots_ref.at[(*index, jnp.int32(0))]) < width).astype(jnp.int32)

    def visit_selected(number: Array, carry: Any, is_full: bool) -> Any:
        seen: Any
        entry = number * size + lanes
        slot = plt.load(slots_ref.at[(*index, entry)])
        seen = None if is_full else jnp.broadcast_to((slot < width)[None, :], (token.size, size))
        if leaves_ref:
            is_left = plt.load(leaves_ref[0].at[(*index, entry)])[None, :] >= token[:, None]
            seen = is_left if seen is None else seen & is_left
        return step(slot if is_full else jnp.minimum(slot, width - 1), seen, entry, carry)

    def visit_new(number: Array, carry: Any) -> Any:
        key_token = 1 + number * size + lanes
        seen = new_seen(key_token[None], token[:, None], form)
        return step(jnp.minimum(selects + key_token, width - 1), seen, None, carry)

    # entries that hold a slot come before those that hold none
    entry_count = has_slots * jnp.minimum(form.ranks, selects + 1)
    full_tiles, tiles = entry_count // size, (entry_count + size - 1) // size
    carry = lax.fori_loop(0, full_tiles, functools.partial(visit_selected, is_full=True), carry)
    carry = lax.fori_loop(full_tiles, tiles, functools.partial(visit_selected, is_full=False), carry)
    return lax.fori_loop(0, has_slots * (last + size - 1) // size, visit_new, carry)


def new_seen(key_token: Array, token: Array, form: Form) -> Array:
    """Whether a segment's `token` attends to the segment's `key_token`, beside the selected keys. Both are counted from
    the segment's first token."""
    seen = (key_token > 0) & (key_token <= token)
    return seen & (key_token > token - form.ranks) if form.evict else seen


def dot(a: Array, b: Array) -> Array:
    """The matrix product of two tiles, float32; float32 tiles are not rounded to TF32."""
    return plt.dot(a, b, allow_tf32=False).astype(jnp.float32)


def scale2(dim: int) -> float:
    """The scale of logits in base 2."""
    return dim**-0.5 * math.log2(math.e)


def optional(leaves: Array | None) -> tuple[Array, ...]:
    """The inputs of a kernel for an array that may be absent."""
    return () if leaves is None else (leaves,)


class Tile(NamedTuple):
    """The place of a program that computes a tile of a segment's rows."""

    segment: Array
    local: Array  # the segment, counted from the first segment of its part
    kv_head: Array
    batch: Array
    rows: Rows
    last: Array  # the last token of the rows
    load_index: Array  # [M]: the rows' positions in the arrays that the program reads; of masked rows, a valid one
    store_index: Array  # [M]: the rows' positions in the arrays that it writes; of masked rows, the spare one


def tile_of(
    q_ref: Any, keys_ref: Any, positions: int, row_tiles: int, size: int, form: Form, begin: Array | int
) -> Tile:
    """The tile of this program in a grid of (segments of a part times tiles of rows, key/value heads, batch). `begin`
    is the first segment of the part, and the last of the `positions` of an output is the spare one."""
    program, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    local, number = div_rem(program, row_tiles)
    segment = begin + local
    groups = q_ref.shape[2] // keys_ref.shape[1]
    rows = rows_of(number, size, kv_head, groups, form)
    last = jnp.minimum((number * size + size - 1) // groups, form.stride - 1)
    load_index = jnp.minimum(rows.position(segment, form), positions - 1)
    return Tile(segment, local, kv_head, batch, rows, last, load_index, jnp.where(rows.mask, load_index, positions - 1))
