"""`projections` on NVIDIA GPUs for a few rows: a Pallas (Triton) kernel that reads every weight once.

A program makes a few columns of the output from all of x, so nothing is put together afterwards; the next weights are on
their way while the last ones are multiplied. For more rows than `MOST_ROWS`, in float16, and over a mesh, whose axes XLA
has to see, it is the plain functions that run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax import projections, sharding
from recyc_jax.attention import triton
from recyc_jax.cache import LayerCache
from recyc_jax.projections import Heads, Linear, Norm, Stream, ToHeads

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
GATED = _Tile(128, 64, stages=3)
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
    """Few rows, on one device; in float16 x times a norm's scale, before it is divided by its length, may be too large."""
    return x.dtype != jnp.float16 and math.prod(x.shape[:-1]) <= MOST_ROWS and sharding.unsplit()


def _ready(stream: Stream) -> bool:
    """The stream was begun by these kernels."""
    return stream.squares is not None


def begin(x: Float[Array, "B T D"], after: Norm | None) -> Stream:
    """As `projections.begin`; few rows are made ready for kernels."""
    if not _runs(x) or after is None:
        return projections.begin(x, after)
    wide = x.astype(jnp.float32)
    return Stream(x, x * after.scale.astype(x.dtype), jnp.sum(wide * wide, axis=-1, keepdims=True))


heads = projections.heads
"""The plain ones: it is `heads_appended` that decoding asks for."""


def heads_appended(
    stream: Stream,
    norm: Norm,
    linears: ToHeads,
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    dim: int,
    cached: LayerCache,
    slot: Int[Array, ""],
) -> tuple[Heads, LayerCache]:
    """As `projections.heads_appended`; keys and values are written where they belong at once."""
    x = stream.x
    if not _ready(stream) or x.shape[1] != 1:
        return projections.heads_appended(stream, norm, linears, cos, sin, dim, cached, slot)
    half, rows = dim // 2, x.shape[0]
    counts = [linear.kernel.shape[1] // dim for linear in linears]
    columns = math.gcd(_columns(HEADS, sum(counts) * half), half)
    if columns < LEAST_TOGETHER:
        return projections.heads_appended(stream, norm, linears, cos, sin, dim, cached, slot)
    arrays = [jnp.reshape(slot, 1), cos.reshape(rows, half), sin.reshape(rows, half)]
    q_shape = jax.ShapeDtypeStruct((rows + _spare(), counts[0], dim), x.dtype)
    keys, values = cached.keys, cached.values
    made = _call(
        "heads_projections",
        _heads,
        stream,
        arrays,
        list(linears),
        [q_shape, q_shape],
        sum(counts) * half // columns,
        HEADS,
        in_place=(keys, values),
        columns=columns,
        eps=norm.eps,
    )
    q, plain_q = (one[:rows, None] for one in made[:2])
    cached = cached.with_others(made[2], made[3])
    k, v = (lax.dynamic_slice_in_dim(one, slot, 1, 2).swapaxes(1, 2) for one in made[2:])
    return Heads(q, k, v, plain_q), cached


def gated(stream: Stream, norm: Norm, gate: Linear, up: Linear) -> Float[Array, "... F"]:
    """As `projections.gated`."""
    if not _ready(stream):
        return projections.gated(stream, norm, gate, up)
    width = gate.kernel.shape[1]
    columns = _columns(GATED, width)
    blocks, rows = pl.cdiv(width, columns), math.prod(stream.x.shape[:-1])
    # the programs' columns may go beyond the matrix
    shapes = [jax.ShapeDtypeStruct((rows + _spare(), blocks * columns), stream.x.dtype)]
    options = {"columns": columns, "eps": norm.eps}
    (out,) = _call("gated_projections", _gated, stream, [], [gate, up], shapes, blocks, GATED, **options)
    return out[:rows, :width].reshape(*stream.x.shape[:-1], width)


def added(x: Float[Array, "... F"], linear: Linear, residual: Stream, after: Norm | None) -> Stream:
    """As `projections.added`; the sum is made ready for the norm that follows."""
    if not _ready(residual):
        return projections.added(x, linear, residual, after)
    shape, dtype, width = residual.x.shape, residual.x.dtype, linear.kernel.shape[1]
    columns = _columns(ADDED, width)
    blocks, rows = pl.cdiv(width, columns), math.prod(shape[:-1])
    options = {"columns": columns, "scaled": after is not None}
    whole = jax.ShapeDtypeStruct((rows + _spare(), blocks * columns), dtype)
    shapes = [whole, whole, jax.ShapeDtypeStruct((rows + _spare(), blocks), jnp.float32)]
    arrays = [residual.x.reshape(rows, width), *(() if after is None else (after.scale,))]
    # named by what goes in: a profile tells a layer's two such products apart
    name, shapes = f"added_projection_{x.shape[-1]}", shapes[: 1 if after is None else 3]
    made = _call(name, _added, Stream(x), arrays, [linear], shapes, blocks, ADDED, **options)
    cut = [one[:rows, :width].reshape(shape) for one in made[:2]]
    if after is None:
        return Stream(cut[0])
    return Stream(cut[0], cut[1], made[2][:rows].reshape(*shape[:-1], blocks))


def _call(
    name: str,
    kernel: Callable[..., None],
    stream: Stream,
    arrays: list[Array],
    linears: list[Linear],
    shapes: list[jax.ShapeDtypeStruct],
    programs: int,
    tile: _Tile,
    in_place: tuple[Array, ...] = (),
    **options: Any,
) -> list[Array]:
    """The kernel's outputs of these shapes, and after them arrays that it writes to in place. It gets what it multiplies as
    rows, the arrays, and the matrices with their biases."""
    scaled = stream.x if stream.scaled is None else stream.scaled
    rows, features = math.prod(scaled.shape[:-1]), scaled.shape[-1]
    squares = [] if stream.squares is None else [stream.squares.reshape(rows, -1)]
    weights = [array for linear in linears for array in linear if array is not None]
    read = [scaled.reshape(rows, features), *squares, *arrays, *weights]
    return triton.call(
        _unpacked,
        read,
        shapes,
        (programs,),
        name,
        warps=tile.warps,
        stages=tile.stages,
        work=pl.CostEstimate(
            flops=2 * rows * sum(linear.kernel.size for linear in linears),
            transcendentals=0,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in read),
        ),
        in_place=in_place,
        program=kernel,
        deep=max(16, min(tile.deep, pl.next_power_of_2(features))),
        squared=bool(squares),
        others=len(arrays),
        biased=tuple(linear.bias is not None for linear in linears),
        written=len(in_place),
        **options,
    )


