"""Calls of Triton kernels: alike calls share one trace, and outputs can be written in place."""

from __future__ import annotations

import contextlib
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
    """Everything that distinguishes two calls, besides their arrays."""

    kernel: Callable[..., None]
    options: tuple[tuple[str, Any], ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    name: str
    warps: int
    stages: int
    work: pl.CostEstimate | None
    written: int  # how many of the last arrays are written in place
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
    """The kernel's outputs of these shapes, then the arrays of `in_place`, which it writes to.

    The kernel gets references to the arrays, to the arrays of `in_place` (as inputs), to the outputs and to the arrays
    of `in_place` (as outputs), and the options as keywords, which must be hashable.

    Alike calls, such as those of a model's layers, are traced and lowered once, which otherwise takes half of the time
    to compile a decoder. So a kernel must not depend on anything that can change but its options and `INTERPRET`."""
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
    return list(_call((*arrays, *in_place), launch))


@functools.partial(jax.jit, static_argnames="launch")
def _call(arrays: tuple[Array, ...], launch: _Launch) -> Sequence[Array]:
    first = len(arrays) - launch.written
    written = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays[first:]]
    run = pl.pallas_call(
        functools.partial(launch.kernel, **dict(launch.options)),
        out_shape=[*launch.shapes, *written],
        grid=launch.grid,
        input_output_aliases={first + number: len(launch.shapes) + number for number in range(launch.written)},
        compiler_params=plt.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        cost_estimate=launch.work,
        interpret=launch.interpret,
        name=launch.name,
    )
    with _in_32_bits():
        return run(*arrays)


def _in_32_bits() -> contextlib.AbstractContextManager[Any]:
    """A context in which the loop indices and sums of a kernel have 32 bits, as the kernels take them to have, where the
    user's program runs with jax_enable_x64."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    return jax.experimental.disable_x64()  # jax 0.7  # pyright: ignore[reportAttributeAccessIssue]
