"""The flags `--backend` and `--tensor`: which devices a command uses, and the mesh over them."""

from __future__ import annotations

import contextlib
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
    except RuntimeError as error:
        raise ValueError(f"--backend {backend}: JAX found no usable device ({str(error).splitlines()[0]})") from None
    if backend not in ("auto", devices[0].platform):
        kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
        raise ValueError(f"--backend {backend}: no such device; JAX found {len(devices)} x {', '.join(kinds)}")
    if jax.process_count() > 1 and not several_hosts:
        raise ValueError(f"this command runs on one host, and {jax.process_count()} have found each other")


def on(mesh: Any) -> contextlib.AbstractContextManager[Any]:
    """A context that sets the mesh for all compilation within it; an empty context if `mesh` is None."""
    import jax

    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh(tensor: int, config: Any, batch_size: int) -> Any:
    """A mesh over all devices of the run, in which groups of `tensor` devices share each row's heads (0: the largest
    groups that divide devices and model); None for a single device. Prints a line where `batch_size` rows do not divide
    among the groups. Raises ValueError if `tensor` does not divide the number of devices or the model's dimensions."""
    import jax

    from recyc_jax import sharding

    devices = jax.device_count()
    if tensor == 0:
        tensor = max(size for size in range(1, devices + 1) if devices % size == 0 and _divides(config, size))
    if devices % tensor:
        raise ValueError(f"--tensor {tensor} does not divide the {devices} devices that there are")
    sharding.check_divides(config, 1, tensor)
    if devices == 1:
        return None
    groups = devices // tensor
    if batch_size % groups and jax.process_index() == 0:
        print(
            f"--batch-size {batch_size} does not divide among {groups} groups of devices: each computes every row; a "
            f"multiple of {groups} would share them",
            flush=True,
        )
    return sharding.mesh(groups, 1, tensor)


def _divides(config: Any, tensor: int) -> bool:
    from recyc_jax import sharding

    try:
        sharding.check_divides(config, 1, tensor)
    except ValueError:
        return False
    return True