def _unpacked(
    *refs: Any,
    program: Callable[..., None],
    deep: int,
    squared: bool,
    others: int,
    biased: tuple[bool, ...],
    written: int,
    **options: Any,
) -> None:
    """Run the kernel with its references told apart."""
    each = iter(refs)
    x = _Rows(next(each), next(each) if squared else None, deep)
    arrays = [next(each) for _ in range(others)]
    matrices = [(next(each), next(each) if bias else None) for bias in biased]
    for _ in range(written):
        next(each)  # what is there already; it is the output's
    program(x, *arrays, matrices, *each, **options)


class _Rows(NamedTuple):
    """x in a kernel."""

    ref: Any  # [rows, D]
    squares_ref: Any | None  # float32 [rows, P]: of x before its norm's scale; None without a norm
    deep: int  # features taken at a time


def _heads(
    x: _Rows,
    slot_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    matrices: list[Any],
    q_ref: Any,
    plain_q_ref: Any,
    keys_ref: Any,
    values_ref: Any,
    *,
    columns: int,
    eps: float,
) -> None:
    """One program: some columns of the first half of a head and those of the second that turn with them."""
    rows, half = cos_ref.shape
    blocks = half // columns
    slot, row = plt.load(slot_ref.at[jnp.int32(0)]), jnp.arange(ROWS)[:, None]
    first = 0
    heads_of = (q_ref.shape[1], keys_ref.shape[1], values_ref.shape[1])
    for number, ((kernel_ref, bias_ref), count) in enumerate(zip(matrices, heads_of, strict=True)):
        program = pl.program_id(0) - first

        def make(
            number: int = number, kernel_ref: Any = kernel_ref, bias_ref: Any = bias_ref, program: Array = program
        ) -> None:
            head = program // blocks
            lane = program % blocks * columns + jnp.arange(columns)
            at = [head * 2 * half + lane, head * 2 * half + half + lane]
            parts = [(kernel_ref, bias_ref, one) for one in at]
            near_row = jnp.minimum(row, rows - 1)
            cos, sin = (plt.load(ref.at[near_row, lane[None, :]]) for ref in (cos_ref, sin_ref))
            plain = [one.astype(q_ref.dtype) for one in _products(x, parts, eps)]
            turned = plain
            if number < 2:
                low, high = (one.astype(jnp.float32) for one in plain)
                turned = [one.astype(q_ref.dtype) for one in (low * cos - high * sin, high * cos + low * sin)]
            for which in range(2):
                to = (which * half + lane)[None, :]
                if number == 0:
                    _store(q_ref, (head, to), turned[which])
                    _store(plain_q_ref, (head, to), plain[which])
                else:
                    _write(keys_ref if number == 1 else values_ref, rows, (head, slot, to), turned[which])

        pl.when((program >= 0) & (program < count * blocks))(make)
        first += count * blocks


