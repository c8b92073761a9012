"""Attention in training by name."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from recyc_jax.attention import api, training
from recyc_jax.attention.training import Attention, Recycle

IMPLEMENTATIONS = ("reference", "cudnn", "pallas")
"""Plain JAX; cuDNN's causal attention, recycled in plain JAX; cuDNN's, recycled by kernels for NVIDIA GPUs."""


def attention(implementation: str, recycle: Recycle | None) -> Attention:
    """The implementation of that name, of ordinary attention if `recycle` is None. Raises ValueError for an unknown one."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is unknown; there is {', '.join(IMPLEMENTATIONS)}")
    dense = training.causal if implementation == "reference" else training.causal_cudnn
    if recycle is None:
        return dense
    if implementation != "pallas":
        return lambda q, k, v, segments: training.recycled(q, k, v, recycle, dense)
    from recyc_jax.attention import training_gpu  # Triton is imported where it is wanted

    return lambda q, k, v, segments: training_gpu.recycled(q, k, v, recycle, dense)


def lacking(implementation: str, dtype: Any, head_dim: int, packed: bool) -> list[str]:
    """What this implementation needs and hasn't here, in words. `packed`: rows hold several documents."""
    if implementation == "reference":
        return []
    capability = _capability()
    gpu = {
        "cudnn": ("an NVIDIA GPU of compute capability 8.0 or more", _number(capability) >= 8),
        "pallas": (f"an NVIDIA GPU of compute capability {', '.join(api.ROOMY)}", capability in api.ROOMY),
    }
    needs = dict([gpu[implementation]]) | {
        "a 16-bit dtype": jnp.dtype(dtype).itemsize == 2,
        "one document a row": not packed,
        "a head dimension that is a multiple of 8, at most 128": head_dim % 8 == 0 and head_dim <= 128,
    }
    if implementation == "pallas":
        needs["a JAX with Pallas' Triton backend"] = _imports("recyc_jax.attention.training_gpu")
    return [name for name, there in needs.items() if not there]


def choose(flag: str, name: str, recycle: bool, dtype: Any, head_dim: int, packed: bool) -> str:
    """The implementation that a flag names, or for "auto" the best. Raises ValueError for one that can't be had here."""
    if name == "auto":
        return best(recycle, dtype, head_dim, packed)
    if needs := lacking(name, dtype, head_dim, packed):
        raise ValueError(f"{flag} {name} needs {' and '.join(needs)}")
    return name


def best(recycle: bool, dtype: Any, head_dim: int, packed: bool) -> str:
    """The first of pallas (for recycled forms, on the GPUs that it was compiled for, H100 and H200), cudnn and reference
    that lacks nothing here."""
    kernels = recycle and _capability() == "9.0"
    names = ("pallas", "cudnn", "reference") if kernels else ("cudnn", "reference")
    return next(name for name in names if not lacking(name, dtype, head_dim, packed))


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _capability() -> str:
    """The CUDA compute capability of the first device; empty where it has none."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def _number(capability: str) -> float:
    try:
        return float(capability)
    except ValueError:  # ROCm's is a name
        return 0
