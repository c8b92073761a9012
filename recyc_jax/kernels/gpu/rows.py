"""What the kernels of a decode step's decoder layers share: the rows of the residual stream, loads and stores."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

from recyc_jax.kernels.gpu import triton_call

LEAST_ROWS = 16
"""Rows of the smallest tile that Triton multiplies."""


def tile_rows(rows: int) -> int:
    """Rows of the tile that holds so many rows of x."""
    return max(LEAST_ROWS, pl.next_power_of_2(rows))


class Norm(NamedTuple):
    """A norm's parameters."""

    factors: Array  # [D]: what it multiplies by; float32 if it multiplies before it rounds
    eps: float


class Stream(NamedTuple):
    """The residual stream between two products, with what the norm that follows needs."""

    x: Array  # [B, T, D]
    scaled: Array | None = None  # [B, T, D]: x times that norm's scale; None where no norm follows
    squares: Array | None = None  # float32 [B, T, P]: the squares of x, summed over P parts of D


def spare() -> int:
    """Spare rows at the end of an output: the interpreter writes where a store is masked, which must not be a live
    row."""
    return int(triton_call.INTERPRET)


def times(x: Array, factors: Array) -> Array:
    """x times the factors, in x's dtype; in float32 before it is rounded if the factors are float32."""
    return x * factors if factors.dtype == x.dtype else (x.astype(jnp.float32) * factors).astype(x.dtype)


def times_normed(normed: Array, factors: Array, dtype: Any) -> Array:
    """What a norm has divided (float32) times its factors, in `dtype`; rounded before unless the factors are float32."""
    return ((normed.astype(dtype) if factors.dtype == dtype else normed) * factors).astype(dtype)


def store(ref: Any, index: tuple[Any, ...], values: Array) -> None:
    """Store the rows that the output has."""
    rows, row = ref.shape[0] - spare(), jnp.arange(values.shape[0])[:, None]
    store_row = jnp.minimum(row, ref.shape[0] - 1)
    plt.store(ref.at[(store_row, *index)], values, mask=jnp.broadcast_to(row < rows, values.shape))


def load_slots(slot_ref: Any, row_in_range: Array) -> Array:
    """The slot of each row's new token [ROWS, 1], or one of all rows."""
    return plt.load(slot_ref.at[jnp.int32(0)]) if slot_ref.shape[0] == 1 else plt.load(slot_ref.at[row_in_range])


def store_in_cache(ref: Any, rows: int, head: Array, slot: Array, lane: Array, values: Array) -> None:
    """Store rows in the cache, which may be a part of one: rows with a slot outside of it are left out. One by one when
    interpreted, since a masked store would overwrite what is there."""
    last = ref.shape[2] - 1
    if not triton_call.INTERPRET:
        row = jnp.arange(values.shape[0])[:, None]
        mask = jnp.broadcast_to((row < rows) & (slot >= 0) & (slot <= last), values.shape)
        plt.store(ref.at[jnp.minimum(row, rows - 1), head, jnp.clip(slot, 0, last), lane], values, mask=mask)
        return
    for row in range(rows):
        its_slot = slot if slot.ndim == 0 else slot[row, 0]
        at = ref.at[jnp.int32(row), head, jnp.clip(its_slot, 0, last), lane]
        is_here = (its_slot >= 0) & (its_slot <= last)
        plt.store(at, jnp.where(is_here, values[row : row + 1], plt.load(at)))


def store_scaled(
    out: Array, scale: Array, column: Array, is_column: Array | None, scaled_ref: Any, squares_ref: Any
) -> None:
    """Store what the norm that follows needs of some columns of the stream."""
    store(scaled_ref, (column[None, :],), times(out, scale[None, :]))
    wide = out.astype(jnp.float32)
    if is_column is not None:
        wide = jnp.where(is_column[None, :], wide, 0)
    row, rows = jnp.arange(out.shape[0]), squares_ref.shape[0] - spare()
    store_row = jnp.minimum(row, squares_ref.shape[0] - 1)
    plt.store(squares_ref.at[store_row, pl.program_id(0)], jnp.sum(wide * wide, axis=1), mask=row < rows)


def load_squares(squares_ref: Any, row_in_range: Array) -> Array:
    """Each row's squares, summed over parts: float32 [ROWS, parts]."""
    count = squares_ref.shape[1]
    part = jnp.arange(pl.next_power_of_2(count))
    is_part = jnp.broadcast_to(part < count, (row_in_range.shape[0], part.size))
    return plt.load(squares_ref.at[row_in_range, jnp.minimum(part, count - 1)[None, :]], mask=is_part, other=0)


def in_range(column: Array, width: int) -> tuple[Array, Array | None]:
    """The columns clamped to the matrix, and which of them lie inside it. Where the width is a multiple of the columns
    nothing is clamped or masked (None): Triton would no longer see that columns are adjacent, and load them one by
    one."""
    return (column, None) if width % column.size == 0 else (jnp.minimum(column, width - 1), column < width)
