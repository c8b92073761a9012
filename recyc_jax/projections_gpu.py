"""`projections` on NVIDIA GPUs for a few rows: a Pallas (Triton) kernel that reads every weight once, after one for a norm.

A program makes a few columns of the output from all of x, so nothing is put together afterwards; the next weights are on
their way while the last ones are multiplied. For more rows than `MOST_ROWS`, and over a mesh, whose axes XLA has to see, it
is the plain functions that run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from recyc_jax import projections, sharding
from recyc_jax.attention import triton
from recyc_jax.projections import Heads, Linear, Norm, ToHeads

MOST_ROWS = 16
"""Rows up to which the kernels run."""
ROWS = 16
"""Rows of a tile that Triton multiplies; x has fewer."""


class _Tile(NamedTuple):
    """How a kernel reads its matrices."""

    columns: int  # of a matrix that a program multiplies
    deep: int  # rows that it multiplies at a time
    warps: int = 4
    stages: int = 4  # how many times that many rows are on their way or at hand


HEADS = _Tile(32, 256, stages=3)
GATED = _Tile(128, 64)
ADDED = _Tile(32, 256)
PROGRAMS = 96
"""Where a matrix is so narrow that fewer programs than this would share it, each takes fewer columns."""
LEAST_COLUMNS = 16
LEAST_TOGETHER = 8
"""Columns of a matrix that have to lie side by side, or reading them takes too long: 16 bytes of bfloat16."""


def _spare() -> int:
    """Rows past the end of an output: the interpreter writes where a store is masked, and that must not be a live place."""
    return int(triton.INTERPRET)


def _columns(tile: _Tile, width: int) -> int:
    """Columns that a program takes of matrices that wide."""
    columns = tile.columns
    while columns > LEAST_COLUMNS and width // columns < PROGRAMS:
        columns //= 2
    return columns


def _runs(x: Array) -> bool:
    return math.prod(x.shape[:-1]) <= MOST_ROWS and sharding.unsplit()


def heads(
    x: Float[Array, "B T D"],
    norm: Norm,
    linears: ToHeads,
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    dim: int,
) -> Heads:
    """As `projections.heads`."""
    if not _runs(x):
        return projections.heads(x, norm, linears, cos, sin, dim)
    half = dim // 2
    rows = math.prod(x.shape[:-1])
    counts = [linear.kernel.shape[1] // dim for linear in linears]
    columns = math.gcd(_columns(HEADS, sum(counts) * half), half)
    if columns < LEAST_TOGETHER:
        return projections.heads(x, norm, linears, cos, sin, dim)
    arrays = [cos.reshape(rows, half), sin.reshape(rows, half)]
    shapes = [(rows + _spare(), count, dim) for count in (*counts, counts[0])]
    programs = sum(counts) * half // columns
    kernel = functools.partial(_heads, columns=columns)
    made = _call("heads_projections", kernel, _normed(x, norm), arrays, list(linears), shapes, programs, HEADS)
    q, k, v, plain_q = (one[:rows].reshape(*x.shape[:-1], -1, dim) for one in made)
    return Heads(q, k, v, plain_q)


def gated(x: Float[Array, "... D"], norm: Norm, gate: Linear, up: Linear) -> Float[Array, "... F"]:
    """As `projections.gated`."""
    if not _runs(x):
        return projections.gated(x, norm, gate, up)
    kernel = functools.partial(_gated, columns=_columns(GATED, gate.kernel.shape[1]))
    return _flat_call("gated_projections", kernel, _normed(x, norm), [], [gate, up], GATED)


def added(x: Float[Array, "... F"], linear: Linear, residual: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """As `projections.added`."""
    if not _runs(x):
        return projections.added(x, linear, residual)
    kernel = functools.partial(_added, columns=_columns(ADDED, linear.kernel.shape[1]))
    # named by what goes in: a profile tells a layer's two such products apart
    return _flat_call(
        f"added_projection_{x.shape[-1]}", kernel, x, [residual.reshape(-1, residual.shape[-1])], [linear], ADDED
    )


def _flat_call(
    name: str, kernel: Callable[..., None], x: Array, arrays: list[Array], linears: list[Linear], tile: _Tile
) -> Array:
    """One output, as wide as the matrices; the programs' columns may go beyond it."""
    width = linears[0].kernel.shape[1]
    columns = _columns(tile, width)
    blocks = pl.cdiv(width, columns)
    rows = math.prod(x.shape[:-1])
    (out,) = _call(name, kernel, x, arrays, linears, [(rows + _spare(), blocks * columns)], blocks, tile)
    return out[:rows, :width].reshape(*x.shape[:-1], width)


