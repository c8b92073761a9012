"""Kernels of recycled attention in training on NVIDIA GPUs: gradients of the tokens that select, in Pallas (Triton).

The tokens that select attend to all tokens up to themselves, and follow each other every `stride` tokens. A program
computes the gradients of a tile of their queries, or the gradients of a tile of keys and values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.whole_sequence import tiling
from recyc_jax.kernels.gpu.whole_sequence.backward import NEVER, Cotangents, Pair, add_rows
from recyc_jax.kernels.gpu.whole_sequence.tiling import Form, Tiles

SELECTING = Tiles(rows=64, entries=64)


def query_gradients(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    cotangents: Cotangents,
    form: Form,
    dim: int,
) -> Float[Array, "B C N H"]:
    """The gradients of the queries of the tokens that select; `cotangents` are those of these tokens, [B, C, ...]."""
    batch, count, heads, lanes = selecting.shape
    tiles = SELECTING._replace(rows=tiling.side(count, SELECTING.rows))
    blocks = pl.cdiv(count, tiles.rows)
    (out,) = triton_call.call(
        _query_gradients,
        [selecting, keys, values, *cotangents],
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
    cotangent_ref: Any,
    normaliser_ref: Any,
    sums_ref: Any,
    out_ref: Any,
    *,
    form: Form,
    dim: int,
    tiles: Tiles,
) -> None:
    """One program of `query_gradients`: a tile of tokens that select, for one head."""
    number, head, batch = (pl.program_id(axis) for axis in range(3))
    kv_head, width = head // (q_ref.shape[2] // keys_ref.shape[1]), keys_ref.shape[2]
    lane, lanes = jnp.arange(q_ref.shape[3]), jnp.arange(tiles.entries)
    segment = number * tiles.rows + jnp.arange(tiles.rows)
    segment_in_range = jnp.minimum(segment, q_ref.shape[1] - 1)
    token = form.first + segment_in_range * form.stride
    q, cotangent = (
        plt.load(ref.at[batch, segment_in_range[:, None], head, lane[None, :]]) for ref in (q_ref, cotangent_ref)
    )
    normaliser, sums = (plt.load(ref.at[batch, segment_in_range, head]) for ref in (normaliser_ref, sums_ref))

    def add_block(block: Array, gradient: Array) -> Array:
        slot = block * tiles.entries + lanes
        slot_in_range = jnp.minimum(slot, width - 1)
        k, v = (
            plt.load(ref.at[batch, kv_head, slot_in_range[:, None], lane[None, :]]) for ref in (keys_ref, values_ref)
        )
        seen = slot[None, :] <= token[:, None]
        weights = jnp.where(seen, jnp.exp2(tiling.dot(q, k.T) * tiling.scale2(dim) - normaliser[:, None]), 0)
        logit_gradients = weights * (tiling.dot(cotangent, v.T) - sums[:, None])
        return gradient + tiling.dot(logit_gradients.astype(k.dtype), k)

    last = jnp.minimum(form.first + (number * tiles.rows + tiles.rows - 1) * form.stride, width - 1)
    zeros = jnp.zeros((tiles.rows, lane.size), jnp.float32)
    gradient = lax.fori_loop(0, last // tiles.entries + 1, add_block, zeros) * dim**-0.5
    plt.store(out_ref.at[batch, segment[:, None], head, lane[None, :]], gradient.astype(out_ref.dtype))


def key_gradients(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    values: Float[Array, "B K T H"],
    cotangents: Cotangents,
    new_gradients: tuple[Array, Array],  # from `new_key_gradients`
    form: Form,
    dim: int,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """The gradients that all keys and values receive from the tokens that select, with `new_gradients` added, float32.
    `cotangents` are those of the tokens that select, [B, C, ...]. S is T rounded up to whole tiles."""
    batch, kv_heads, width, lanes = keys.shape
    tiles = SELECTING._replace(
        rows=tiling.side(selecting.shape[1], SELECTING.rows), entries=tiling.side(width, SELECTING.entries)
    )
    blocks = pl.cdiv(width, tiles.entries)
    total_key_gradients, total_value_gradients = triton_call.call(
        _key_gradients,
        [selecting, keys, values, *cotangents, *new_gradients],
        2 * [jax.ShapeDtypeStruct((batch, kv_heads, blocks * tiles.entries, lanes), jnp.float32)],
        (blocks, kv_heads, batch),
        "selecting_keys_back",
        warps=tiles.warps,
        stages=tiles.stages,
        form=form,
        dim=dim,
        tiles=tiles,
    )
    return total_key_gradients, total_value_gradients


def _key_gradients(
    q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    cotangent_ref: Any,
    normaliser_ref: Any,
    sums_ref: Any,
    new_keys_ref: Any,
    new_values_ref: Any,
    key_gradients_ref: Any,
    value_gradients_ref: Any,
    *,
    form: Form,
    dim: int,
    tiles: Tiles,
) -> None:
    """One program of `key_gradients`: a tile of keys."""
    block, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    count, groups, width = q_ref.shape[1], q_ref.shape[2] // keys_ref.shape[1], keys_ref.shape[2]
    lane, slot = jnp.arange(q_ref.shape[3]), block * tiles.entries + jnp.arange(tiles.entries)
    slot_in_range = jnp.minimum(slot, width - 1)
    k, v = (plt.load(ref.at[batch, kv_head, slot_in_range[:, None], lane[None, :]]) for ref in (keys_ref, values_ref))
    row_tiles = pl.cdiv(count, tiles.rows)
    # the first tile with a token that selects and sees any of these keys
    begin = jnp.maximum(block * tiles.entries - form.first + form.stride - 1, 0) // form.stride // tiles.rows

    def add_tile(tile_and_group: Array, pair: Pair) -> Pair:
        number, group = tiling.div_rem(tile_and_group, groups)
        number, head = begin + number, kv_head * groups + group
        segment = number * tiles.rows + jnp.arange(tiles.rows)
        segment_in_range = jnp.minimum(segment, count - 1)
        q, cotangent = (
            plt.load(ref.at[batch, segment_in_range[:, None], head, lane[None, :]]) for ref in (q_ref, cotangent_ref)
        )
        normaliser, sums = (plt.load(ref.at[batch, segment_in_range, head]) for ref in (normaliser_ref, sums_ref))
        token = form.first + segment * form.stride
        normaliser = jnp.where(segment < count, normaliser, NEVER)
        return add_rows(pair, k, v, q, cotangent, normaliser, sums, slot[:, None] <= token[None, :], dim)

    zeros = jnp.zeros(k.shape, jnp.float32)
    pair = lax.fori_loop(0, jnp.maximum(row_tiles - begin, 0) * groups, add_tile, Pair(zeros, zeros))
    position = slot - form.first
    is_new = (position >= 0) & (slot < width)
    position = jnp.where(is_new, position, 0)
    for ref, new_ref, gradients in (
        (key_gradients_ref, new_keys_ref, pair.keys * dim**-0.5),
        (value_gradients_ref, new_values_ref, pair.values),
    ):
        mask = jnp.broadcast_to(is_new[:, None], gradients.shape)
        new_gradients = plt.load(new_ref.at[batch, kv_head, position[:, None], lane[None, :]], mask=mask, other=0)
        plt.store(ref.at[batch, kv_head, slot[:, None], lane[None, :]], gradients + new_gradients)
