"""What decode steps are measured with: states and weights of random numbers, a median time, a device's bandwidth."""

from __future__ import annotations

import dataclasses
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
    """A prefilled state of random keys, values and observations, with room for `steps` tokens."""
    import importlib

    import jax
    import jax.numpy as jnp
    import numpy as np

    prefill = importlib.import_module("recyc_jax.prefill")  # the package's `prefill` is the function
    tokens, lengths = np.zeros((batch, max(1, length - steps)), np.int32), np.zeros(batch, np.int32)

    def shapes(params: Any, tokens: Any, lengths: Any) -> Any:
        return prefill._prefill(params, tokens, lengths, model, steps, policy.observes, implementation)

    made = jax.eval_shape(shapes, params, tokens, lengths)
    state = random_like(made, seed, 1.0)
    filled = dataclasses.replace(state.cache, length=jnp.asarray(state.prompt_slots, jnp.int32))
    return dataclasses.replace(state, cache=filled)


def random_like(shapes: Any, seed: int, scale: float) -> Any:
    """Normal numbers of these shapes, zeros where they are whole; a program for each shape is soon compiled, one for all
    leaves of a model is not."""
    import jax
    import jax.numpy as jnp

    normal = jax.jit(lambda key, shape, dtype: scale * jax.random.normal(key, shape, dtype), static_argnums=(1, 2))
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(shapes))))

    def fill(leaf: Any) -> jax.Array:
        key = next(keys)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return normal(key, leaf.shape, leaf.dtype)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, shapes)


def copy_bandwidth() -> float:
    """GB/s that copies of a large array read and write."""
    import jax
    import jax.numpy as jnp

    size, copies = (2**30, 20) if jax.default_backend() != "cpu" else (2**28, 1)
    array = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> Any:
        nonlocal array
        for _ in range(copies):  # one after the other: starting them is not counted
            array = add(array)
        return array

    return round(2 * size * copies / 1e6 / median_ms(copy, 5), 1)


def kernel_times(run: Callable[[], Any]) -> dict[str, list[float]]:
    """The microseconds of each time that a GPU's kernels run in `run`, by name, from JAX's profiler; once warm."""
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
    """A GPU's kernels in `run`, how often each runs and the microseconds that it takes in all, the costliest first."""
    found = [
        {"kernel": name, "times": len(times), "us": round(sum(times), 1)} for name, times in kernel_times(run).items()
    ]
    return sorted(found, key=lambda one: -one["us"])


def describe_profile(kernels: list[dict[str, Any]], most: int = 16) -> str:
    """The costliest of `profile`, a line each."""
    lines = [f"  {one['us']:10.1f} us  {one['times']:5d} x  {one['kernel']}" for one in kernels[:most]]
    return "\n".join([*lines, f"  {sum(one['us'] for one in kernels):10.1f} us in all"])


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    import jax

    jax.block_until_ready(run())  # warm
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)
