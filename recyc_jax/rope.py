"""Rotary position embeddings, in the half-split convention of Hugging Face's Llama. Letters: P rotated pairs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from recyc_jax.config import LlamaConfig
from recyc_jax.rope_scaling import RopeScaling


class Rotation(NamedTuple):
    """How a layer rotates the first 2 P dimensions of each head."""

    cos: Array  # float32 [B, T, P]: bfloat16 cannot hold every position past 256
    sin: Array  # float32 [B, T, P]


class Positions(NamedTuple):
    """What positions mean to a layer's queries and keys."""

    rotation: Rotation | None  # None: the layer has no RoPE
    query_multiplier: Any = None  # float32 [B, T], a number, or None for 1: what queries are multiplied by after RoPE


def by_layer(config: LlamaConfig, positions: Int[Array, "B T"], row_lengths: Int[Array, " B"]) -> tuple[Positions, ...]:
    """For each layer what the positions mean to it; alike layers share one object. `row_lengths` are the tokens of each
    row, new ones included, by which dynamic and longrope scaling choose a row's frequencies once for all."""
    multiplier = _query_multiplier(config, positions)
    full = Positions(rotation(config, positions, row_lengths), multiplier)
    sliding = full
    if config.sliding_rope_theta is not None:
        unscaled = _powers(config.sliding_rope_theta, config.rotary_dim)
        sliding = Positions(_rotation(positions, 1.0 / unscaled, 1.0), multiplier)
    without = Positions(None, multiplier)
    return tuple(
        without if layer in config.layers_without_rope else sliding if config.window(layer) else full
        for layer in range(config.num_hidden_layers)
    )


def rotation(config: LlamaConfig, positions: Int[Array, "B T"], row_lengths: Int[Array, " B"]) -> Rotation:
    """Cosine and sine of every pair's angle in layers with full attention, times the scaling's amplitude."""
    amplitude = 1.0 if config.rope_scaling is None else config.rope_scaling.amplitude
    return _rotation(positions, frequencies(config, row_lengths), amplitude)


def rotate(x: Float[Array, "B T heads H"], rotation: Rotation) -> Float[Array, "B T heads H"]:
    """x with its pairs (i, i + P) rotated by their angles, in x's dtype; the rotation is computed in float32."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    pairs = cos.shape[-1]
    if 2 * pairs == x.shape[-1]:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    first, second, rest = jnp.split(x.astype(jnp.float32), [pairs, 2 * pairs], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)


def _rotation(positions: Array, inverse: Any, amplitude: float) -> Rotation:
    theta = positions[..., None].astype(jnp.float32) * inverse
    if amplitude == 1:
        return Rotation(jnp.cos(theta), jnp.sin(theta))
    return Rotation(jnp.cos(theta) * amplitude, jnp.sin(theta) * amplitude)


def _query_multiplier(config: LlamaConfig, positions: Array) -> Any:
    scaling, constant = config.rope_scaling, config.query_multiplier
    if scaling is None or scaling.llama_4_scaling_beta == 0:
        return None if constant == 1 else constant
    spans = positions // scaling.original_max_position_embeddings
    return constant * (1 + scaling.llama_4_scaling_beta * jnp.log1p(spans.astype(jnp.float32)))


# --- frequencies ------------------------------------------------------------------------------------------------------


def frequencies(config: LlamaConfig, row_lengths: Int[Array, " B"]) -> Any:
    """Radians per position of each rotated pair, float32 [P], or [B, 1, P] where they depend on the length of a row,
    with the config's RoPE scaling."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "longrope":
        is_long = row_lengths > scaling.original_max_position_embeddings
        short, long = (
            (1.0 / (np.asarray(factors, np.float32) * _powers(config.rope_theta, config.rotary_dim))).astype(np.float32)
            for factors in (scaling.short_factor, scaling.long_factor)
        )
        return jnp.where(is_long[:, None, None], long, short)
    if scaling is not None and scaling.kind == "dynamic":
        dim, context = config.rotary_dim, config.max_position_embeddings
        stretch = jnp.maximum(row_lengths, context).astype(jnp.float32) * (scaling.factor / context)
        theta = config.rope_theta * (stretch - (scaling.factor - 1)) ** (dim / (dim - 2))
        return 1.0 / theta[:, None, None] ** _exponents(dim)
    return inverse_frequencies(config)


def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """`frequencies` of scalings that do not depend on the length of a row."""
    plain = (1.0 / _powers(config.rope_theta, config.rotary_dim)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return (plain / np.float32(scaling.factor)).astype(np.float32)
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "yarn":
        return _yarn(plain, config, scaling)
    if scaling.kind == "proportional":
        turning = int(config.partial_rotary_factor * config.head_dim // 2)
        return np.where(np.arange(plain.size) < turning, plain / np.float32(scaling.factor), 0).astype(np.float32)
    raise ValueError(f"the frequencies of {scaling.kind} RoPE depend on the length of a row")


def _exponents(dim: int) -> np.ndarray:
    return np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)


def _powers(theta: float, dim: int) -> np.ndarray:
    """Positions per radian of each of `dim // 2` pairs, float32."""
    return np.float32(theta) ** _exponents(dim)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """The Llama-3.1 rule keeps the frequencies of short wavelengths, divides those of long wavelengths by `factor`, and
    blends the two in between."""
    rotations = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * plain / scaling.factor + smooth * plain).astype(np.float32)


def _yarn(plain: np.ndarray, config: LlamaConfig, scaling: RopeScaling) -> np.ndarray:
    dim, original = config.rotary_dim, scaling.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        """The (fractional) number of the pair that turns so many times within the original length."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # as in transformers: no division by zero
    blend = np.clip((np.arange(dim // 2, dtype=np.float32) - first) / (last - first), 0, 1)
    return (plain / np.float32(scaling.factor) * blend + plain * (1 - blend)).astype(np.float32)
