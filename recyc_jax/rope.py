"""Rotary position embeddings, in the half-split convention of Hugging Face's Llama."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recyc_jax.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [H // 2], with the config's RoPE scaling.

    The Llama-3.1 rule keeps the frequencies of short wavelengths, divides those of long wavelengths by `factor`, and
    blends the two in between.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / np.float32(scaling.factor)).astype(np.float32)
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * frequencies / scaling.factor + smooth * frequencies).astype(np.float32)


def angles(config: LlamaConfig, positions: Int[Array, "B T"]) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of every pair's angle (H2 = H // 2), float32: bfloat16 cannot hold every position past 256."""
    theta = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(theta), jnp.sin(theta)


def rotate(
    x: Float[Array, "B T heads H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T heads H"]:
    """x with its pairs (i, i + H // 2) rotated by their angles, in x's dtype; the rotation is computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
