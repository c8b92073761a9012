"""Kernels of recycled attention in training on NVIDIA GPUs, forward, in Pallas (Triton): outputs, and what to select."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.attention import training_tiles_gpu as tiled
from recyc_jax.attention import triton
from recyc_jax.attention.training_tiles_gpu import MASKED, Form, Tiles

FORWARD = Tiles(rows=128, entries=128, stages=2)
WIDE_FORWARD = Tiles(rows=128, stages=2)  # for 128 lanes
SCORES = Tiles(rows=64, entries=128, stages=2)


def segments(
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    slots: Int[Array, "C B K P"],
    leaves: Int[Array, "C B K P"] | None,
    first_out: Float[Array, "B C N H"],
    first_normaliser: Float[Array, "B C N"],
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B U N H"], Float[Array, "B U N"]]:
    """The outputs of all segments' tokens, and the log2 of their sums of exponentials; those of tokens that select are
    given."""
    batch, _, heads, lanes = q.shape
    tiles = FORWARD if lanes <= 64 else WIDE_FORWARD
    tiles = tiles._replace(rows=tiled.side(form.stride * (heads // keys.shape[1]), tiles.rows))
    tokens = slots.shape[0] * form.stride + 1
    shapes = [
        jax.ShapeDtypeStruct((batch, tokens, heads, lanes), q.dtype),
        jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
    ]
    row_tiles = pl.cdiv(form.stride * (heads // keys.shape[1]), tiles.rows)
    out, normaliser = triton.call(
        _segments,
        [q, keys, values, slots, *tiled.given(leaves), first_out, first_normaliser],
        shapes,
        (slots.shape[0] * row_tiles, keys.shape[1], batch),
        "recycled_segments",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles._replace(entries=tiled.side(slots.shape[3], tiles.entries)),
        row_tiles=row_tiles,
    )
    return out, normaliser


def _segments(*refs: Any, form: Form, dim: int, tiles: Tiles, row_tiles: int) -> None:
    """One program of `segments`."""
    q_ref, keys_ref, values_ref, *lists, first_ref, first_normaliser_ref, out_ref, normaliser_ref = refs
    width, lane = keys_ref.shape[2], jnp.arange(q_ref.shape[3])
    at = tiled.tile_of(q_ref, keys_ref, out_ref.shape[1], row_tiles, tiles.rows, form, 0)
    rows, segment, kv_head, batch = at.rows, at.segment, at.kv_head, at.batch
    token = jnp.minimum(form.first + at.place, width - 1)
    q = plt.load(q_ref.at[batch, token[:, None], rows.head[:, None], lane[None, :]])

    def step(slots: Array, seen: Any, entries: Array | None, carry: Any) -> Any:
        peak, total, out = carry
        k = plt.load(keys_ref.at[batch, kv_head, slots[:, None], lane[None, :]])
        logits = tiled.dot(q, k.T) * tiled.scale2(dim)
        logits = logits if seen is None else jnp.where(seen, logits, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits - new_peak[:, None])
        v = plt.load(values_ref.at[batch, kv_head, slots[:, None], lane[None, :]])
        here = tiled.dot(weights.astype(v.dtype), v)
        return new_peak, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + here

    carry = (
        jnp.full(tiles.rows, MASKED, jnp.float32),
        jnp.zeros(tiles.rows, jnp.float32),
        jnp.zeros((tiles.rows, lane.size), jnp.float32),
    )
    where = (segment, batch, kv_head)
    peak, total, out = tiled.over_entries(step, carry, lists, where, rows.token, at.last, form, tiles.entries, width)
    # a segment's first token saw what is not its own here: what it gives is known
    selects = (rows.token == 0) & rows.there
    given = plt.load(first_ref.at[batch, segment, rows.head[:, None], lane[None, :]])
    given_normaliser = plt.load(first_normaliser_ref.at[batch, segment, rows.head])
    out = jnp.where(selects[:, None], given, (out / total[:, None]).astype(given.dtype))
    normaliser = jnp.where(selects, given_normaliser, peak + jnp.log2(total))
    there = jnp.broadcast_to(rows.there[:, None], out.shape)
    plt.store(out_ref.at[batch, at.to[:, None], rows.head[:, None], lane[None, :]], out, mask=there)
    plt.store(normaliser_ref.at[batch, at.to, rows.head], normaliser, mask=rows.there)


def scores(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    normaliser: Float[Array, "B C N"],
    begin: Int[Array, ""],
    count: int,
    form: Form,
    dim: int,
) -> Float[Array, "c B K S"]:
    """Of `count` tokens that select, from the `begin`th on: the largest logit of a group's heads less its normaliser, in
    base 2 (what `reference.full_with_scores` ranks by, times log2(e)); -inf where a key is not seen. S is T in whole tiles;
    `count` is a multiple of 16."""
    batch, kv_heads, width, _ = keys.shape
    tiles = SCORES._replace(rows=tiled.side(count, SCORES.rows), entries=tiled.side(width, SCORES.entries))
    padded = pl.cdiv(width, tiles.entries) * tiles.entries
    (out,) = triton.call(
        _scores,
        [selecting, keys, normaliser, jnp.reshape(begin, 1)],
        [jax.ShapeDtypeStruct((count, batch, kv_heads, padded), jnp.float32)],
        (padded // tiles.entries, count // tiles.rows, batch * kv_heads),
        "selection_scores",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles,
    )
    return out


def _scores(
    q_ref: Any, keys_ref: Any, normaliser_ref: Any, begin_ref: Any, out_ref: Any, *, form: Form, dim: int, tiles: Tiles
) -> None:
    """One program of `scores`: a tile of tokens that select and of keys."""
    block, number, head_at = (pl.program_id(axis) for axis in range(3))
    batch, kv_head = tiled.apart(head_at, keys_ref.shape[1])
    groups, width = q_ref.shape[2] // keys_ref.shape[1], keys_ref.shape[2]
    lane, slot = jnp.arange(q_ref.shape[3]), block * tiles.entries + jnp.arange(tiles.entries)
    local = number * tiles.rows + jnp.arange(tiles.rows)
    begin = plt.load(begin_ref.at[jnp.int32(0)])
    segment = begin + local
    near = jnp.minimum(segment, q_ref.shape[1] - 1)
    token = form.first + segment * form.stride
    k = plt.load(keys_ref.at[batch, kv_head, jnp.minimum(slot, width - 1)[:, None], lane[None, :]])

    def add(group: Array, best: Array) -> Array:
        head = kv_head * groups + group
        q = plt.load(q_ref.at[batch, near[:, None], head, lane[None, :]])
        normaliser = plt.load(normaliser_ref.at[batch, near, head])
        return jnp.maximum(best, tiled.dot(q, k.T) * tiled.scale2(dim) - normaliser[:, None])

    # nobody sees a tile of keys behind the last of these tokens
    last = form.first + (begin + number * tiles.rows + tiles.rows - 1) * form.stride
    some = (block * tiles.entries <= last).astype(jnp.int32)
    nothing = jnp.full((tiles.rows, tiles.entries), -jnp.inf, jnp.float32)
    best = lax.fori_loop(0, groups * some, add, nothing)
    seen = (slot[None, :] <= token[:, None]) & (slot < width)[None, :]
    out = jnp.where(seen, best, -jnp.inf)
    plt.store(out_ref.at[local[:, None], batch, kv_head, slot[None, :]], out)
