"""Matrix products of a few rows on NVIDIA GPUs: Pallas (Triton) kernels that read every weight once.

A program computes a few columns of the output from all of x, so there are no partial sums to add up afterwards (but for
heads where there are few: `projected_in_shares`); the next weights are loaded while the previous ones are multiplied.
Residuals, norms' scales, angles and biases are loaded before the loop over the weights, so that nothing waits for them at
its end."""

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
    times,
    times_normed,
)

MOST_ROWS = 16
"""Rows up to which the kernels apply in a decode step."""
MOST_BLOCK_ROWS = 64
"""Rows up to which they apply where rows have several tokens: larger tiles would not fit in registers."""
X_BYTES = 2**14
"""The most bytes of x that a program multiplies at a time."""


class Linear(NamedTuple):
    """The parameters of a projection, or what each is split by (`sharding.split_kernel`)."""

    kernel: Any  # [D, F]
    bias: Any = None  # [F], or None


class _Tile(NamedTuple):
    """How a kernel reads its matrices."""

    columns: int  # of a matrix, per program
    depth: int  # rows of the matrix that are multiplied at a time
    warps: int = 4
    stages: int = 4  # blocks of `depth` rows in flight or in use


HEADS = _Tile(32, 256, stages=3)
WHOLE_HEADS = _Tile(64, 128, stages=5)
GATED = (_Tile(128, 64, stages=3), _Tile(64, 64), _Tile(32, 128))
"""The first that gives enough programs: `GATED_PROGRAMS`. Programs of fewer columns need as many bytes in flight."""
GATED_PROGRAMS = 72
ADDED = _Tile(32, 256)
SHARE = _Tile(32, 128)
"""Where programs take a share of the rows of a matrix."""
SHARE_PROGRAMS = 192
"""Where the projections to heads have fewer programs than this, they are split into shares of rows, and another kernel
makes heads of their sums (on an H100 5 to 13 us less for the heads of a 0.5B, of a quarter of an 8B or 70B layer)."""
LEAST_SHARE = 1024
"""Rows of a matrix that a program should have at least."""
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


def _columns(tile: _Tile, width: int) -> int:
    """Columns per program of matrices of that width."""
    columns = tile.columns
    while columns > LEAST_COLUMNS and width // columns < PROGRAMS:
        columns //= 2
    return columns


def makes_heads_at_once(config: LlamaConfig) -> bool:
    """Whether `to_heads` makes the heads: where there are programs enough, and heads need no more after their projection
    than a program can do that makes a part of a head, or all of one. Otherwise `projected_in_shares` and `finished_heads`
    make them."""
    scaling, half, heads = config.rope_scaling, config.head_dim // 2, _heads_of(config)
    multiplied = config.query_multiplier != 1 or (scaling is not None and scaling.llama_4_scaling_beta != 0)
    partly = config.rotary_dim < config.head_dim or bool(config.layers_without_rope)
    whole = config.qk_norm == "head" and heads >= LEAST_WHOLE_HEADS and half in WHOLE_HALVES
    are_enough = heads * config.head_dim // SHARE.columns >= SHARE_PROGRAMS
    return are_enough and not (multiplied or partly) and (config.qk_norm is None or whole)


def shares(config: LlamaConfig) -> int:
    """Into how many shares of their rows the projections to heads are split, so that enough programs read them."""
    programs, count = _heads_of(config) * config.head_dim // SHARE.columns, 1
    while programs * count < SHARE_PROGRAMS and config.hidden_size // (2 * count) >= LEAST_SHARE:
        count *= 2
    return count


def head_columns(config: LlamaConfig) -> int | None:
    """Columns of a head that a program makes at least, in the projections to heads; None where the head dim allows too
    few."""
    half, columns = config.head_dim // 2, config.head_dim & -config.head_dim
    if makes_heads_at_once(config):
        columns = math.gcd(_columns(HEADS, _heads_of(config) * half), half)
    return columns if columns >= LEAST_TOGETHER else None


def _heads_of(config: LlamaConfig) -> int:
    """Heads of queries, keys and values."""
    return config.num_attention_heads + 2 * config.num_key_value_heads


