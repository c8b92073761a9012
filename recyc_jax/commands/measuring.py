"""Tools for timing steps: random states and weights, median times, kernel profiles, and copy bandwidth."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig
    from recyc_jax.policies.base import Policy


def filled(
    model: LlamaConfig,
    params: Any,
    policy: Policy,
    batch: int,
    length: int,
    steps: int,
    implementation: str | None,
    seed: int = 0,
) -> Any:
    """A prefilled state of `length - steps` tokens per row with random keys, values and prompt statistics, and room for
    `steps` more tokens; in shards if a mesh is set."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from recyc_jax import sharding
    from recyc_jax.prefilling import columns, read_prompts

    tokens, lengths = np.zeros((batch, max(1, length - steps)), np.int32), np.zeros(batch, np.int32)

    def shapes(params: Any, tokens: Any, lengths: Any) -> Any:
        return read_prompts(params, tokens, lengths, model, columns(steps) + 1, policy.needs, implementation)

    made = jax.eval_shape(shapes, params, tokens, lengths)

    def letters(leaf: Any) -> str:
        by_head = leaf.ndim > 2 and leaf.shape[1] == model.num_key_value_heads
        return "BK" if by_head else "B" if leaf.ndim and leaf.shape[0] == batch else ""

    state = random_like(made, seed, 1.0, jax.tree.map(lambda leaf: sharding.place_of(letters(leaf), batch), made))
    filled = dataclasses.replace(state.cache, length=jnp.asarray(state.prompt_slots, jnp.int32))
    row_lengths = jnp.full(batch, tokens.shape[1] + steps, jnp.int32)
    return dataclasses.replace(state, cache=filled, row_lengths=row_lengths, room=steps)


def random_like(shapes: Any, seed: int, scale: float, places: Any = None) -> Any:
    """Random arrays of these shapes: normal with standard deviation `scale` for floating-point leaves, zeros for the
    others; `places` has a sharding for each leaf (None: on one device). Each shape is compiled separately, because one
    program for all leaves of a model takes long to compile."""
    import jax
    import jax.numpy as jnp

    @functools.cache
    def normal(shape: tuple[int, ...], dtype: Any, place: Any) -> Callable[[Any], Any]:
        return jax.jit(lambda key: scale * jax.random.normal(key, shape, dtype), out_shardings=place)

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(leaf: Any, key: Any, place: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return normal(leaf.shape, leaf.dtype, place)(key)
        return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), place)

    where = [None] * len(leaves) if places is None else tree.flatten_up_to(places)
    return tree.unflatten([fill(*its) for its in zip(leaves, keys, where, strict=True)])


def copy_bandwidth() -> float:
    """The device's bandwidth in GB/s, read plus written, when it copies a large array."""
    import jax
    import jax.numpy as jnp

    size, copies = (2**30, 20) if jax.default_backend() != "cpu" else (2**28, 1)
    array = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> Any:
        nonlocal array
        for _ in range(copies):  # several in sequence, so that launch overhead does not count
            array = add(array)
        return array

    return round(2 * size * copies / 1e6 / median_ms(copy, 5), 1)


def kernel_times(run: Callable[[], Any]) -> dict[str, list[float]]:
    """By name, the microseconds of each launch of a GPU kernel in `run`, from JAX's profiler, after a warm-up."""
    import tempfile
    from pathlib import Path

    import jax
    from jax.profiler import ProfileData

    jax.block_until_ready(run())
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for file in Path(folder).rglob("*.xplane.pb"):
            for plane in ProfileData.from_file(str(file)).planes:
                for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                    for event in line.events if "Stream" in line.name else ():
                        took.setdefault(event.name, []).append(event.duration_ns / 1000)
    return took


def profile(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The GPU kernels that `run` launches, each with its number of launches and total microseconds, slowest first."""
    found = [
        {"kernel": name, "times": len(times), "us": round(sum(times), 1)} for name, times in kernel_times(run).items()
    ]
    return sorted(found, key=lambda one: -one["us"])


def describe_profile(kernels: list[dict[str, Any]], most: int = 16) -> str:
    """The `most` slowest kernels of `profile`, one per line, and the total of all kernels."""
    lines = [f"  {one['us']:10.1f} us  {one['times']:5d} x  {one['kernel']}" for one in kernels[:most]]
    return "\n".join([*lines, f"  {sum(one['us'] for one in kernels):10.1f} us in all"])


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    import jax

    jax.block_until_ready(run())  # warm-up: compiles
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)
