"""The `--backend` flag: settled before JAX first looks for devices."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "cpu", "gpu", "tpu"]


def select(backend: Backend) -> None:
    """Make JAX use this backend. Raises ValueError, naming what was found, where the machine lacks it."""
    import jax

    if backend == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise ValueError(f"--backend {backend}: JAX found no usable device ({str(error).splitlines()[0]})") from None
    if backend not in ("auto", devices[0].platform):
        kinds = sorted({f"{device.platform} ({device.device_kind})" for device in devices})
        raise ValueError(f"--backend {backend}: no such device; JAX found {len(devices)} x {', '.join(kinds)}")
