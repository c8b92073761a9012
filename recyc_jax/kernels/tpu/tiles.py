"""Sizes and products that the TPU kernels share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

LANES = 128
BLOCK = 2048
"""Slots per grid step of the decode kernels. At 128 bfloat16 numbers per slot a step reads 1 MiB of keys and values,
which takes a v5e some 1.3 us of its memory bandwidth and hides the 0.3 us that a grid step costs."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `size`."""
    return -(-size // multiple) * multiple


def precision(array: Any) -> lax.Precision:
    """The precision of products of this array. Float32 needs `HIGHEST`: a TPU's default precision would round float32
    inputs. Bfloat16 has only the default precision."""
    return lax.Precision.HIGHEST if array.dtype == jnp.float32 else lax.Precision.DEFAULT


def sum_over_slots(weights: Array, stored: Array) -> Array:
    """The product [G, W] x [H, W] -> [G, H], summed over the slots, in float32."""
    return lax.dot_general(
        weights, stored, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=precision(stored)
    )