def begin(x: Float[Array, "B T D"], scale: Float[Array, " D"] | None) -> Stream:
    """The stream that the first layer takes in; `scale` is that of its first norm, None if it has none before it."""
    if scale is None:
        return Stream(x)
    wide = x.astype(jnp.float32)
    return Stream(x, times(x, scale), jnp.sum(wide * wide, axis=-1, keepdims=True))


def to_heads(
    stream: Stream,
    linears: Sequence[Linear],
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    cached: LayerCache,
    slot: Int[Array, ""] | Int[Array, " B"],
    eps: float,
    norms: Sequence[Norm] | None = None,
) -> tuple[Array, Array, LayerCache]:
    """q and q before RoPE [B, 1, N, H] of the normed stream, and the cache with the keys and values written into it at
    `slot`. `norms` are those of q and k over each head: then a program makes a whole head."""
    x, keys, values = stream.x, cached.keys, cached.values
    rows, dim = x.shape[0], keys.shape[3]
    half = dim // 2
    heads = [linear.kernel.shape[1] // dim for linear in linears]
    tile = WHOLE_HEADS if norms else HEADS
    if norms and x.dtype.itemsize > 2:
        tile = tile._replace(depth=tile.depth // 2)  # as many bytes in flight
    columns = half if norms else math.gcd(_columns(HEADS, sum(heads) * half), half)
    arrays = [jnp.reshape(slot, -1), cos.reshape(rows, half), sin.reshape(rows, half)]
    arrays += [norm.factors for norm in norms or ()]
    q_shape = jax.ShapeDtypeStruct((rows + spare(), heads[0], dim), x.dtype)
    q, q_before_rope, keys, values = _call(
        "heads_projections",
        _heads,
        stream,
        arrays,
        list(linears),
        [q_shape, q_shape],
        (sum(heads) * half // columns,),
        tile,
        in_place=(keys, values),
        columns=columns,
        eps=eps,
        normed_heads=norms is not None,
    )
    return q[:rows, None], q_before_rope[:rows, None], cached.replaced(keys, values)


def projected(stream: Stream, linears: Sequence[Linear], eps: float, dtype: Any = None) -> list[Array]:
    """Several projections [B T, F] of the normed stream (of x itself, if no norm comes before them), in x's dtype or
    another."""
    return [one[:, 0] for one in _projections(stream, linears, eps, ADDED, 1, dtype or stream.x.dtype)]


def projected_in_shares(
    stream: Stream, linears: Sequence[Linear], eps: float, count: int
) -> list[Float[Array, "B P _"]]:
    """Several projections, each as its `count` addends P: in float32 if there is more than one."""
    width = sum(linear.kernel.shape[1] for linear in linears)
    tile = SHARE if width // SHARE.columns < SHARE_PROGRAMS else ADDED
    return _projections(stream, linears, eps, tile, count, jnp.float32 if count > 1 else stream.x.dtype)


def _projections(
    stream: Stream, linears: Sequence[Linear], eps: float, tile: _Tile, count: int, dtype: Any
) -> list[Array]:
    """Several projections [B T, P, F], of `count` shares of the features."""
    rows, widths = math.prod(stream.x.shape[:-1]), [linear.kernel.shape[1] for linear in linears]
    columns = math.gcd(tile.columns if tile is SHARE else _columns(tile, sum(widths)), *widths)
    shapes = [jax.ShapeDtypeStruct((rows + spare(), count, width), dtype) for width in widths]
    options = {"columns": columns, "eps": eps}
    programs = (sum(widths) // columns, count)
    outputs = _call("projections", _projected, stream, [], list(linears), shapes, programs, tile, **options)
    return [one[:rows] for one in outputs]


def gated(stream: Stream, gate: Linear, up: Linear, eps: float, activation: str = "silu") -> Float[Array, "B T F"]:
    """The activation (`LlamaConfig.activation`) of one projection of the normed stream, times another projection."""
    width = gate.kernel.shape[1]
    tile = next((one for one in GATED if width // one.columns >= GATED_PROGRAMS), GATED[-1])
    columns = tile.columns if tile is not GATED[-1] else _columns(tile, width)
    blocks, rows = pl.cdiv(width, columns), math.prod(stream.x.shape[:-1])
    # the programs' columns can go beyond the matrix
    shapes = [jax.ShapeDtypeStruct((rows + spare(), blocks * columns), stream.x.dtype)]
    options = {"columns": columns, "eps": eps, "activation": activation}
    (out,) = _call("gated_projections", _gated, stream, [], [gate, up], shapes, (blocks,), tile, **options)
    return out[:rows, :width].reshape(*stream.x.shape[:-1], width)


def added(x: Float[Array, "B T F"], linear: Linear, stream: Stream, scale: Float[Array, " D"] | None) -> Stream:
    """The stream with a projection of x added; `scale` is that of the norm that follows, if one does."""
    shape, dtype, width = stream.x.shape, stream.x.dtype, linear.kernel.shape[1]
    columns = _columns(ADDED, width)
    blocks, rows = pl.cdiv(width, columns), math.prod(shape[:-1])
    options = {"columns": columns, "scaled": scale is not None}
    whole = jax.ShapeDtypeStruct((rows + spare(), blocks * columns), dtype)
    shapes = [whole, whole, jax.ShapeDtypeStruct((rows + spare(), blocks), jnp.float32)]
    arrays = [stream.x.reshape(rows, width), *(() if scale is None else (scale,))]
    # named by the width of x: so a profile distinguishes a layer's two products of this kind
    name, shapes = f"added_projection_{x.shape[-1]}", shapes[: 1 if scale is None else 3]
    outputs = _call(name, _added, Stream(x), arrays, [linear], shapes, (blocks,), ADDED, **options)
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
    programs: tuple[int, ...],
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
    most = max(16, X_BYTES // (tile_rows(rows) * x.dtype.itemsize))
    read = [x.reshape(rows, features), *squares, *arrays, *weights]
    return triton_call.call(
        _with_named_refs,
        read,
        shapes,
        programs,
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
        depth=max(16, min(tile.depth, most, pl.next_power_of_2(features))),
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
    row = jnp.arange(tile_rows(rows))[:, None]
    slot = load_slots(slot_ref, jnp.minimum(row, rows - 1))
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
                    store(q_ref, (head, store_lane), rotated[which])
                    store(q_before_rope_ref, (head, store_lane), plain[which])
                else:
                    cache_ref = keys_ref if number == 1 else values_ref
                    store_in_cache(cache_ref, rows, head, slot, store_lane, rotated[which])

        pl.when((program >= 0) & (program < heads * blocks))(compute)
        first_program += heads * blocks


def _normed(parts: list[Array], factors: list[Array], eps: float) -> list[Array]:
    """The parts of a head [ROWS, columns] over the head's root mean square, times the factors."""
    wide = [part.astype(jnp.float32) for part in parts]
    width = sum(part.shape[1] for part in wide)
    squares = sum((jnp.sum(part * part, axis=1) for part in wide), jnp.zeros(wide[0].shape[0], jnp.float32))
    inverse_rms = lax.rsqrt(squares / width + eps)[:, None]
    return [
        times_normed(part * inverse_rms, its[None, :], parts[0].dtype) for part, its in zip(wide, factors, strict=True)
    ]


def _projected(x: _Rows, matrices: list[Any], *out_refs: Any, columns: int, eps: float) -> None:
    """One program: some columns of a share of one matrix's rows."""
    first_program, share, count = 0, pl.program_id(1), out_refs[0].shape[1]
    for matrix, out_ref in zip(matrices, out_refs, strict=True):
        blocks = out_ref.shape[2] // columns
        block = pl.program_id(0) - first_program

        def compute(matrix: Any = matrix, out_ref: Any = out_ref, block: Array = block) -> None:
            column = block * columns + jnp.arange(columns)
            (product,) = _products(x, [(*matrix, column)], eps, (share, count))
            store(out_ref, (share, column[None, :]), product.astype(out_ref.dtype))

        pl.when((block >= 0) & (block < blocks))(compute)
        first_program += blocks


def _gated(x: _Rows, matrices: list[Any], out_ref: Any, *, columns: int, eps: float, activation: str) -> None:
    """One program: the same columns of both matrices."""
    column = pl.program_id(0) * columns + jnp.arange(columns)
    gate, up = _products(x, [(*matrix, column) for matrix in matrices], eps)
    # the GELU's tanh is a sigmoid of twice its argument
    bent = gate if activation == "silu" else 2 * GELU[0] * (gate + GELU[1] * gate * gate * gate)
    store(out_ref, (column[None, :],), (gate / (1 + jnp.exp(-bent)) * up).astype(out_ref.dtype))


def _added(x: _Rows, residual_ref: Any, *refs: Any, columns: int, scaled: bool) -> None:
    """One program: some columns."""
    *scale_ref, matrices, out_ref = refs[: 3 if scaled else 2]
    column = pl.program_id(0) * columns + jnp.arange(columns)
    width = residual_ref.shape[1]
    column_in_range, is_column = in_range(column, width)
    rows = residual_ref.shape[0]
    row_in_range = jnp.minimum(jnp.arange(tile_rows(rows)), rows - 1)[:, None]
    # loaded before the product, so that nothing waits for them after it
    residual = plt.load(residual_ref.at[row_in_range, column_in_range[None, :]])
    scale = plt.load(scale_ref[0].at[column_in_range]) if scaled else None
    (product,) = _products(x, [(*matrix, column) for matrix in matrices])
    out = (residual.astype(jnp.float32) + product).astype(out_ref.dtype)
    store(out_ref, (column[None, :],), out)
    if scale is not None:
        scaled_ref, squares_ref = refs[3:]
        store_scaled(out, scale, column, is_column, scaled_ref, squares_ref)


def _products(
    x: _Rows,
    parts: list[tuple[Any, Any, Array]],
    eps: float | None = None,
    share: tuple[Array, int] | None = None,
) -> list[Array]:
    """x times the given columns of each matrix, the bias added, float32 [ROWS, columns] each; rows beyond those of x
    are undefined. With `eps`, x is normed: its scale is in it already, and the root mean square divides the product.
    `share` is the number of one of several shares of the features, and their count: only it is multiplied."""
    rows, features = x.ref.shape
    row, lanes = jnp.arange(tile_rows(rows)), jnp.arange(x.depth)
    row_in_range, is_row = jnp.minimum(row, rows - 1)[:, None], (row < rows)[:, None]
    whole = features % x.depth == 0
    # what is needed after the loop is loaded before it
    squares, biases = None, []
    if eps is not None and x.squares_ref is not None:
        squares = load_squares(x.squares_ref, row_in_range)
    for kernel_ref, bias_ref, column in parts:
        column_in_range, _ = in_range(column, kernel_ref.shape[1])
        bias = None if bias_ref is None else plt.load(bias_ref.at[column_in_range])
        biases.append(bias if bias is None or share is None else jnp.where(share[0] == 0, bias, 0))

    def multiply_block(block: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        feature = block * x.depth + lanes
        is_feature = feature < features
        feature_in_range = feature if whole else jnp.minimum(feature, features - 1)
        x_block = plt.load(
            x.ref.at[row_in_range, feature_in_range[None, :]], mask=is_row & is_feature[None, :], other=0
        )
        sums_after = []
        for total, (kernel_ref, _, column) in zip(sums, parts, strict=True):
            column_in_range, is_column = in_range(column, kernel_ref.shape[1])
            tile = kernel_ref.at[feature_in_range[:, None], column_in_range[None, :]]
            if whole and is_column is None:
                weights = plt.load(tile)
            else:
                mask = is_feature[:, None] if is_column is None else is_feature[:, None] & is_column[None, :]
                weights = plt.load(tile, mask=jnp.broadcast_to(mask, (lanes.size, column.size)), other=0)
            sums_after.append(total + plt.dot(x_block, weights, allow_tf32=False))
        return tuple(sums_after)

    zeros = tuple(jnp.zeros((row.size, column.size), jnp.float32) for _, _, column in parts)
    first, end = 0, pl.cdiv(features, x.depth)
    if share is not None and share[1] > 1:
        blocks = pl.cdiv(end, share[1])
        first, end = share[0] * blocks, jnp.minimum((share[0] + 1) * blocks, end)
    products = list(lax.fori_loop(first, end, multiply_block, zeros))
    if squares is not None and eps is not None:
        inverse_rms = lax.rsqrt(jnp.sum(squares, axis=1) / features + eps)[:, None]
        products = [product * inverse_rms for product in products]
    return [
        product if bias is None else product + bias.astype(jnp.float32)[None, :]
        for product, bias in zip(products, biases, strict=True)
    ]
