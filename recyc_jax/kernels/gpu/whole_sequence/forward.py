"""Forward kernels of recycled attention in training on NVIDIA GPUs, in Pallas (Triton): the attention of segments, and
the scores by which tokens select."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.whole_sequence import tiling
from recyc_jax.kernels.gpu.whole_sequence.tiling import MASKED, Form, Tiles

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
    """The outputs of the tokens of all segments, and the log2 of their sums of exponentials. Those of the tokens that
    select are `first_out` and `first_normaliser`."""
    batch, _, heads, lanes = q.shape
    tiles = FORWARD if lanes <= 64 else WIDE_FORWARD
    tiles = tiles._replace(rows=tiling.side(form.stride * (heads // keys.shape[1]), tiles.rows))
    tokens = slots.shape[0] * form.stride + 1
    shapes = [
        jax.ShapeDtypeStruct((batch, tokens, heads, lanes), q.dtype),
        jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32),
    ]
    row_tiles = pl.cdiv(form.stride * (heads // keys.shape[1]), tiles.rows)
    out, normaliser = triton_call.call(
        _segments,
        [q, keys, values, slots, *tiling.optional(leaves), first_out, first_normaliser],
        shapes,
        (slots.shape[0] * row_tiles, keys.shape[1], batch),
        "recycled_segments",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles._replace(entries=tiling.side(slots.shape[3], tiles.entries)),
        row_tiles=row_tiles,
    )
    return out, normaliser


def _segments(*refs: Any, form: Form, dim: int, tiles: Tiles, row_tiles: int) -> None:
    """One program of `segments`: a tile of a segment's rows."""
    q_ref, keys_ref, values_ref, *list_refs, first_out_ref, first_normaliser_ref, out_ref, normaliser_ref = refs
    width, lane = keys_ref.shape[2], jnp.arange(q_ref.shape[3])
    tile = tiling.tile_of(q_ref, keys_ref, out_ref.shape[1], row_tiles, tiles.rows, form, 0)
    rows, segment, kv_head, batch = tile.rows, tile.segment, tile.kv_head, tile.batch
    token = jnp.minimum(form.first + tile.load_index, width - 1)
    q = plt.load(q_ref.at[batch, token[:, None], rows.head[:, None], lane[None, :]])

    def attend_tile(slots: Array, seen: Any, entries: Array | None, carry: Any) -> Any:
        peak, total, out = carry
        k = plt.load(keys_ref.at[batch, kv_head, slots[:, None], lane[None, :]])
        logits = tiling.dot(q, k.T) * tiling.scale2(dim)
        logits = logits if seen is None else jnp.where(seen, logits, MASKED)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        shrink = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits - new_peak[:, None])
        v = plt.load(values_ref.at[batch, kv_head, slots[:, None], lane[None, :]])
        tile_out = tiling.dot(weights.astype(v.dtype), v)
        return new_peak, total * shrink + jnp.sum(weights, axis=1), out * shrink[:, None] + tile_out

    carry = (
        jnp.full(tiles.rows, MASKED, jnp.float32),
        jnp.zeros(tiles.rows, jnp.float32),
        jnp.zeros((tiles.rows, lane.size), jnp.float32),
    )
    index = (segment, batch, kv_head)
    peak, total, out = tiling.over_entries(
        attend_tile, carry, list_refs, index, rows.token, tile.last, form, tiles.entries, width
    )
    # the loop let a segment's first token, which selects, see the selected keys; its output over all keys is known
    is_first = (rows.token == 0) & rows.mask
    first_out = plt.load(first_out_ref.at[batch, segment, rows.head[:, None], lane[None, :]])
    first_normaliser = plt.load(first_normaliser_ref.at[batch, segment, rows.head])
    out = jnp.where(is_first[:, None], first_out, (out / total[:, None]).astype(first_out.dtype))
    normaliser = jnp.where(is_first, first_normaliser, peak + jnp.log2(total))
    mask = jnp.broadcast_to(rows.mask[:, None], out.shape)
    plt.store(out_ref.at[batch, tile.store_index[:, None], rows.head[:, None], lane[None, :]], out, mask=mask)
    plt.store(normaliser_ref.at[batch, tile.store_index, rows.head], normaliser, mask=rows.mask)


def scores(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    normaliser: Float[Array, "B C N"],
    begin: Int[Array, ""],
    count: int,
    form: Form,
    dim: int,
) -> Float[Array, "c B K S"]:
    """The score of each key for `count` tokens that select, from the `begin`-th on: the maximum over a group's heads of
    logit minus normaliser, in base 2. That is the `selection.group_maximum` of the log-probabilities of
    `reference.full_with_log_probabilities`, times log2(e). -inf where a token does not see the key. S is T rounded up
    to whole tiles; `count` is a multiple of 16."""
    batch, kv_heads, width, _ = keys.shape
    tiles = SCORES._replace(rows=tiling.side(count, SCORES.rows), entries=tiling.side(width, SCORES.entries))
    padded = pl.cdiv(width, tiles.entries) * tiles.entries
    (out,) = triton_call.call(
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
    block, number, batch_and_head = (pl.program_id(axis) for axis in range(3))
    batch, kv_head = tiling.div_rem(batch_and_head, keys_ref.shape[1])
    groups, width = q_ref.shape[2] // keys_ref.shape[1], keys_ref.shape[2]
    lane, slot = jnp.arange(q_ref.shape[3]), block * tiles.entries + jnp.arange(tiles.entries)
    local = number * tiles.rows + jnp.arange(tiles.rows)
    begin = plt.load(begin_ref.at[jnp.int32(0)])
    segment = begin + local
    segment_in_range = jnp.minimum(segment, q_ref.shape[1] - 1)
    token = form.first + segment * form.stride
    k = plt.load(keys_ref.at[batch, kv_head, jnp.minimum(slot, width - 1)[:, None], lane[None, :]])

    def add_head(group: Array, best: Array) -> Array:
        head = kv_head * groups + group
        q = plt.load(q_ref.at[batch, segment_in_range[:, None], head, lane[None, :]])
        normaliser = plt.load(normaliser_ref.at[batch, segment_in_range, head])
        return jnp.maximum(best, tiling.dot(q, k.T) * tiling.scale2(dim) - normaliser[:, None])

    # none of these tokens sees a tile of keys after the last of them: then no product is computed
    last = form.first + (begin + number * tiles.rows + tiles.rows - 1) * form.stride
    is_any_seen = (block * tiles.entries <= last).astype(jnp.int32)
    unseen = jnp.full((tiles.rows, tiles.entries), -jnp.inf, jnp.float32)
    best = lax.fori_loop(0, groups * is_any_seen, add_head, unseen)
    seen = (slot[None, :] <= token[:, None]) & (slot < width)[None, :]
    out = jnp.where(seen, best, -jnp.inf)
    plt.store(out_ref.at[local[:, None], batch, kv_head, slot[None, :]], out)
