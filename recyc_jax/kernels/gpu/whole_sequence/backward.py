"""Backward kernels of recycled attention in training on NVIDIA GPUs, in Pallas (Triton).

No two programs write to the same element: the gradients of selected keys are stored entry by entry, and then each block
of keys gathers the gradients of its own keys. The gradients are therefore bitwise reproducible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.whole_sequence import tiling
from recyc_jax.kernels.gpu.whole_sequence.tiling import Form, Tiles

SEGMENT = Tiles(rows=256, entries=64, warps=8, stages=2)
QUERIES = Tiles(rows=128, entries=64, warps=8)
KEYS = Tiles(rows=32, entries=128)
WIDE_KEYS = Tiles(rows=32, entries=64)  # for 128 lanes
NEW_KEYS = Tiles(rows=64, entries=64)
NEVER = 1e30
"""The normaliser of rows that attend to nothing, which makes their weights 0."""


class Cotangents(NamedTuple):
    """The cotangents of the outputs of all segments' tokens, and what the gradient of the softmax needs besides. No
    kernel reads the spare position, the last one of U."""

    out: Array  # [B, U, N, H]
    normaliser: Array  # float32 [B, U, N]: the log2 of the sum of exponentials
    sums: Array  # float32 [B, U, N]: output times cotangent, summed over H


class Entries(NamedTuple):
    """The gradients that the keys and values of a part's entries receive from the segments that selected them.
    Undefined for entries that hold no slot."""

    keys: Array  # [c, B, K, P, H]
    values: Array


def segment_gradients(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "M B K P"],
    leaves: Int[Array, "M B K P"] | None,
    cotangents: Cotangents,
    selecting_gradients: Float[Array, "B C N H"],
    query_gradients: Float[Array, "B U N H"],
    begin: Int[Array, ""],
    count: int,
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B U N H"], Entries]:
    """`query_gradients` with the gradients of the queries of `count` segments, from segment `begin` on, written into
    it, and the gradients of these segments' entries, in the dtype of the keys. The gradients of tokens that select are
    those of `selecting_gradients`. The gradients of segments' own keys are computed by `new_key_gradients`."""
    batch, _, heads, lanes = q.shape
    kv_heads, entries = keys.shape[1], slots.shape[3]
    rows = form.stride * (heads // kv_heads)
    # where a program holds all rows of a segment, one pass over the segment's entries computes all gradients
    with_entries = rows <= (SEGMENT.rows if lanes <= 64 else SEGMENT.rows // 2)
    tiles = SEGMENT if with_entries else QUERIES
    tiles = tiles._replace(rows=tiling.side(rows, tiles.rows), entries=tiling.side(entries, tiles.entries))
    row_tiles = pl.cdiv(rows, tiles.rows)
    shapes = 2 * [jax.ShapeDtypeStruct((count, batch, kv_heads, entries, lanes), keys.dtype)]
    *entry_gradients, out = triton_call.call(
        _segment_gradients,
        [q, keys, values, *cotangents, slots, *tiling.optional(leaves), selecting_gradients, jnp.reshape(begin, 1)],
        shapes if with_entries else [],
        (count * row_tiles, kv_heads, batch),
        "segments_back" if with_entries else "segments_queries_back",
        warps=tiles.warps,
        stages=tiles.stages,
        in_place=[query_gradients],
        form=form,
        dim=dim,
        tiles=tiles,
        row_tiles=row_tiles,
        with_entries=with_entries,
    )
    if with_entries:
        return out, Entries(*entry_gradients)
    return out, _entries(q, keys, values, slots, leaves, cotangents, begin, count, form, dim)


def _segment_gradients(*refs: Any, form: Form, dim: int, tiles: Tiles, row_tiles: int, with_entries: bool) -> None:
    """One program of `segment_gradients`: the queries of a tile of a segment's rows. `with_entries`, where the tile
    holds all rows of the segment, also the segment's entries."""
    q_ref, keys_ref, values_ref, cotangent_ref, normaliser_ref, sums_ref, *rest = refs
    *rest, out_ref = rest
    *list_refs, selecting_ref, begin_ref, _ = rest[:-2] if with_entries else rest
    entry_refs = rest[-2:] if with_entries else []
    width, lane = keys_ref.shape[2], jnp.arange(q_ref.shape[3])
    begin = plt.load(begin_ref.at[jnp.int32(0)])
    tile = tiling.tile_of(q_ref, keys_ref, out_ref.shape[1], row_tiles, tiles.rows, form, begin)
    rows, kv_head, batch = tile.rows, tile.kv_head, tile.batch
    token = form.first + tile.load_index
    q = plt.load(q_ref.at[batch, jnp.minimum(token, width - 1)[:, None], rows.head[:, None], lane[None, :]])
    cotangent = plt.load(cotangent_ref.at[batch, tile.load_index[:, None], rows.head[:, None], lane[None, :]])
    normaliser, sums = (plt.load(ref.at[batch, tile.load_index, rows.head]) for ref in (normaliser_ref, sums_ref))
    normaliser = jnp.where(rows.mask & (token < width) & (rows.token > 0), normaliser, NEVER)

    def add_tile(slots: Array, seen: Any, entries: Array | None, gradient: Array) -> Array:
        k, v = (plt.load(ref.at[batch, kv_head, slots[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
        weights = jnp.exp2(tiling.dot(q, k.T) * tiling.scale2(dim) - normaliser[:, None])
        weights = weights if seen is None else jnp.where(seen, weights, 0)
        logit_gradients = (weights * (tiling.dot(cotangent, v.T) - sums[:, None])).astype(k.dtype)
        if with_entries and entries is not None:
            # computed transposed, so that the tall sides of these products are the head dim, not the few entries
            key_gradients = tiling.dot(q.T, logit_gradients).T * dim**-0.5
            value_gradients = tiling.dot(cotangent.T, weights.astype(cotangent.dtype)).T
            for ref, gradients in zip(entry_refs, (key_gradients, value_gradients), strict=True):
                entry_tile = ref.at[tile.local, batch, kv_head, entries[:, None], lane[None, :]]
                plt.store(entry_tile, gradients.astype(ref.dtype))
        return gradient + tiling.dot(logit_gradients, k)

    zeros = jnp.zeros((tiles.rows, lane.size), jnp.float32)
    index = (tile.segment, batch, kv_head)
    gradient = tiling.over_entries(add_tile, zeros, list_refs, index, rows.token, tile.last, form, tiles.entries, width)
    segment_in_range = jnp.minimum(tile.segment, selecting_ref.shape[1] - 1)
    selecting_gradient = plt.load(selecting_ref.at[batch, segment_in_range, rows.head[:, None], lane[None, :]])
    out = jnp.where(
        (rows.token == 0)[:, None], selecting_gradient, (gradient * dim**-0.5).astype(selecting_gradient.dtype)
    )
    mask = jnp.broadcast_to(rows.mask[:, None], out.shape)
    plt.store(out_ref.at[batch, tile.store_index[:, None], rows.head[:, None], lane[None, :]], out, mask=mask)


class Pair(NamedTuple):
    """Gradients of a tile's keys and values."""

    keys: Array
    values: Array


def add_rows(
    pair: Pair,
    k: Float[Array, "E H"],
    v: Float[Array, "E H"],
    q: Float[Array, "M H"],
    cotangent: Float[Array, "M H"],
    normaliser: Float[Array, " M"],
    sums: Float[Array, " M"],
    seen: Array | None,  # [E, M]; None: rows see all of the keys, or no key where their normaliser is `NEVER`
    dim: int,
) -> Pair:
    """`pair` with the gradients from these rows added; the caller multiplies the keys' gradients by `dim**-0.5`."""
    weights = jnp.exp2(tiling.dot(k, q.T) * tiling.scale2(dim) - normaliser[None, :])
    weights = weights if seen is None else jnp.where(seen, weights, 0)
    value_gradients = pair.values + tiling.dot(weights.astype(cotangent.dtype), cotangent)
    logit_gradients = weights * (tiling.dot(v, cotangent.T) - sums[None, :])
    return Pair(pair.keys + tiling.dot(logit_gradients.astype(q.dtype), q), value_gradients)


def new_key_gradients(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    cotangents: Cotangents,
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B K U H"], Float[Array, "B K U H"]]:
    """The gradients that the keys and values of segments' tokens receive from their own segment, float32."""
    batch, tokens = cotangents.out.shape[:2]
    kv_heads = keys.shape[1]
    tiles = NEW_KEYS._replace(entries=tiling.side(form.stride, NEW_KEYS.entries))
    blocks, count = pl.cdiv(form.stride, tiles.entries), (tokens - 1) // form.stride
    key_gradients, value_gradients = triton_call.call(
        _new_key_gradients,
        [q, keys, values, *cotangents],
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
    return key_gradients, value_gradients


def _new_key_gradients(*refs: Any, form: Form, dim: int, tiles: Tiles, blocks: int) -> None:
    """One program of `new_key_gradients`: a tile of a segment's tokens."""
    _, keys_ref, values_ref, *_, key_gradients_ref, value_gradients_ref = refs
    program, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    segment, number = tiling.div_rem(program, blocks)
    width, lane = keys_ref.shape[2], jnp.arange(keys_ref.shape[3])
    key_token = number * tiles.entries + jnp.arange(tiles.entries)
    slot = jnp.minimum(form.first + segment * form.stride + key_token, width - 1)
    k, v = (plt.load(ref.at[batch, kv_head, slot[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
    pair = _over_rows(
        refs,
        (segment, kv_head, batch),
        k,
        v,
        lambda token: tiling.new_seen(key_token[:, None], token[None, :], form),
        (number * tiles.entries, form.stride),
        form,
        dim,
        tiles,
    )
    is_token = key_token < form.stride
    store_index = jnp.where(is_token, segment * form.stride + key_token, key_gradients_ref.shape[2] - 1)
    for ref, gradients in ((key_gradients_ref, pair.keys * dim**-0.5), (value_gradients_ref, pair.values)):
        mask = jnp.broadcast_to(is_token[:, None], gradients.shape)
        plt.store(ref.at[batch, kv_head, store_index[:, None], lane[None, :]], gradients, mask=mask)


def _over_rows(
    refs: Any,
    index: tuple[Array, Array, Array],  # (segment, key/value head, batch)
    k: Array,
    v: Array,
    seen_by: Callable[[Array], Array | None],
    tokens: tuple[Array | int, Array | int],
    form: Form,
    dim: int,
    tiles: Tiles,
) -> Pair:
    """The gradients that a tile of keys and values receives from a segment's tokens `tokens[0]` to `tokens[1] - 1`; the
    keys' gradients still lack the factor `dim**-0.5`. `seen_by(token [M])` says which of the keys these tokens attend
    to, [E, M], or None for all. The segment's first token, which selects, adds nothing."""
    q_ref, keys_ref, _, cotangent_ref, normaliser_ref, sums_ref = refs[:6]
    segment, kv_head, batch = index
    groups, width, lane = q_ref.shape[2] // keys_ref.shape[1], keys_ref.shape[2], jnp.arange(q_ref.shape[3])

    def add_tile(number: Array, pair: Pair) -> Pair:
        rows = tiling.rows_of(number, tiles.rows, kv_head, groups, form)
        position = rows.position(segment, form)
        token = form.first + position
        token_in_range = jnp.minimum(token, width - 1)
        q = plt.load(q_ref.at[batch, token_in_range[:, None], rows.head[:, None], lane[None, :]])
        cotangent = plt.load(cotangent_ref.at[batch, position[:, None], rows.head[:, None], lane[None, :]])
        normaliser, sums = (plt.load(ref.at[batch, position, rows.head]) for ref in (normaliser_ref, sums_ref))
        normaliser = jnp.where(rows.mask & (token < width) & (rows.token > 0), normaliser, NEVER)
        return add_rows(pair, k, v, q, cotangent, normaliser, sums, seen_by(rows.token), dim)

    zeros = jnp.zeros(k.shape, jnp.float32)
    begin, end = tokens
    end = (end * groups + tiles.rows - 1) // tiles.rows
    return lax.fori_loop(begin * groups // tiles.rows, end, add_tile, Pair(zeros, zeros))


def _entries(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "C B K P"],
    leaves: Int[Array, "C B K P"] | None,
    cotangents: Cotangents,
    begin: Int[Array, ""],
    count: int,
    form: Form,
    dim: int,
) -> Entries:
    """The entries' gradients of `segment_gradients`, for segments of more rows than a program holds."""
    _, batch, kv_heads, entries = slots.shape
    tiles = KEYS if q.shape[3] <= 64 else WIDE_KEYS
    tiles = tiles._replace(entries=tiling.side(entries, tiles.entries))
    blocks = entries // tiles.entries
    key_gradients, value_gradients = triton_call.call(
        _entry_gradients,
        [q, keys, values, *cotangents, slots, *tiling.optional(leaves), jnp.reshape(begin, 1)],
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
    return Entries(key_gradients, value_gradients)


def _entry_gradients(*refs: Any, form: Form, dim: int, tiles: Tiles, blocks: int) -> None:
    """One program of `_entries`: a tile of a segment's entries."""
    _, keys_ref, values_ref, _, _, _, slots_ref, *leaves_ref, begin_ref, key_gradients_ref, value_gradients_ref = refs
    program, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    local, number = tiling.div_rem(program, blocks)
    segment = plt.load(begin_ref.at[jnp.int32(0)]) + local
    width, lane = keys_ref.shape[2], jnp.arange(keys_ref.shape[3])
    entry = number * tiles.entries + jnp.arange(tiles.entries)
    slot = plt.load(slots_ref.at[segment, batch, kv_head, entry])
    leaves = plt.load(leaves_ref[0].at[segment, batch, kv_head, entry]) if leaves_ref else None
    slot_in_range = jnp.minimum(slot, width - 1)
    k, v = (plt.load(ref.at[batch, kv_head, slot_in_range[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))

    def seen_by(token: Array) -> Array | None:
        # entries that hold no slot need no mask: `gathering.gathered` does not read their gradients
        return None if leaves is None else token[None, :] <= leaves[:, None]

    # entries that hold a slot come before those that hold none, and segments that pad the last part hold no slot: where
    # the tile's first entry holds none, the loop is empty
    first_slot = plt.load(slots_ref.at[segment, batch, kv_head, number * tiles.entries])
    end = form.stride * (first_slot < width).astype(jnp.int32)  # Triton's lowering of `where` needs an array
    pair = _over_rows(refs, (segment, kv_head, batch), k, v, seen_by, (0, end), form, dim, tiles)
    for ref, gradients in ((key_gradients_ref, pair.keys * dim**-0.5), (value_gradients_ref, pair.values)):
        plt.store(ref.at[local, batch, kv_head, entry[:, None], lane[None, :]], gradients.astype(ref.dtype))
