"""Matrix products of a few rows on NVIDIA GPUs: Pallas (Triton) kernels that read every weight once.

A program computes a few columns of the output from all of x, so there are no partial sums to add up afterwards; the
next weights are loaded while the previous ones are multiplied. Residuals, norms' scales, angles and biases are loaded
before the loop over the weights, so that nothing waits for them at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.cache import LayerCache
from recyc_jax.config import LlamaConfig
from recyc_jax.kernels.gpu import triton_call
from recyc_jax.rope import Positions

MOST_ROWS = 16
"""Rows up to which the kernels apply."""
ROWS = 16
"""Rows of a tile that Triton multiplies; x has at most as many."""


class Norm(NamedTuple):
    """A norm's parameters."""

    factors: Array  # [D]: what it multiplies by; float32 if it multiplies before it rounds
    eps: float


class Linear(NamedTuple):
    """The parameters of a projection."""

    kernel: Array  # [D, F]
    bias: Array | None = None  # [F]


class Stream(NamedTuple):
    """The residual stream between two products, with what the norm that follows needs."""

    x: Array  # [B, 1, D]
    scaled: Array | None = None  # [B, 1, D]: x times that norm's scale; None where no norm follows
    squares: Array | None = None  # float32 [B, 1, P]: the squares of x, summed over P parts of D


class _Tile(NamedTuple):
    """How a kernel reads its matrices."""

    columns: int  # of a matrix, per program
    depth: int  # rows of the matrix that are multiplied at a time
    warps: int = 4
    stages: int = 4  # blocks of `depth` rows in flight or in use


HEADS = _Tile(32, 256, stages=3)
WHOLE_HEADS = _Tile(64, 128, stages=5)
GATED = _Tile(128, 64, stages=3)
ADDED = _Tile(32, 256)
NORMED = 512
"""Columns per program where a norm is added to the stream."""
GELU = math.sqrt(2 / math.pi), 0.044715
"""The numbers of the GELU's approximation by tanh."""
LEAST_WHOLE_HEADS = 48
"""Where heads have norms and there are at least so many, a program makes a whole head."""
WHOLE_HALVES = (16, 32, 64)
"""Columns of half a head that a program may make at once: powers of two that Triton multiplies and registers hold."""
PROGRAMS = 96
"""Where fewer programs than this would share a matrix, each program takes fewer columns."""
LEAST_COLUMNS = 16
LEAST_TOGETHER = 8
"""Columns of a matrix that must lie side by side for loads of 16 bytes: 8 of bfloat16."""


def _spare() -> int:
    """Spare rows at the end of an output: the interpreter writes where a store is masked, which must not be a live
    row."""
    return int(triton_call.INTERPRET)


def _columns(tile: _Tile, width: int) -> int:
    """Columns per program of matrices of that width."""
    columns = tile.columns
    while columns > LEAST_COLUMNS and width // columns < PROGRAMS:
        columns //= 2
    return columns


def finishes_heads(config: LlamaConfig) -> bool:
    """Whether heads need more after their projection than a program can do that makes a part of a head, or all of one
    where there are enough: then `projected` and `finished_heads` make them, otherwise `to_heads` at once."""
    scaling, half = config.rope_scaling, config.head_dim // 2
    multiplied = config.query_multiplier != 1 or (scaling is not None and scaling.llama_4_scaling_beta != 0)
    partly = config.rotary_dim < config.head_dim or bool(config.layers_without_rope)
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    whole = config.qk_norm == "head" and heads >= LEAST_WHOLE_HEADS and half in WHOLE_HALVES
    return multiplied or partly or not (config.qk_norm is None or whole)


def head_columns(config: LlamaConfig) -> int | None:
    """Columns of a head that a program makes at least, in the projections to heads; None where the head dim allows too
    few."""
    half = config.head_dim // 2
    if finishes_heads(config):
        columns = config.head_dim & -config.head_dim
        return columns if columns >= LEAST_TOGETHER else None
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    columns = math.gcd(_columns(HEADS, heads * half), half)
    return columns if columns >= LEAST_TOGETHER else None