def _write(ref: Any, rows: int, at: tuple[Any, ...], values: Array) -> None:
    """Rows of the cache, one by one where they are interpreted: a masked store would write on a live place."""
    if not triton.INTERPRET:
        row = jnp.arange(ROWS)[:, None]
        mask = jnp.broadcast_to(row < rows, values.shape)
        plt.store(ref.at[(jnp.minimum(row, rows - 1), *at)], values, mask=mask)
        return
    for row in range(rows):
        plt.store(ref.at[(jnp.int32(row), *at)], values[row : row + 1])


def _gated(x: _Rows, matrices: list[Any], out_ref: Any, *, columns: int, eps: float) -> None:
    """One program: some columns of both."""
    column = pl.program_id(0) * columns + jnp.arange(columns)
    gate, up = _products(x, [(*matrix, column) for matrix in matrices], eps)
    _store(out_ref, (column[None, :],), (gate / (1 + jnp.exp(-gate)) * up).astype(out_ref.dtype))


def _added(x: _Rows, residual_ref: Any, *refs: Any, columns: int, scaled: bool) -> None:
    """One program: some columns."""
    *scale_ref, matrices, out_ref = refs[: 3 if scaled else 2]
    column = pl.program_id(0) * columns + jnp.arange(columns)
    width = residual_ref.shape[1]
    near, is_column = _inside(column, width)
    near_row = jnp.minimum(jnp.arange(ROWS), residual_ref.shape[0] - 1)[:, None]
    # asked for before the product, so that it need not be waited for
    residual = plt.load(residual_ref.at[near_row, near[None, :]])
    scale = plt.load(scale_ref[0].at[near]) if scaled else None
    (made,) = _products(x, [(*matrix, column) for matrix in matrices])
    out = (residual.astype(jnp.float32) + made).astype(out_ref.dtype)
    _store(out_ref, (column[None, :],), out)
    if scale is not None:
        scaled_ref, squares_ref = refs[3:]
        _store(scaled_ref, (column[None, :],), out * scale[None, :])
        wide = out.astype(jnp.float32)
        if is_column is not None:
            wide = jnp.where(is_column[None, :], wide, 0)
        row, rows = jnp.arange(ROWS), squares_ref.shape[0] - _spare()
        to = jnp.minimum(row, squares_ref.shape[0] - 1)
        plt.store(squares_ref.at[to, pl.program_id(0)], jnp.sum(wide * wide, axis=1), mask=row < rows)


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


def _products(x: _Rows, parts: list[tuple[Any, Any, Array]], eps: float | None = None) -> list[Array]:
    """x (after its norm, with an epsilon: the scale is in it already) times the named columns of each matrix, the bias
    added: float32 [ROWS, columns] each; what lies past x's rows means nothing."""
    rows, features = x.ref.shape
    row, lanes = jnp.arange(ROWS), jnp.arange(x.deep)
    near_row, is_row = jnp.minimum(row, rows - 1)[:, None], (row < rows)[:, None]
    whole = features % x.deep == 0
    # what is needed at the end is asked for at the start: it is there when the weights are
    squares, biases = None, []
    if eps is not None and x.squares_ref is not None:
        count = x.squares_ref.shape[1]
        part = jnp.arange(pl.next_power_of_2(count))
        near_part, is_part = jnp.minimum(part, count - 1)[None, :], jnp.broadcast_to(part < count, (ROWS, part.size))
        squares = plt.load(x.squares_ref.at[near_row, near_part], mask=is_part, other=0)
    for kernel_ref, bias_ref, column in parts:
        at, _ = _inside(column, kernel_ref.shape[1])
        biases.append(None if bias_ref is None else plt.load(bias_ref.at[at]))

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
    if squares is not None and eps is not None:
        factor = lax.rsqrt(jnp.sum(squares, axis=1) / features + eps)[:, None]
        made = [one * factor for one in made]
    return [
        one if bias is None else one + bias.astype(jnp.float32)[None, :] for one, bias in zip(made, biases, strict=True)
    ]
