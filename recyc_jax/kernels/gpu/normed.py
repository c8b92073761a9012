"""Norms that need all of a matrix product before they can begin, as kernels of their own on NVIDIA GPUs: those of heads,
with what else makes heads of projections (`finished_heads`), and those after attention and feed-forward
(`added_normed`)."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.cache import LayerCache
from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.products import Linear, added
from recyc_jax.kernels.gpu.rows import (
    Norm,
    Stream,
    in_range,
    load_slots,
    load_squares,
    spare,
    store,
    store_in_cache,
    store_scaled,
    tile_rows,
    times_normed,
)
from recyc_jax.rope import Positions

NORMED = 512
"""Columns per program where a norm is added to the stream."""


def finished_heads(
    raw: Sequence[Float[Array, "B P _"]],
    norms: Sequence[Norm] | None,
    positions: Positions,
    cached: LayerCache,
    slot: Int[Array, ""] | Int[Array, " B"],
) -> tuple[Array, Array, LayerCache]:
    """As `to_heads`, from the projections `raw` of q, k and v, the sums over P. `norms` are those of q and k, over each
    head or over the whole projection by their size; None without."""
    keys, values = cached.keys, cached.values
    rows, dim, dtype = raw[0].shape[0], keys.shape[3], keys.dtype
    heads = [one.shape[2] // dim for one in raw]
    columns = dim & -dim  # the largest power of two that divides it
    arrays, rotation = [jnp.reshape(slot, -1), *raw], positions.rotation
    if rotation is not None:
        arrays += [one.reshape(rows, -1) for one in rotation]
    if positions.query_multiplier is not None:
        of_rows = jnp.asarray(positions.query_multiplier, jnp.float32)
        arrays.append(jnp.broadcast_to(jnp.reshape(of_rows, (-1, 1)), (rows, 1)))
    arrays += [norm.factors for norm in norms or ()]
    q_shape = jax.ShapeDtypeStruct((rows + spare(), heads[0], dim), dtype)
    q, q_before_rope, keys, values = triton_call.call(
        _finished,
        arrays,
        [q_shape, q_shape],
        (sum(heads) * dim // columns,),
        "finished_heads",
        warps=1,
        stages=1,
        in_place=(keys, values),
        rotated=rotation is not None,
        multiplied=positions.query_multiplier is not None,
        eps=norms[0].eps if norms else None,
        columns=columns,
        dim=dim,
    )
    return q[:rows, None], q_before_rope[:rows, None], cached.replaced(keys, values)


def _finished(
    slot_ref: Any,
    *refs: Any,
    rotated: bool,
    multiplied: bool,
    eps: float | None,
    columns: int,
    dim: int,
) -> None:
    """One program: some dimensions of one head."""
    raw_refs, refs = refs[:3], refs[3:]
    rotation_refs: tuple[Any, ...]
    rotation_refs, refs = (refs[:2], refs[2:]) if rotated else ((), refs)
    multiplier_ref, refs = (refs[0], refs[1:]) if multiplied else (None, refs)
    factor_refs, refs = (refs[:2], refs[2:]) if eps is not None else ((), refs)
    q_ref, q_before_rope_ref, keys_ref, values_ref = refs[2:]
    (rows, shares), blocks = raw_refs[0].shape[:2], dim // columns
    row_in_range = jnp.minimum(jnp.arange(tile_rows(rows)), rows - 1)[:, None]
    slot = load_slots(slot_ref, row_in_range)

    def of_head(number: int, head: Array, lane: Array) -> Array:
        """Dimensions of a head after its norm, in the model's dtype."""
        raw_ref = raw_refs[number]

        def load(lane: Array) -> Array:
            parts = [plt.load(raw_ref.at[row_in_range, share, lane[None, :]]) for share in range(shares)]
            return functools.reduce(operator.add, parts).astype(q_ref.dtype)

        x = load(head * dim + lane)
        if not factor_refs or number == 2:
            return x
        factor_ref = factor_refs[number]
        width = factor_ref.shape[0]  # of what is normed: one head, or all of them
        begin = jnp.int32(0) if width > dim else head * dim

        def add(block: Array, total: Array) -> Array:
            wide = load(begin + block * columns + jnp.arange(columns)).astype(jnp.float32)
            return total + jnp.sum(wide * wide, axis=1)

        squares = lax.fori_loop(0, width // columns, add, jnp.zeros(x.shape[0], jnp.float32))
        normed = x.astype(jnp.float32) * lax.rsqrt(squares / width + eps)[:, None]
        factors = plt.load(factor_ref.at[(head * dim if width > dim else 0) + lane])[None, :]
        return times_normed(normed, factors, x.dtype)

    first_program = 0
    head_counts = (q_ref.shape[1], keys_ref.shape[1], values_ref.shape[1])
    for number, heads in enumerate(head_counts):
        program = pl.program_id(0) - first_program

        def compute(number: int = number, program: Array = program) -> None:
            head, lane = program // blocks, program % blocks * columns + jnp.arange(columns)
            plain = of_head(number, head, lane)
            out = plain
            if rotated and number < 2:
                pairs = rotation_refs[0].shape[1]
                is_first, turns = lane < pairs, lane < 2 * pairs
                other_lane = jnp.where(turns, jnp.where(is_first, lane + pairs, lane - pairs), lane)
                pair = jnp.minimum(jnp.where(is_first, lane, lane - pairs), pairs - 1)
                cos, sin = (plt.load(ref.at[row_in_range, pair[None, :]]) for ref in rotation_refs)
                wide, other = plain.astype(jnp.float32), of_head(number, head, other_lane).astype(jnp.float32)
                turned = wide * cos + jnp.where(is_first[None, :], -other, other) * sin
                out = jnp.where(turns[None, :], turned, wide).astype(plain.dtype)
            if multiplier_ref is not None and number == 0:
                by = plt.load(multiplier_ref.at[row_in_range, jnp.zeros_like(lane)[None, :]])
                out = (out.astype(jnp.float32) * by).astype(plain.dtype)
            if number == 0:
                store(q_ref, (head, lane[None, :]), out)
                store(q_before_rope_ref, (head, lane[None, :]), plain)
            else:
                cache_ref = keys_ref if number == 1 else values_ref
                store_in_cache(cache_ref, rows, head, slot, lane[None, :], out)

        pl.when((program >= 0) & (program < heads * blocks))(compute)
        first_program += heads * blocks


def added_normed(
    x: Float[Array, "B T F"], linear: Linear, stream: Stream, norm: Norm, scale: Float[Array, " D"] | None
) -> Stream:
    """The stream with the norm of a projection of x added; `scale` is as in `added`."""
    # a first product leaves the projection and its squares, as if it were a stream that begins
    made = added(x, linear, Stream(jnp.zeros_like(stream.x)), jnp.ones(stream.x.shape[-1], stream.x.dtype))
    shape, width = stream.x.shape, stream.x.shape[-1]
    rows, columns = math.prod(shape[:-1]), min(NORMED, pl.next_power_of_2(width))
    blocks = pl.cdiv(width, columns)
    whole = jax.ShapeDtypeStruct((rows + spare(), blocks * columns), stream.x.dtype)
    shapes = [whole, whole, jax.ShapeDtypeStruct((rows + spare(), blocks), jnp.float32)]
    assert made.squares is not None
    read = [made.x, made.squares, stream.x]
    arrays = [one.reshape(rows, -1) for one in read] + [norm.factors, *(() if scale is None else (scale,))]
    options = {"columns": columns, "eps": norm.eps, "scaled": scale is not None}
    outputs = triton_call.call(
        _added_normed,
        arrays,
        shapes[: 1 if scale is None else 3],
        (blocks,),
        "added_norm",
        warps=4,
        stages=1,
        **options,
    )
    cut = [one[:rows, :width].reshape(shape) for one in outputs[:2]]
    if scale is None:
        return Stream(cut[0])
    return Stream(cut[0], cut[1], outputs[2][:rows].reshape(*shape[:-1], blocks))


def _added_normed(
    raw_ref: Any,
    raw_squares_ref: Any,
    residual_ref: Any,
    factors_ref: Any,
    *refs: Any,
    columns: int,
    eps: float,
    scaled: bool,
) -> None:
    """One program: some columns."""
    scale_ref, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    column, width = pl.program_id(0) * columns + jnp.arange(columns), residual_ref.shape[1]
    column_in_range, is_column = in_range(column, width)
    rows = residual_ref.shape[0]
    row_in_range = jnp.minimum(jnp.arange(tile_rows(rows)), rows - 1)[:, None]
    raw, residual = (plt.load(ref.at[row_in_range, column_in_range[None, :]]) for ref in (raw_ref, residual_ref))
    factors = plt.load(factors_ref.at[column_in_range])[None, :]
    squares = jnp.sum(load_squares(raw_squares_ref, row_in_range), axis=1)
    inverse_rms = lax.rsqrt(squares / width + eps)
    normed = times_normed(raw.astype(jnp.float32) * inverse_rms[:, None], factors, raw.dtype)
    out = (residual.astype(jnp.float32) + normed.astype(jnp.float32)).astype(residual.dtype)
    store(refs[0], (column[None, :],), out)
    if scale_ref is not None:
        store_scaled(out, plt.load(scale_ref.at[column_in_range]), column, is_column, refs[1], refs[2])
