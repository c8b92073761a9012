"""Kernels of recycled attention in training on NVIDIA GPUs, backward, in Pallas (Triton).

No two programs write to one place: gradients of selected keys are written down entry by entry, and each block of keys then
gathers its own. So they are the same bits every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.attention import training_tiles_gpu as tiled
from recyc_jax.attention import triton
from recyc_jax.attention.training_tiles_gpu import Form, Tiles

SEGMENT = Tiles(rows=256, entries=64, warps=8, stages=2)
QUERIES = Tiles(rows=128, entries=64, warps=8)
KEYS = Tiles(rows=32, entries=128)
WIDE_KEYS = Tiles(rows=32, entries=64)  # for 128 lanes
NEW_KEYS = Tiles(rows=64, entries=64)
GATHERED = Tiles(entries=32, warps=2)
RUN = 8
"""Entries of a segment that a block of keys gathers at a time."""
NEVER = 1e30
"""The normaliser of rows that attend to nothing: their weights are 0."""


class Cotangents(NamedTuple):
    """What comes back to the tokens of all segments, and what goes into the gradient of softmax."""

    out: Array  # [B, U, N, H]
    normaliser: Array  # float32 [B, U, N], base 2
    sums: Array  # float32 [B, U, N]: output times cotangent, summed up. Nothing reads the last place of the three


class Entries(NamedTuple):
    """What the keys and values of a part's entries receive from the segments that selected them. Where an entry holds no
    slot, anything may stand."""

    keys: Array  # [c, B, K, P, H]
    values: Array


def segment_gradients(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "C B K P"],
    leaves: Int[Array, "C B K P"] | None,
    back: Cotangents,
    of_selecting: Float[Array, "B C N H"],
    of_queries: Float[Array, "B U N H"],
    begin: Int[Array, ""],
    count: int,
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B U N H"], Entries]:
    """`of_queries` with the gradients of `count` segments' tokens from `begin` on written to it, those of tokens that
    select as they are given; and what these segments' entries receive, in the dtype of the keys. Segments' own keys receive
    theirs elsewhere (`new_key_gradients`)."""
    batch, _, heads, lanes = q.shape
    kv_heads, entries = keys.shape[1], slots.shape[3]
    rows = form.stride * (heads // kv_heads)
    # where a program holds all of a segment's rows, one pass over its entries makes all gradients
    together = rows <= (SEGMENT.rows if lanes <= 64 else SEGMENT.rows // 2)
    tiles = SEGMENT if together else QUERIES
    tiles = tiles._replace(rows=tiled.side(rows, tiles.rows), entries=tiled.side(entries, tiles.entries))
    row_tiles = pl.cdiv(rows, tiles.rows)
    shapes = 2 * [jax.ShapeDtypeStruct((count, batch, kv_heads, entries, lanes), keys.dtype)]
    *listed, out = triton.call(
        _segment_gradients,
        [q, keys, values, *back, slots, *tiled.given(leaves), of_selecting, jnp.reshape(begin, 1)],
        shapes if together else [],
        (count * row_tiles, kv_heads, batch),
        "segments_back" if together else "segments_queries_back",
        warps=tiles.warps,
        stages=tiles.stages,
        in_place=[of_queries],
        form=form,
        dim=dim,
        tiles=tiles,
        row_tiles=row_tiles,
        together=together,
    )
    if together:
        return out, Entries(*listed)
    return out, _entries(q, keys, values, slots, leaves, back, begin, count, form, dim)


def _segment_gradients(*refs: Any, form: Form, dim: int, tiles: Tiles, row_tiles: int, together: bool) -> None:
    """One program of `segment_gradients`: a tile of a segment's rows, which are all there are if entries are done too."""
    q_ref, keys_ref, values_ref, back_ref, normaliser_ref, sums_ref, *rest = refs
    *rest, out_ref = rest
    *lists, first_ref, begin_ref, _ = rest[:-2] if together else rest
    entry_refs = rest[-2:] if together else []
    width, lane = keys_ref.shape[2], jnp.arange(q_ref.shape[3])
    begin = plt.load(begin_ref.at[jnp.int32(0)])
    at = tiled.tile_of(q_ref, keys_ref, out_ref.shape[1], row_tiles, tiles.rows, form, begin)
    rows, kv_head, batch = at.rows, at.kv_head, at.batch
    token = form.first + at.place
    q = plt.load(q_ref.at[batch, jnp.minimum(token, width - 1)[:, None], rows.head[:, None], lane[None, :]])
    back = plt.load(back_ref.at[batch, at.place[:, None], rows.head[:, None], lane[None, :]])
    normaliser, sums = (plt.load(ref.at[batch, at.place, rows.head]) for ref in (normaliser_ref, sums_ref))
    normaliser = jnp.where(rows.there & (token < width) & (rows.token > 0), normaliser, NEVER)

    def step(slots: Array, seen: Any, entries: Array | None, gradient: Array) -> Array:
        k, v = (plt.load(ref.at[batch, kv_head, slots[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
        weights = jnp.exp2(tiled.dot(q, k.T) * tiled.scale2(dim) - normaliser[:, None])
        weights = weights if seen is None else jnp.where(seen, weights, 0)
        of_logits = (weights * (tiled.dot(back, v.T) - sums[:, None])).astype(k.dtype)
        if together and entries is not None:
            # turned around: these products' tall sides are the head dim, not the few entries
            of_keys = tiled.dot(q.T, of_logits).T * dim**-0.5
            of_values = tiled.dot(back.T, weights.astype(back.dtype)).T
            for ref, of_entries in zip(entry_refs, (of_keys, of_values), strict=True):
                to = ref.at[at.local, batch, kv_head, entries[:, None], lane[None, :]]
                plt.store(to, of_entries.astype(ref.dtype))
        return gradient + tiled.dot(of_logits, k)

    start = jnp.zeros((tiles.rows, lane.size), jnp.float32)
    where = (at.segment, batch, kv_head)
    gradient = tiled.over_entries(step, start, lists, where, rows.token, at.last, form, tiles.entries, width)
    near = jnp.minimum(at.segment, first_ref.shape[1] - 1)
    given = plt.load(first_ref.at[batch, near, rows.head[:, None], lane[None, :]])
    out = jnp.where((rows.token == 0)[:, None], given, (gradient * dim**-0.5).astype(given.dtype))
    there = jnp.broadcast_to(rows.there[:, None], out.shape)
    plt.store(out_ref.at[batch, at.to[:, None], rows.head[:, None], lane[None, :]], out, mask=there)


class Pair(NamedTuple):
    """Gradients of a tile's keys and values."""

    keys: Array
    values: Array


def add_rows(
    pair: Pair,
    k: Float[Array, "E H"],
    v: Float[Array, "E H"],
    q: Float[Array, "M H"],
    back: Float[Array, "M H"],
    normaliser: Float[Array, " M"],
    sums: Float[Array, " M"],
    seen: Array | None,  # [E, M]; None: rows see all of the keys, or nothing where their normaliser is `NEVER`
    dim: int,
) -> Pair:
    """What these rows add to the gradients of keys and values; those of keys want `dim**-0.5` at the end."""
    weights = jnp.exp2(tiled.dot(k, q.T) * tiled.scale2(dim) - normaliser[None, :])
    weights = weights if seen is None else jnp.where(seen, weights, 0)
    of_values = pair.values + tiled.dot(weights.astype(back.dtype), back)
    of_logits = weights * (tiled.dot(v, back.T) - sums[None, :])
    return Pair(pair.keys + tiled.dot(of_logits.astype(q.dtype), q), of_values)


def new_key_gradients(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    back: Cotangents,
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B K U H"], Float[Array, "B K U H"]]:
    """What keys and values of segments' tokens receive from their own segment, float32."""
    batch, tokens = back.out.shape[:2]
    kv_heads = keys.shape[1]
    tiles = NEW_KEYS._replace(entries=tiled.side(form.stride, NEW_KEYS.entries))
    blocks, count = pl.cdiv(form.stride, tiles.entries), (tokens - 1) // form.stride
    of_keys, of_values = triton.call(
        _new_key_gradients,
        [q, keys, values, *back],
        2 * [jax.ShapeDtypeStruct((batch, kv_heads, tokens, q.shape[3]), jnp.float32)],
        (count * blocks, kv_heads, batch),
        "new_keys_back",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles,
        blocks=blocks,
    )
    return of_keys, of_values


def _new_key_gradients(*refs: Any, form: Form, dim: int, tiles: Tiles, blocks: int) -> None:
    """One program of `new_key_gradients`: a tile of a segment's tokens."""
    _, keys_ref, values_ref, *_, of_keys_ref, of_values_ref = refs
    at, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    segment, number = tiled.apart(at, blocks)
    width, lane = keys_ref.shape[2], jnp.arange(keys_ref.shape[3])
    since = number * tiles.entries + jnp.arange(tiles.entries)
    slot = jnp.minimum(form.first + segment * form.stride + since, width - 1)
    k, v = (plt.load(ref.at[batch, kv_head, slot[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
    pair = _over_rows(
        refs,
        (segment, kv_head, batch),
        k,
        v,
        lambda token: tiled.new_seen(since[:, None], token[None, :], form),
        (number * tiles.entries, form.stride),
        form,
        dim,
        tiles,
    )
    there = since < form.stride
    to = jnp.where(there, segment * form.stride + since, of_keys_ref.shape[2] - 1)
    for ref, gradient in ((of_keys_ref, pair.keys * dim**-0.5), (of_values_ref, pair.values)):
        mask = jnp.broadcast_to(there[:, None], gradient.shape)
        plt.store(ref.at[batch, kv_head, to[:, None], lane[None, :]], gradient, mask=mask)


def _over_rows(
    refs: Any,
    where: tuple[Array, Array, Array],
    k: Array,
    v: Array,
    seen_by: Callable[[Array], Array | None],
    tokens: tuple[Array | int, Array | int],
    form: Form,
    dim: int,
    tiles: Tiles,
) -> Pair:
    """What a tile of keys and values receives from a segment's tokens, from the first to before the second of `tokens`;
    `seen_by(tokens [M])` says which of the keys they attend to, [E, M], or None for all. Its first token doesn't count."""
    q_ref, keys_ref, _, back_ref, normaliser_ref, sums_ref = refs[:6]
    segment, kv_head, batch = where
    groups, width, lane = q_ref.shape[2] // keys_ref.shape[1], keys_ref.shape[2], jnp.arange(q_ref.shape[3])

    def step(number: Array, pair: Pair) -> Pair:
        rows = tiled.rows_of(number, tiles.rows, kv_head, groups, form)
        place = rows.place(segment, form)
        token = form.first + place
        near = jnp.minimum(token, width - 1)
        q = plt.load(q_ref.at[batch, near[:, None], rows.head[:, None], lane[None, :]])
        back = plt.load(back_ref.at[batch, place[:, None], rows.head[:, None], lane[None, :]])
        normaliser, sums = (plt.load(ref.at[batch, place, rows.head]) for ref in (normaliser_ref, sums_ref))
        normaliser = jnp.where(rows.there & (token < width) & (rows.token > 0), normaliser, NEVER)
        return add_rows(pair, k, v, q, back, normaliser, sums, seen_by(rows.token), dim)

    nothing = jnp.zeros(k.shape, jnp.float32)
    begin, end = tokens
    end = (end * groups + tiles.rows - 1) // tiles.rows
    return lax.fori_loop(begin * groups // tiles.rows, end, step, Pair(nothing, nothing))


def _entries(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "C B K P"],
    leaves: Int[Array, "C B K P"] | None,
    back: Cotangents,
    begin: Int[Array, ""],
    count: int,
    form: Form,
    dim: int,
) -> Entries:
    """The entries' part of `segment_gradients` where segments have more rows than a program takes."""
    _, batch, kv_heads, entries = slots.shape
    tiles = KEYS if q.shape[3] <= 64 else WIDE_KEYS
    tiles = tiles._replace(entries=tiled.side(entries, tiles.entries))
    blocks = entries // tiles.entries
    of_keys, of_values = triton.call(
        _entry_gradients,
        [q, keys, values, *back, slots, *tiled.given(leaves), jnp.reshape(begin, 1)],
        2 * [jax.ShapeDtypeStruct((count, batch, kv_heads, entries, q.shape[3]), keys.dtype)],
        (count * blocks, kv_heads, batch),
        "entries_back",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles,
        blocks=blocks,
    )
    return Entries(of_keys, of_values)


def _entry_gradients(*refs: Any, form: Form, dim: int, tiles: Tiles, blocks: int) -> None:
    """One program of `_entries`: a tile of a segment's entries."""
    _, keys_ref, values_ref, _, _, _, slots_ref, *leaves_ref, begin_ref, of_keys_ref, of_values_ref = refs
    at, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    local, number = tiled.apart(at, blocks)
    segment = plt.load(begin_ref.at[jnp.int32(0)]) + local
    width, lane = keys_ref.shape[2], jnp.arange(keys_ref.shape[3])
    entry = number * tiles.entries + jnp.arange(tiles.entries)
    slot = plt.load(slots_ref.at[segment, batch, kv_head, entry])
    leaves = plt.load(leaves_ref[0].at[segment, batch, kv_head, entry]) if leaves_ref else None
    near = jnp.minimum(slot, width - 1)
    k, v = (plt.load(ref.at[batch, kv_head, near[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))

    def seen_by(token: Array) -> Array | None:
        # what entries without a slot receive is not gathered
        return None if leaves is None else token[None, :] <= leaves[:, None]

    # entries that hold slots stand before those that don't, and segments that fill the last part hold none
    first_slot = plt.load(slots_ref.at[segment, batch, kv_head, number * tiles.entries])
    end = form.stride * (first_slot < width).astype(jnp.int32)  # Triton's lowering of `where` wants an array
    pair = _over_rows(refs, (segment, kv_head, batch), k, v, seen_by, (0, end), form, dim, tiles)
    for ref, gradient in ((of_keys_ref, pair.keys * dim**-0.5), (of_values_ref, pair.values)):
        plt.store(ref.at[local, batch, kv_head, entry[:, None], lane[None, :]], gradient.astype(ref.dtype))


def gathered(
    gradients: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    listed: Entries,
    slots: Int[Array, "c B K P"],
    begin: Int[Array, ""],
    form: Form,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """`gradients` of keys and values with those of the entries of segments from `begin` on added to their slots. Slots
    stand in order, `NOWHERE` last."""
    batch, kv_heads, width, _ = gradients[0].shape
    size = tiled.side(width, GATHERED.entries)
    blocks = width // size
    edges = size * jnp.arange(blocks + 1, dtype=jnp.int32)
    rows = slots.reshape(-1, slots.shape[-1])
    # the first entry of each block of keys, and of the one after the last
    firsts = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"), (0, None))(rows, edges)
    of_keys, of_values = triton.call(
        _gathered,
        [*listed, slots, firsts.astype(jnp.int32).reshape(*slots.shape[:-1], blocks + 1), jnp.reshape(begin, 1)],
        [],
        (blocks, kv_heads, batch),
        "gather_keys_back",
        warps=GATHERED.warps,
        stages=GATHERED.stages,
        in_place=gradients,
        form=form,
        size=size,
    )
    return of_keys, of_values


def _gathered(
    keys_ref: Any,
    values_ref: Any,
    slots_ref: Any,
    firsts_ref: Any,
    begin_ref: Any,
    old_keys_ref: Any,
    old_values_ref: Any,
    of_keys_ref: Any,
    of_values_ref: Any,
    *,
    form: Form,
    size: int,
) -> None:
    """One program of `gathered`: a block of keys. It takes the runs of a few segments' entries at a time, and a product
    with zeros and ones brings each to its key."""
    block, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    count, entries = slots_ref.shape[0], slots_ref.shape[3]
    at_once = max(1, size // RUN)
    lane, taken = jnp.arange(keys_ref.shape[4]), jnp.arange(at_once * RUN)
    of_run, in_run = tiled.apart(taken, RUN)
    key = block * size + jnp.arange(size)

    def visit(number: Array, pair: Pair) -> Pair:
        segment = number * at_once + of_run
        near = jnp.minimum(segment, count - 1)
        begin = plt.load(firsts_ref.at[near, batch, kv_head, block])
        end = plt.load(firsts_ref.at[near, batch, kv_head, block + 1])
        end = jnp.where(segment < count, end, begin)

        def turn(number: Array, pair: Pair) -> Pair:
            entry = begin + number * RUN + in_run
            inside, near_entry = entry < end, jnp.minimum(entry, entries - 1)
            slot = plt.load(slots_ref.at[near, batch, kv_head, near_entry], mask=inside, other=-1)
            mine = (slot[None, :] == key[:, None]).astype(keys_ref.dtype)
            mask = jnp.broadcast_to(inside[:, None], (taken.size, lane.size))
            k, v = (
                plt.load(ref.at[near[:, None], batch, kv_head, near_entry[:, None], lane[None, :]], mask=mask, other=0)
                for ref in (keys_ref, values_ref)
            )
            return Pair(pair.keys + tiled.dot(mine, k), pair.values + tiled.dot(mine, v))

        return lax.fori_loop(0, (jnp.max(end - begin) + RUN - 1) // RUN, turn, pair)

    old = (plt.load(ref.at[batch, kv_head, key[:, None], lane[None, :]]) for ref in (old_keys_ref, old_values_ref))
    # the first segment that may have selected any of these keys
    first = jnp.maximum(block * size - form.first + form.stride - 1, 0) // form.stride
    first = jnp.maximum(first - plt.load(begin_ref.at[jnp.int32(0)]), 0) // at_once
    pair = lax.fori_loop(first, pl.cdiv(count, at_once), visit, Pair(*old))
    for ref, gradient in ((of_keys_ref, pair.keys), (of_values_ref, pair.values)):
        plt.store(ref.at[batch, kv_head, key[:, None], lane[None, :]], gradient)