def _call(
    name: str,
    kernel: Callable[..., None],
    x: Array,
    arrays: list[Array],
    linears: list[Linear],
    shapes: list[tuple[int, ...]],
    programs: int,
    tile: _Tile,
) -> list[Array]:
    """The kernel's outputs of these shapes. It gets x as rows, the arrays, and the matrices with their biases."""
    rows, features = math.prod(x.shape[:-1]), x.shape[-1]
    weights = [array for linear in linears for array in linear if array is not None]
    read = [x.reshape(rows, features), *arrays, *weights]
    biased = [linear.bias is not None for linear in linears]

    def unpacked(x_ref: Any, *refs: Any) -> None:
        others, rest = refs[: len(arrays)], iter(refs[len(arrays) :])
        matrices = [(next(rest), next(rest) if bias else None) for bias in biased]
        kernel(_Rows(x_ref, max(16, min(tile.deep, pl.next_power_of_2(features)))), *others, matrices, *rest)

    return pl.pallas_call(
        unpacked,
        out_shape=[jax.ShapeDtypeStruct(shape, x.dtype) for shape in shapes],
        grid=(programs,),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * sum(linear.kernel.size for linear in linears),
            transcendentals=0,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in read),
        ),
        interpret=triton.INTERPRET,
        name=name,
    )(*read)


class _Rows(NamedTuple):
    """x in a kernel."""

    ref: Any  # [rows, D]
    deep: int  # features taken at a time


def _heads(
    x: _Rows,
    cos_ref: Any,
    sin_ref: Any,
    matrices: list[Any],
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    plain_q_ref: Any,
    *,
    columns: int,
) -> None:
    """One program: some columns of the first half of a head and those of the second that turn with them."""
    half = cos_ref.shape[1]
    blocks = half // columns
    first = 0
    for (kernel_ref, bias_ref), out_ref, plain_ref in zip(
        matrices, (q_ref, k_ref, v_ref), (plain_q_ref, None, None), strict=True
    ):
        program = pl.program_id(0) - first
        count = out_ref.shape[1] * blocks

        def make(
            kernel_ref: Any = kernel_ref,
            bias_ref: Any = bias_ref,
            out_ref: Any = out_ref,
            plain_ref: Any = plain_ref,
            program: Array = program,
        ) -> None:
            head = program // blocks
            lane = program % blocks * columns + jnp.arange(columns)
            at = [head * 2 * half + lane, head * 2 * half + half + lane]
            parts = [(kernel_ref, bias_ref, one) for one in at]
            plain = [one.astype(out_ref.dtype) for one in _products(x, parts)]
            rows = cos_ref.shape[0]
            row = jnp.arange(ROWS)[:, None]
            near_row = jnp.minimum(row, rows - 1)
            turned = plain
            if out_ref is not v_ref:
                cos, sin = (plt.load(ref.at[near_row, lane[None, :]]) for ref in (cos_ref, sin_ref))
                low, high = (one.astype(jnp.float32) for one in plain)
                turned = [one.astype(out_ref.dtype) for one in (low * cos - high * sin, high * cos + low * sin)]
            for number in range(2):
                to = (number * half + lane)[None, :]
                _store(out_ref, (head, to), turned[number])
                if plain_ref is not None:
                    _store(plain_ref, (head, to), plain[number])

        pl.when((program >= 0) & (program < count))(make)
        first += count


def _gated(x: _Rows, matrices: list[Any], out_ref: Any, *, columns: int) -> None:
    """One program: some columns of both."""
    column = pl.program_id(0) * columns + jnp.arange(columns)
    gate, up = _products(x, [(*matrix, column) for matrix in matrices])
    _store(out_ref, (column[None, :],), (gate / (1 + jnp.exp(-gate)) * up).astype(out_ref.dtype))


