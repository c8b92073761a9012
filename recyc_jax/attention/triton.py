"""How Triton kernels are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array

INTERPRET: bool = False
"""Run the kernels in Pallas' interpreter, for tests without a GPU."""


class _Launch(NamedTuple):
    """All that a call is known by, beside its arrays."""

    kernel: Callable[..., None]
    options: tuple[tuple[str, Any], ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    name: str
    warps: int
    stages: int
    work: pl.CostEstimate | None
    written: int  # of the last arrays
    interpret: bool


def call(
    kernel: Callable[..., None],
    arrays: Sequence[Array],
    shapes: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    name: str,
    *,
    warps: int,
    stages: int,
    work: pl.CostEstimate | None = None,
    in_place: Sequence[Array] = (),
    **options: Any,
) -> list[Array]:
    """A kernel's outputs, and after them the arrays of `in_place`, which it writes to. It gets references to the arrays, to
    those of `in_place` as they come in, to the outputs and to those of `in_place`, and the options by name, which have to
    be hashable.

    Calls that are alike, as those of a model's layers are, are traced and lowered once: else that would be half of
    the time that it takes to compile a decoder. So a kernel reads nothing that may change but its options and `INTERPRET`.
    """
    launch = _Launch(
        kernel,
        tuple(sorted(options.items())),
        tuple(shapes),
        grid,
        name,
        warps,
        stages,
        work,
        len(in_place),
        INTERPRET,
    )
    return _call((*arrays, *in_place), launch)


@functools.partial(jax.jit, static_argnames="launch")
def _call(arrays: tuple[Array, ...], launch: _Launch) -> list[Array]:
    first = len(arrays) - launch.written
    written = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays[first:]]
    return pl.pallas_call(
        functools.partial(launch.kernel, **dict(launch.options)),
        out_shape=[*launch.shapes, *written],
        grid=launch.grid,
        input_output_aliases={first + number: len(launch.shapes) + number for number in range(launch.written)},
        compiler_params=plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        cost_estimate=launch.work,
        interpret=launch.interpret,
        name=launch.name,
    )(*arrays)
