"""Implementations of attention in training, by name."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from recyc_jax import implementations
from recyc_jax.attention import whole_sequence
from recyc_jax.attention.whole_sequence import Attention, Recycle

IMPLEMENTATIONS = ("reference", "cudnn", "pallas")
"""reference: plain JAX. cudnn: cuDNN's causal attention, and recycled attention in plain JAX. pallas: cuDNN's causal
attention, and recycled attention in kernels for NVIDIA GPUs."""


def attention(implementation: str, recycle: Recycle | None) -> Attention:
    """The attention function of the implementation of that name; ordinary causal attention if `recycle` is None. Raises
    ValueError for an unknown name."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is unknown; there is {', '.join(IMPLEMENTATIONS)}")
    dense = whole_sequence.causal if implementation == "reference" else whole_sequence.causal_cudnn
    if recycle is None:
        return dense
    if implementation != "pallas":
        return lambda q, k, v, segments: whole_sequence.recycled(q, k, v, recycle, dense)
    from recyc_jax.kernels.gpu.whole_sequence import recycled  # only here, because it imports Triton

    return lambda q, k, v, segments: recycled.recycled(q, k, v, recycle, dense)


def sliding(implementation: str, window: int | None) -> Attention:
    """The attention function of layers with a sliding window; the causal one if `window` is None."""
    dense = whole_sequence.causal if implementation == "reference" else whole_sequence.causal_cudnn
    return functools.partial(dense, window=window)


def lacking(implementation: str, dtype: Any, head_dim: int, packed: bool) -> list[str]:
    """The requirements of this implementation that the current device or the arguments do not meet, in words.
    `packed`: rows hold several documents."""
    if implementation == "reference":
        return []
    capability = _capability()
    gpu = {
        "cudnn": ("an NVIDIA GPU of compute capability 8.0 or more", _number(capability) >= 8),
        "pallas": (
            f"an NVIDIA GPU of compute capability {', '.join(implementations.COMPUTE_CAPABILITIES)}",
            capability in implementations.COMPUTE_CAPABILITIES,
        ),
    }
    needs = dict([gpu[implementation]]) | {
        "a 16-bit dtype": jnp.dtype(dtype).itemsize == 2,
        "one document a row": not packed,
        "a head dimension that is a multiple of 8, at most 128": head_dim % 8 == 0 and head_dim <= 128,
    }
    if implementation == "pallas":
        needs["a JAX with Pallas' Triton backend"] = _imports("recyc_jax.kernels.gpu.whole_sequence.recycled")
    return [name for name, is_met in needs.items() if not is_met]


def choose(flag: str, name: str, recycle: bool, dtype: Any, head_dim: int, packed: bool) -> str:
    """The implementation that a flag names, or the best one for "auto". Raises ValueError if the named implementation
    lacks a requirement on the current device."""
    if name == "auto":
        return best(recycle, dtype, head_dim, packed)
    if needs := lacking(name, dtype, head_dim, packed):
        raise ValueError(f"{flag} {name} needs {' and '.join(needs)}")
    return name


def best(recycle: bool, dtype: Any, head_dim: int, packed: bool) -> str:
    """The first of pallas, cudnn and reference that lacks no requirement on the current device. pallas is considered
    only for recycled forms, on the GPUs that it was compiled for: H100 and H200."""
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
    """The CUDA compute capability of the first device; empty if the device has none."""
    return str(getattr(jax.devices()[0], "compute_capability", ""))


def _number(capability: str) -> float:
    try:
        return float(capability)
    except ValueError:  # the capability of a ROCm device is a name
        return 0.0