def begin(x: Float[Array, "B T D"], scale: Float[Array, " D"] | None) -> Stream:
    """The stream that the first layer takes in; `scale` is that of its first norm, None if it has none before it."""
    if scale is None:
        return Stream(x)
    wide = x.astype(jnp.float32)
    return Stream(x, _times(x, scale), jnp.sum(wide * wide, axis=-1, keepdims=True))


def _times(x: Array, factors: Array) -> Array:
    """x times the factors, in x's dtype; in float32 before it is rounded if the factors are float32."""
    return x * factors if factors.dtype == x.dtype else (x.astype(jnp.float32) * factors).astype(x.dtype)


def to_heads(
    stream: Stream,
    linears: Sequence[Linear],
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    cached: LayerCache,
    slot: Int[Array, ""],
    eps: float,
    norms: Sequence[Norm] | None = None,
) -> tuple[Array, Array, Array, Array, LayerCache]:
    """q, q before RoPE, k, v [B, 1, heads, H] of the normed stream, and the cache with k and v written into it at
    `slot`. `norms` are those of q and k over each head: then a program makes a whole head."""
    x, keys, values = stream.x, cached.keys, cached.values
    rows, dim = x.shape[0], keys.shape[3]
    half = dim // 2
    heads = [linear.kernel.shape[1] // dim for linear in linears]
    tile = WHOLE_HEADS if norms else HEADS
    if norms and x.dtype.itemsize > 2:
        tile = tile._replace(depth=tile.depth // 2)  # as many bytes in flight
    columns = half if norms else math.gcd(_columns(HEADS, sum(heads) * half), half)
    arrays = [jnp.reshape(slot, 1), cos.reshape(rows, half), sin.reshape(rows, half)]
    arrays += [norm.factors for norm in norms or ()]
    q_shape = jax.ShapeDtypeStruct((rows + _spare(), heads[0], dim), x.dtype)
    q, q_before_rope, keys, values = _call(
        "heads_projections",
        _heads,
        stream,
        arrays,
        list(linears),
        [q_shape, q_shape],
        sum(heads) * half // columns,
        tile,
        in_place=(keys, values),
        columns=columns,
        eps=eps,
        normed_heads=norms is not None,
    )
    k, v = (lax.dynamic_slice_in_dim(one, slot, 1, 2).swapaxes(1, 2) for one in (keys, values))
    return q[:rows, None], q_before_rope[:rows, None], k, v, cached.replaced(keys, values)


def projected(stream: Stream, linears: Sequence[Linear], eps: float) -> list[Array]:
    """Several projections [B, F] of the normed stream (of x itself, if no norm comes before them)."""
    rows, widths = math.prod(stream.x.shape[:-1]), [linear.kernel.shape[1] for linear in linears]
    columns = math.gcd(_columns(ADDED, sum(widths)), *widths)
    shapes = [jax.ShapeDtypeStruct((rows + _spare(), width), stream.x.dtype) for width in widths]
    options = {"columns": columns, "eps": eps}
    outputs = _call(
        "projections", _projected, stream, [], list(linears), shapes, sum(widths) // columns, ADDED, **options
    )
    return [one[:rows] for one in outputs]


def finished_heads(
    raw: Sequence[Float[Array, "B _"]],
    norms: Sequence[Norm] | None,
    positions: Positions,
    cached: LayerCache,
    slot: Int[Array, ""],
) -> tuple[Array, Array, Array, Array, LayerCache]:
    """As `to_heads`, from the projections `raw` of q, k and v. `norms` are those of q and k, over each head or over the
    whole projection by their size; None without."""
    keys, values = cached.keys, cached.values
    rows, dim, dtype = raw[0].shape[0], keys.shape[3], raw[0].dtype
    heads = [one.shape[1] // dim for one in raw]
    columns = dim & -dim  # the largest power of two that divides it
    arrays, rotation = [jnp.reshape(slot, 1), *raw], positions.rotation
    if rotation is not None:
        arrays += [one.reshape(rows, -1) for one in rotation]
    if positions.query_multiplier is not None:
        of_rows = jnp.asarray(positions.query_multiplier, jnp.float32)
        arrays.append(jnp.broadcast_to(jnp.reshape(of_rows, (-1, 1)), (rows, 1)))
    arrays += [norm.factors for norm in norms or ()]
    q_shape = jax.ShapeDtypeStruct((rows + _spare(), heads[0], dim), dtype)
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
    k, v = (lax.dynamic_slice_in_dim(one, slot, 1, 2).swapaxes(1, 2) for one in (keys, values))
    return q[:rows, None], q_before_rope[:rows, None], k, v, cached.replaced(keys, values)


def gated(stream: Stream, gate: Linear, up: Linear, eps: float, activation: str = "silu") -> Float[Array, "B T F"]:
    """The activation (`LlamaConfig.activation`) of one projection of the normed stream, times another projection."""
    width = gate.kernel.shape[1]
    columns = _columns(GATED, width)
    blocks, rows = pl.cdiv(width, columns), math.prod(stream.x.shape[:-1])
    # the programs' columns can go beyond the matrix
    shapes = [jax.ShapeDtypeStruct((rows + _spare(), blocks * columns), stream.x.dtype)]
    options = {"columns": columns, "eps": eps, "activation": activation}
    (out,) = _call("gated_projections", _gated, stream, [], [gate, up], shapes, blocks, GATED, **options)
    return out[:rows, :width].reshape(*stream.x.shape[:-1], width)


def added(x: Float[Array, "B T F"], linear: Linear, stream: Stream, scale: Float[Array, " D"] | None) -> Stream:
    """The stream with a projection of x added; `scale` is that of the norm that follows, if one does."""
    shape, dtype, width = stream.x.shape, stream.x.dtype, linear.kernel.shape[1]
    columns = _columns(ADDED, width)
    blocks, rows = pl.cdiv(width, columns), math.prod(shape[:-1])
    options = {"columns": columns, "scaled": scale is not None}
    whole = jax.ShapeDtypeStruct((rows + _spare(), blocks * columns), dtype)
    shapes = [whole, whole, jax.ShapeDtypeStruct((rows + _spare(), blocks), jnp.float32)]
    arrays = [stream.x.reshape(rows, width), *(() if scale is None else (scale,))]
    # named by the width of x: so a profile distinguishes a layer's two products of this kind
    name, shapes = f"added_projection_{x.shape[-1]}", shapes[: 1 if scale is None else 3]
    outputs = _call(name, _added, Stream(x), arrays, [linear], shapes, blocks, ADDED, **options)
    cut = [one[:rows, :width].reshape(shape) for one in outputs[:2]]
    if scale is None:
        return Stream(cut[0])
    return Stream(cut[0], cut[1], outputs[2][:rows].reshape(*shape[:-1], blocks))


def added_normed(
    x: Float[Array, "B T F"], linear: Linear, stream: Stream, norm: Norm, scale: Float[Array, " D"] | None
) -> Stream:
    """The stream with the norm of a projection of x added; `scale` is as in `added`."""
    # a first product leaves the projection and its squares, as if it were a stream that begins
    made = added(x, linear, Stream(jnp.zeros_like(stream.x)), jnp.ones(stream.x.shape[-1], stream.x.dtype))
    shape, width = stream.x.shape, stream.x.shape[-1]
    rows, columns = math.prod(shape[:-1]), min(NORMED, pl.next_power_of_2(width))
    blocks = pl.cdiv(width, columns)
    whole = jax.ShapeDtypeStruct((rows + _spare(), blocks * columns), stream.x.dtype)
    shapes = [whole, whole, jax.ShapeDtypeStruct((rows + _spare(), blocks), jnp.float32)]
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
    """The kernel's outputs of these shapes, then the arrays of `in_place`, which it writes to. The kernel gets the
    stream as rows to multiply, the arrays, and the matrices with their biases."""
    x = stream.x if stream.scaled is None else stream.scaled
    rows, features = math.prod(x.shape[:-1]), x.shape[-1]
    squares = [] if stream.squares is None else [stream.squares.reshape(rows, -1)]
    weights = [array for linear in linears for array in linear if array is not None]
    read = [x.reshape(rows, features), *squares, *arrays, *weights]
    return triton_call.call(
        _with_named_refs,
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
        depth=max(16, min(tile.depth, pl.next_power_of_2(features))),
        normed=bool(squares),
        array_count=len(arrays),
        biased=tuple(linear.bias is not None for linear in linears),
        written_count=len(in_place),
        **options,
    )


def _with_named_refs(
    *refs: Any,
    program: Callable[..., None],
    depth: int,
    normed: bool,
    array_count: int,
    biased: tuple[bool, ...],
    written_count: int,
    **options: Any,
) -> None:
    """Run the kernel with its references grouped: x, arrays, matrices with biases, outputs."""
    refs_left = iter(refs)
    x = _Rows(next(refs_left), next(refs_left) if normed else None, depth)
    array_refs = [next(refs_left) for _ in range(array_count)]
    matrices = [(next(refs_left), next(refs_left) if bias else None) for bias in biased]
    for _ in range(written_count):
        next(refs_left)  # the input side of an array that is written in place; its output side follows
    program(x, *array_refs, matrices, *refs_left, **options)


class _Rows(NamedTuple):
    """x in a kernel."""

    ref: Any  # [rows, D]: times its norm's scale, if a norm comes first
    squares_ref: Any | None  # float32 [rows, P]: sums of squares of x before the scale; None without a norm
    depth: int  # features that are multiplied at a time


def _heads(
    x: _Rows,
    slot_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    *refs: Any,
    columns: int,
    eps: float,
    normed_heads: bool,
) -> None:
    """One program: some columns of the first half of one head, and the columns of its second half that RoPE pairs them
    with."""
    factor_refs, refs = (refs[:2], refs[2:]) if normed_heads else ((), refs)
    matrices, q_ref, q_before_rope_ref, keys_ref, values_ref = refs
    rows, half = cos_ref.shape
    blocks = half // columns
    slot, row = plt.load(slot_ref.at[jnp.int32(0)]), jnp.arange(ROWS)[:, None]
    first_program = 0
    head_counts = (q_ref.shape[1], keys_ref.shape[1], values_ref.shape[1])
    for number, ((kernel_ref, bias_ref), heads) in enumerate(zip(matrices, head_counts, strict=True)):
        program = pl.program_id(0) - first_program

        def compute(
            number: int = number, kernel_ref: Any = kernel_ref, bias_ref: Any = bias_ref, program: Array = program
        ) -> None:
            head = program // blocks
            lane = program % blocks * columns + jnp.arange(columns)
            halves = [head * 2 * half + lane, head * 2 * half + half + lane]
            row_in_range = jnp.minimum(row, rows - 1)
            cos, sin = (plt.load(ref.at[row_in_range, lane[None, :]]) for ref in (cos_ref, sin_ref))
            parts = [(kernel_ref, bias_ref, column) for column in halves]
            plain = [product.astype(q_ref.dtype) for product in _products(x, parts, eps)]
            if normed_heads and number < 2:
                factors = [plt.load(factor_refs[number].at[part]) for part in (lane, half + lane)]
                plain = _normed(plain, factors, eps)
            rotated = plain
            if number < 2:  # values are not rotated
                low, high = (product.astype(jnp.float32) for product in plain)
                rotated = [product.astype(q_ref.dtype) for product in (low * cos - high * sin, high * cos + low * sin)]
            for which in range(2):
                store_lane = (which * half + lane)[None, :]
                if number == 0:
                    _store(q_ref, (head, store_lane), rotated[which])
                    _store(q_before_rope_ref, (head, store_lane), plain[which])
                else:
                    cache_ref = keys_ref if number == 1 else values_ref
                    _store_in_cache(cache_ref, rows, (head, slot, store_lane), rotated[which])

        pl.when((program >= 0) & (program < heads * blocks))(compute)
        first_program += heads * blocks


def _normed(parts: list[Array], factors: list[Array], eps: float) -> list[Array]:
    """The parts of a head [ROWS, columns] over the head's root mean square, times the factors."""
    wide = [part.astype(jnp.float32) for part in parts]
    width = sum(part.shape[1] for part in wide)
    squares = sum((jnp.sum(part * part, axis=1) for part in wide), jnp.zeros(ROWS, jnp.float32))
    inverse_rms = lax.rsqrt(squares / width + eps)[:, None]
    return [
        _times_normed(part * inverse_rms, its[None, :], parts[0].dtype) for part, its in zip(wide, factors, strict=True)
    ]


def _times_normed(normed: Array, factors: Array, dtype: Any) -> Array:
    """What a norm has divided (float32) times its factors, in `dtype`; rounded before unless the factors are float32."""
    return ((normed.astype(dtype) if factors.dtype == dtype else normed) * factors).astype(dtype)


def _projected(x: _Rows, matrices: list[Any], *out_refs: Any, columns: int, eps: float) -> None:
    """One program: some columns of one matrix."""
    first_program = 0
    for matrix, out_ref in zip(matrices, out_refs, strict=True):
        blocks = out_ref.shape[1] // columns
        block = pl.program_id(0) - first_program

        def compute(matrix: Any = matrix, out_ref: Any = out_ref, block: Array = block) -> None:
            column = block * columns + jnp.arange(columns)
            (product,) = _products(x, [(*matrix, column)], eps)
            _store(out_ref, (column[None, :],), product.astype(out_ref.dtype))

        pl.when((block >= 0) & (block < blocks))(compute)
        first_program += blocks


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
    rows, blocks = raw_refs[0].shape[0], dim // columns
    slot, row_in_range = plt.load(slot_ref.at[jnp.int32(0)]), jnp.minimum(jnp.arange(ROWS), rows - 1)[:, None]

    def of_head(number: int, head: Array, lane: Array) -> Array:
        """Dimensions of a head after its norm, in the model's dtype."""
        raw_ref = raw_refs[number]

        def load(lane: Array) -> Array:
            return plt.load(raw_ref.at[row_in_range, lane[None, :]])

        x = load(head * dim + lane)
        if not factor_refs or number == 2:
            return x
        factor_ref = factor_refs[number]
        width = factor_ref.shape[0]  # of what is normed: one head, or all of them
        begin = jnp.int32(0) if width > dim else head * dim

        def add(block: Array, total: Array) -> Array:
            wide = load(begin + block * columns + jnp.arange(columns)).astype(jnp.float32)
            return total + jnp.sum(wide * wide, axis=1)

        squares = lax.fori_loop(0, width // columns, add, jnp.zeros(ROWS, jnp.float32))
        normed = x.astype(jnp.float32) * lax.rsqrt(squares / width + eps)[:, None]
        factors = plt.load(factor_ref.at[(head * dim if width > dim else 0) + lane])[None, :]
        return _times_normed(normed, factors, x.dtype)

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
                _store(q_ref, (head, lane[None, :]), out)
                _store(q_before_rope_ref, (head, lane[None, :]), plain)
            else:
                cache_ref = keys_ref if number == 1 else values_ref
                _store_in_cache(cache_ref, rows, (head, slot, lane[None, :]), out)

        pl.when((program >= 0) & (program < heads * blocks))(compute)
        first_program += heads * blocks


def _store_in_cache(ref: Any, rows: int, index: tuple[Any, ...], values: Array) -> None:
    """Store rows in the cache; one by one when interpreted, since a masked store would overwrite a live row there."""
    if not triton_call.INTERPRET:
        row = jnp.arange(ROWS)[:, None]
        mask = jnp.broadcast_to(row < rows, values.shape)
        plt.store(ref.at[(jnp.minimum(row, rows - 1), *index)], values, mask=mask)
        return
    for row in range(rows):
        plt.store(ref.at[(jnp.int32(row), *index)], values[row : row + 1])


def _gated(x: _Rows, matrices: list[Any], out_ref: Any, *, columns: int, eps: float, activation: str) -> None:
    """One program: the same columns of both matrices."""
    column = pl.program_id(0) * columns + jnp.arange(columns)
    gate, up = _products(x, [(*matrix, column) for matrix in matrices], eps)
    # the GELU's tanh is a sigmoid of twice its argument
    bent = gate if activation == "silu" else 2 * GELU[0] * (gate + GELU[1] * gate * gate * gate)
    _store(out_ref, (column[None, :],), (gate / (1 + jnp.exp(-bent)) * up).astype(out_ref.dtype))


def _added(x: _Rows, residual_ref: Any, *refs: Any, columns: int, scaled: bool) -> None:
    """One program: some columns."""
    *scale_ref, matrices, out_ref = refs[: 3 if scaled else 2]
    column = pl.program_id(0) * columns + jnp.arange(columns)
    width = residual_ref.shape[1]
    column_in_range, is_column = _in_range(column, width)
    row_in_range = jnp.minimum(jnp.arange(ROWS), residual_ref.shape[0] - 1)[:, None]
    # loaded before the product, so that nothing waits for them after it
    residual = plt.load(residual_ref.at[row_in_range, column_in_range[None, :]])
    scale = plt.load(scale_ref[0].at[column_in_range]) if scaled else None
    (product,) = _products(x, [(*matrix, column) for matrix in matrices])
    out = (residual.astype(jnp.float32) + product).astype(out_ref.dtype)
    _store(out_ref, (column[None, :],), out)
    if scale is not None:
        scaled_ref, squares_ref = refs[3:]
        _store_scaled(out, scale, column, is_column, scaled_ref, squares_ref)


def _store_scaled(
    out: Array, scale: Array, column: Array, is_column: Array | None, scaled_ref: Any, squares_ref: Any
) -> None:
    """Store what the norm that follows needs of some columns of the stream."""
    _store(scaled_ref, (column[None, :],), _times(out, scale[None, :]))
    wide = out.astype(jnp.float32)
    if is_column is not None:
        wide = jnp.where(is_column[None, :], wide, 0)
    row, rows = jnp.arange(ROWS), squares_ref.shape[0] - _spare()
    store_row = jnp.minimum(row, squares_ref.shape[0] - 1)
    plt.store(squares_ref.at[store_row, pl.program_id(0)], jnp.sum(wide * wide, axis=1), mask=row < rows)


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
    column_in_range, is_column = _in_range(column, width)
    row_in_range = jnp.minimum(jnp.arange(ROWS), residual_ref.shape[0] - 1)[:, None]
    raw, residual = (plt.load(ref.at[row_in_range, column_in_range[None, :]]) for ref in (raw_ref, residual_ref))
    factors = plt.load(factors_ref.at[column_in_range])[None, :]
    squares = jnp.sum(_load_squares(raw_squares_ref, row_in_range), axis=1)
    inverse_rms = lax.rsqrt(squares / width + eps)
    normed = _times_normed(raw.astype(jnp.float32) * inverse_rms[:, None], factors, raw.dtype)
    out = (residual.astype(jnp.float32) + normed.astype(jnp.float32)).astype(residual.dtype)
    _store(refs[0], (column[None, :],), out)
    if scale_ref is not None:
        _store_scaled(out, plt.load(scale_ref.at[column_in_range]), column, is_column, refs[1], refs[2])


def _load_squares(squares_ref: Any, row_in_range: Array) -> Array:
    """Each row's squares, summed over parts: float32 [ROWS, parts]."""
    count = squares_ref.shape[1]
    part = jnp.arange(pl.next_power_of_2(count))
    is_part = jnp.broadcast_to(part < count, (ROWS, part.size))
    return plt.load(squares_ref.at[row_in_range, jnp.minimum(part, count - 1)[None, :]], mask=is_part, other=0)


def _store(ref: Any, index: tuple[Any, ...], values: Array) -> None:
    """Store the rows that the output has."""
    rows, row = ref.shape[0] - _spare(), jnp.arange(ROWS)[:, None]
    store_row = jnp.minimum(row, ref.shape[0] - 1)
    plt.store(ref.at[(store_row, *index)], values, mask=jnp.broadcast_to(row < rows, values.shape))


def _in_range(column: Array, width: int) -> tuple[Array, Array | None]:
    """The columns clamped to the matrix, and which of them lie inside it. Where the width is a multiple of the columns
    nothing is clamped or masked (None): Triton would no longer see that columns are adjacent, and load them one by
    one."""
    return (column, None) if width % column.size == 0 else (jnp.minimum(column, width - 1), column < width)


def _products(x: _Rows, parts: list[tuple[Any, Any, Array]], eps: float | None = None) -> list[Array]:
    """x times the given columns of each matrix, the bias added, float32 [ROWS, columns] each; rows beyond those of x
    are undefined. With `eps`, x is normed: its scale is in it already, and the root mean square divides the product."""
    rows, features = x.ref.shape
    row, lanes = jnp.arange(ROWS), jnp.arange(x.depth)
    row_in_range, is_row = jnp.minimum(row, rows - 1)[:, None], (row < rows)[:, None]
    whole = features % x.depth == 0
    # what is needed after the loop is loaded before it
    squares, biases = None, []
    if eps is not None and x.squares_ref is not None:
        squares = _load_squares(x.squares_ref, row_in_range)
    for kernel_ref, bias_ref, column in parts:
        column_in_range, _ = _in_range(column, kernel_ref.shape[1])
        biases.append(None if bias_ref is None else plt.load(bias_ref.at[column_in_range]))

    def multiply_block(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        feature = block * x.depth + lanes
        is_feature = feature < features
        feature_in_range = feature if whole else jnp.minimum(feature, features - 1)
        x_block = plt.load(
            x.ref.at[row_in_range, feature_in_range[None, :]], mask=is_row & is_feature[None, :], other=0
        )
        sums_after = []
        for total, (kernel_ref, _, column) in zip(sums, parts, strict=True):
            column_in_range, is_column = _in_range(column, kernel_ref.shape[1])
            tile = kernel_ref.at[feature_in_range[:, None], column_in_range[None, :]]
            if whole and is_column is None:
                weights = plt.load(tile)
            else:
                mask = is_feature[:, None] if is_column is None else is_feature[:, None] & is_column[None, :]
                weights = plt.load(tile, mask=jnp.broadcast_to(mask, (lanes.size, column.size)), other=0)
            sums_after.append(total + plt.dot(x_block, weights, allow_tf32=False))
        return tuple(sums_after)

    zeros = tuple(jnp.zeros((ROWS, column.size), jnp.float32) for _, _, column in parts)
    products = list(lax.fori_loop(0, pl.cdiv(features, x.depth), multiply_block, zeros))
    if squares is not None and eps is not None:
        inverse_rms = lax.rsqrt(jnp.sum(squares, axis=1) / features + eps)[:, None]
        products = [product * inverse_rms for product in products]
    return [
        product if bias is None else product + bias.astype(jnp.float32)[None, :]
        for product, bias in zip(products, biases, strict=True)
    ]