def _added(x: _Rows, residual_ref: Any, matrices: list[Any], out_ref: Any, *, columns: int) -> None:
    """One program: some columns."""
    column = pl.program_id(0) * columns + jnp.arange(columns)
    near, _ = _inside(column, residual_ref.shape[1])
    (made,) = _products(x, [(*matrix, column) for matrix in matrices])
    near_row = jnp.minimum(jnp.arange(ROWS), residual_ref.shape[0] - 1)[:, None]
    residual = plt.load(residual_ref.at[near_row, near[None, :]]).astype(jnp.float32)
    _store(out_ref, (column[None, :],), (residual + made).astype(out_ref.dtype))


def _store(ref: Any, at: tuple[Any, ...], values: Array) -> None:
    """Store the first rows."""
    rows, row = ref.shape[0] - _spare(), jnp.arange(ROWS)[:, None]
    plt.store(
        ref.at[(jnp.minimum(row, ref.shape[0] - 1), *at)], values, mask=jnp.broadcast_to(row < rows, values.shape)
    )


def _inside(column: Array, width: int) -> tuple[Array, Array | None]:
    """The columns brought back into the matrix, and which of them lay there; where all do, nothing is said of them: Triton
    would see no longer that they lie side by side, and load them one by one."""
    return (column, None) if width % column.size == 0 else (jnp.minimum(column, width - 1), column < width)


def _products(x: _Rows, parts: list[tuple[Any, Any, Array]]) -> list[Array]:
    """x times the named columns of each matrix, the bias added: float32 [ROWS, columns] each; what lies past x's rows means
    nothing."""
    rows, features = x.ref.shape
    row, lanes = jnp.arange(ROWS), jnp.arange(x.deep)
    near_row, is_row = jnp.minimum(row, rows - 1)[:, None], (row < rows)[:, None]
    whole = features % x.deep == 0

    def visit(turn: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        feature = turn * x.deep + lanes
        inside = feature < features
        near = feature if whole else jnp.minimum(feature, features - 1)
        here = plt.load(x.ref.at[near_row, near[None, :]], mask=is_row & inside[None, :], other=0)
        more = []
        for total, (kernel_ref, _, column) in zip(sums, parts, strict=True):
            at, is_column = _inside(column, kernel_ref.shape[1])
            tile = kernel_ref.at[near[:, None], at[None, :]]
            if whole and is_column is None:
                weights = plt.load(tile)
            else:
                wanted = inside[:, None] if is_column is None else inside[:, None] & is_column[None, :]
                weights = plt.load(tile, mask=jnp.broadcast_to(wanted, (lanes.size, column.size)), other=0)
            more.append(total + plt.dot(here, weights, allow_tf32=False))
        return tuple(more)

    zeros = tuple(jnp.zeros((ROWS, column.size), jnp.float32) for _, _, column in parts)
    made = list(lax.fori_loop(0, pl.cdiv(features, x.deep), visit, zeros))
    for number, (kernel_ref, bias_ref, column) in enumerate(parts):
        if bias_ref is not None:
            at, _ = _inside(column, kernel_ref.shape[1])
            made[number] = made[number] + plt.load(bias_ref.at[at]).astype(jnp.float32)[None, :]
    return made


def _normed(x: Array, norm: Norm) -> Array:
    """As `projections.rms_norm`. Within the products it would have every program wait for it."""
    features = x.shape[-1]
    rows = x.reshape(-1, features)
    lanes = pl.next_power_of_2(features)
    out = pl.pallas_call(
        functools.partial(_norm, eps=norm.eps),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], lanes), x.dtype),
        grid=(rows.shape[0],),
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=triton.INTERPRET,
        name="norm",
    )(rows, norm.scale)
    return out[:, :features].reshape(x.shape)


def _norm(x_ref: Any, scale_ref: Any, out_ref: Any, *, eps: float) -> None:
    """One program: a row."""
    row, features = pl.program_id(0), x_ref.shape[1]
    lane = jnp.arange(out_ref.shape[1])
    near, inside = (lane, None) if lane.size == features else (jnp.minimum(lane, features - 1), lane < features)
    x = plt.load(x_ref.at[row, near], mask=inside, other=None if inside is None else 0)
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.sum(wide * wide) / features + eps)
    plt.store(out_ref.at[row, lane], plt.load(scale_ref.at[near]) * wide.astype(x.dtype))
