"""Kernels of recycled attention in training on NVIDIA GPUs: gradients of the tokens that select, in Pallas (Triton).

They attend to all tokens up to themselves, and stand `stride` apart. A program takes a tile of them for their own
gradients, or a tile of keys for those of keys and values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from recyc_jax.attention import training_tiles_gpu as tiled
from recyc_jax.attention import triton
from recyc_jax.attention.training_backward_gpu import NEVER, Cotangents, Pair, add_rows
from recyc_jax.attention.training_tiles_gpu import Form, Tiles

SELECTING = Tiles(rows=64, entries=64)


def query_gradients(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    back: Cotangents,
    form: Form,
    dim: int,
) -> Float[Array, "B C N H"]:
    """Of the tokens that select; `back` is theirs, [B, C, ...]."""
    batch, count, heads, lanes = selecting.shape
    tiles = SELECTING._replace(rows=tiled.side(count, SELECTING.rows))
    blocks = pl.cdiv(count, tiles.rows)
    (out,) = triton.call(
        _query_gradients,
        [selecting, keys, values, *back],
        [jax.ShapeDtypeStruct((batch, blocks * tiles.rows, heads, lanes), selecting.dtype)],
        (blocks, heads, batch),
        "selecting_queries_back",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles,
    )
    return out[:, :count]


def _query_gradients(
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    back_ref: Any,
    normaliser_ref: Any,
    sums_ref: Any,
    out_ref: Any,
    *,
    form: Form,
    dim: int,
    tiles: Tiles,
) -> None:
    """One program of `query_gradients`."""
    number, head, batch = (pl.program_id(axis) for axis in range(3))
    kv_head, width = head // (q_ref.shape[2] // keys_ref.shape[1]), keys_ref.shape[2]
    lane, lanes = jnp.arange(q_ref.shape[3]), jnp.arange(tiles.entries)
    segment = number * tiles.rows + jnp.arange(tiles.rows)
    near = jnp.minimum(segment, q_ref.shape[1] - 1)
    token = form.first + near * form.stride
    q, back = (plt.load(ref.at[batch, near[:, None], head, lane[None, :]]) for ref in (q_ref, back_ref))
    normaliser, sums = (plt.load(ref.at[batch, near, head]) for ref in (normaliser_ref, sums_ref))

    def step(block: Array, gradient: Array) -> Array:
        slot = block * tiles.entries + lanes
        at = jnp.minimum(slot, width - 1)
        k, v = (plt.load(ref.at[batch, kv_head, at[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
        seen = slot[None, :] <= token[:, None]
        weights = jnp.where(seen, jnp.exp2(tiled.dot(q, k.T) * tiled.scale2(dim) - normaliser[:, None]), 0)
        of_logits = weights * (tiled.dot(back, v.T) - sums[:, None])
        return gradient + tiled.dot(of_logits.astype(k.dtype), k)

    last = jnp.minimum(form.first + (number * tiles.rows + tiles.rows - 1) * form.stride, width - 1)
    start = jnp.zeros((tiles.rows, lane.size), jnp.float32)
    gradient = lax.fori_loop(0, last // tiles.entries + 1, step, start) * dim**-0.5
    plt.store(out_ref.at[batch, segment[:, None], head, lane[None, :]], gradient.astype(out_ref.dtype))


def key_gradients(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    back: Cotangents,
    new: tuple[Array, Array],  # of `new_key_gradients`
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """What all keys and values receive from the tokens that select (`back` is theirs, [B, C, ...]), with `new` added;
    float32. S is T in whole tiles."""
    batch, kv_heads, width, lanes = keys.shape
    tiles = SELECTING._replace(
        rows=tiled.side(selecting.shape[1], SELECTING.rows), entries=tiled.side(width, SELECTING.entries)
    )
    blocks = pl.cdiv(width, tiles.entries)
    of_keys, of_values = triton.call(
        _key_gradients,
        [selecting, keys, values, *back, *new],
        2 * [jax.ShapeDtypeStruct((batch, kv_heads, blocks * tiles.entries, lanes), jnp.float32)],
        (blocks, kv_heads, batch),
        "selecting_keys_back",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles,
    )
    return of_keys, of_values


def _key_gradients(
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    back_ref: Any,
    normaliser_ref: Any,
    sums_ref: Any,
    new_keys_ref: Any,
    new_values_ref: Any,
    of_keys_ref: Any,
    of_values_ref: Any,
    *,
    form: Form,
    dim: int,
    tiles: Tiles,
) -> None:
    """One program of `key_gradients`: a tile of keys."""
    block, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    count, groups, width = q_ref.shape[1], q_ref.shape[2] // keys_ref.shape[1], keys_ref.shape[2]
    lane, slot = jnp.arange(q_ref.shape[3]), block * tiles.entries + jnp.arange(tiles.entries)
    near_slot = jnp.minimum(slot, width - 1)
    k, v = (plt.load(ref.at[batch, kv_head, near_slot[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
    row_tiles = pl.cdiv(count, tiles.rows)
    # the first token that selects and sees any of these keys
    begin = jnp.maximum(block * tiles.entries - form.first + form.stride - 1, 0) // form.stride // tiles.rows

    def step(turn: Array, pair: Pair) -> Pair:
        number, group = tiled.apart(turn, groups)
        number, head = begin + number, kv_head * groups + group
        segment = number * tiles.rows + jnp.arange(tiles.rows)
        near = jnp.minimum(segment, count - 1)
        q, back = (plt.load(ref.at[batch, near[:, None], head, lane[None, :]]) for ref in (q_ref, back_ref))
        normaliser, sums = (plt.load(ref.at[batch, near, head]) for ref in (normaliser_ref, sums_ref))
        token = form.first + segment * form.stride
        normaliser = jnp.where(segment < count, normaliser, NEVER)
        return add_rows(pair, k, v, q, back, normaliser, sums, slot[:, None] <= token[None, :], dim)

    nothing = jnp.zeros(k.shape, jnp.float32)
    pair = lax.fori_loop(0, jnp.maximum(row_tiles - begin, 0) * groups, step, Pair(nothing, nothing))
    place = slot - form.first
    new = (place >= 0) & (slot < width)
    place = jnp.where(new, place, 0)
    for ref, new_ref, gradient in (
        (of_keys_ref, new_keys_ref, pair.keys * dim**-0.5),
        (of_values_ref, new_values_ref, pair.values),
    ):
        mask = jnp.broadcast_to(new[:, None], gradient.shape)
        more = plt.load(new_ref.at[batch, kv_head, place[:, None], lane[None, :]], mask=mask, other=0)
        plt.store(ref.at[batch, kv_head, slot[:, None], lane[None, :]], gradient + more)
