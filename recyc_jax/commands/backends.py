"""The flags `--backend` and `--mesh`: which devices a command uses, and the mesh over them."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Literal

Backend = Literal["auto", "cpu", "gpu", "tpu"]


def select(backend: Backend, several_hosts: bool = False) -> None:
    """Make JAX use this backend, on all hosts of the run; must be called before JAX first queries devices. Raises
    ValueError that names the devices found if the backend has none, or if a command that is not for several hosts runs
    on several."""
    import jax

    from recyc_jax.commands import hosts

    if backend == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if not jax.distributed.is_initialized():
        hosts.join()
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS names a plugin that is not there
        words = str(error).splitlines() or [f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"]
        raise ValueError(f"--backend {backend}: JAX found no usable device ({words[0]})") from None
    if backend not in ("auto", devices[0].platform):
        kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
        raise ValueError(f"--backend {backend}: no such device; JAX found {len(devices)} x {', '.join(kinds)}")
    if jax.process_count() > 1 and not several_hosts:
        raise ValueError(f"this command runs on one host, and {jax.process_count()} have found each other")


def on(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """A context that sets the mesh for all compilation within it; an empty context if `mesh` is None."""
    import jax

    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh(spec: str, config: Any, batch_size: int) -> Any:
    """The mesh that `--mesh` names; None for a single device. `data=D` groups of devices take rows apart, `sequence=S`
    devices share the slots of a row's full cache (1 if it is not named), `tensor=T` devices share heads of a row. Which of
    `data` and `tensor` is not named follows from the number of devices, and `auto` chooses both: as many groups as
    `batch_size` divides among, as long as a device has memory for its share of the weights and as much again. Raises
    ValueError, naming the flag, for what does not divide the devices, the model or the batch."""
    import jax

    from recyc_jax import sharding

    named = _axes(spec)
    sequence = named.get("sequence", 1)
    if jax.device_count() % sequence:
        raise ValueError(f"--mesh {spec} is not of the {jax.device_count()} devices that there are")
    devices = jax.device_count() // sequence  # for each share of the slots
    shares = [size for size in range(1, devices + 1) if devices % size == 0]
    if "tensor" in named:
        tensor = named["tensor"]
    elif "data" in named:
        tensor = devices // named["data"]
    else:
        possible = [size for size in shares if _divides(config, size)]
        fits = [size for size in possible if batch_size % (devices // size) == 0 and _has_room(config, size)]
        tensor = min(fits, default=max(possible))
    data = named.get("data", devices // tensor)
    if data * tensor != devices:
        raise ValueError(f"--mesh {spec} is not of the {jax.device_count()} devices that there are")
    sharding.check_divides(config, 1, tensor)
    if jax.device_count() == 1:
        return None
    if batch_size % data and jax.process_index() == 0:
        print(
            f"--batch-size {batch_size} does not divide among {data} groups of devices: each computes every row; a "
            f"multiple of {data} would share them",
            flush=True,
        )
    return sharding.mesh(data, 1, tensor, sequence=sequence, kv_heads=config.num_key_value_heads)


def _axes(spec: str) -> dict[str, int]:
    """The sizes that `--mesh` names."""
    if spec == "auto":
        return {}
    named = {}
    for item in spec.split(","):
        name, _, size = item.strip().partition("=")
        if name not in ("data", "tensor", "sequence") or name in named or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {spec}: {item.strip()!r} is none of data=N, tensor=N and sequence=N (such as data=2,tensor=2)"
            )
        named[name] = int(size)
    return named


def _has_room(config: Any, tensor: int) -> bool:
    """Whether a device has memory for its share of 16-bit weights and as much again; True where its size is not known."""
    import jax

    import recyc_jax as rj

    size = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if size is None:
        return True
    shapes = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0)))
    weights = 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return 2 * weights <= size * tensor


def _divides(config: Any, tensor: int) -> bool:
    from recyc_jax import sharding

    try:
        sharding.check_divides(config, 1, tensor)
    except ValueError:
        return False
    return True
