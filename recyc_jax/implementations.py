"""Attention implementations by name. None chooses, and falls back to plain JAX; any name runs as asked or raises."""

from __future__ import annotations

import functools
import importlib
import logging

import jax

from recyc_jax import sharding
from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.split_slots import SplitSlots

IMPLEMENTATIONS = {
    "reference": "recyc_jax.attention.implementation:Implementation",
    "pallas_gpu": "recyc_jax.kernels.gpu.implementation:GPU",
    "pallas_tpu": "recyc_jax.kernels.tpu.implementation:TPU",
}
"""Module and class by name; the kernels' modules are imported when they are first asked for."""

KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}
"""The kernels' implementation by the platform that JAX runs on."""

COMPUTE_CAPABILITIES = ("8.0", "9.0", "10.0", "10.3")
"""Those of the NVIDIA GPUs with the shared memory that the kernels take: A100, H100, B200 and their kin."""


@functools.cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


@functools.cache
def _made(place: str) -> Implementation:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)()


def resolve(name: str | None) -> Implementation:
    """The implementation of that name; `"pallas"` is that of the platform that JAX runs on. None: the same kernels, if
    the platform has some, the GPU has enough shared memory and this JAX can import them; otherwise plain JAX
    (`"reference"`), with a warning in the log where kernels exist but cannot be used.

    Where the mesh that is set splits the slots of full caches (`sharding.SEQUENCE`), each device runs it on its part
    (`split_slots.py`).

    Raises ValueError for an unknown name, for "pallas" on a platform without kernels, and for kernels that cannot run on
    a part of the slots.
    """
    found = _resolved(name)
    return found if sharding.unsplit() or sharding.slot_shares() == 1 else _split(found, name)


@functools.cache
def _split(inner: Implementation, name: str | None) -> Implementation:
    if name is None and inner.slots_last:
        _warn_once("TPU kernels do not read a part of a row's slots: attention runs in plain JAX over a sequence axis")
        inner = _made(IMPLEMENTATIONS["reference"])
    return SplitSlots(inner)


def _resolved(name: str | None) -> Implementation:
    if name is None:
        return _best()
    if name == "pallas":
        platform = jax.default_backend()
        if platform not in KERNELS:
            raise ValueError(
                f"implementation='pallas': there are no kernels for {platform}, only for {', '.join(KERNELS)}"
            )
        name = KERNELS[platform]
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; there is pallas, {', '.join(IMPLEMENTATIONS)}")
    return _made(IMPLEMENTATIONS[name])


def _best() -> Implementation:
    name = KERNELS.get(jax.default_backend(), "reference")
    if name == "pallas_gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability not in COMPUTE_CAPABILITIES:
            _warn_once(
                f"this GPU (compute capability {capability}) may lack the shared memory that the kernels need (they are "
                f"for {', '.join(COMPUTE_CAPABILITIES)}): attention runs in plain JAX"
            )
            name = "reference"
    try:
        return _made(IMPLEMENTATIONS[name])
    except ImportError as error:
        _warn_once(f"this JAX cannot import the kernels of {name} ({error}): attention runs in plain JAX")
        return _made(IMPLEMENTATIONS["reference"])
