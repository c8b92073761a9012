"""Samplers: how the next token is chosen from logits."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from recyc_jax.validation import whole_number


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Chooses the most likely token; ties go to the lower id."""

    def __call__(
        self, logits: Float[Array, "B V"], row_keys: Key[Array, " B"] | None, step: Int[Array, ""]
    ) -> Int[Array, " B"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draws from the softmax of `logits / temperature`, restricted to the `top_k` most likely tokens and then to the
    smallest set of them whose probability reaches `top_p`. None restricts nothing; the order of the two restrictions is
    that of Hugging Face's logits warpers.

    Row b draws the token of step s with the key `fold_in(row_keys[b], s)`, so its draws do not depend on other rows;
    keys of JAX's other generators than threefry are turned into threefry keys for that (`independent`).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; use Greedy() for the most likely token")
        if self.top_k is not None:
            whole_number("top_k", self.top_k, 1)
        if self.top_p is not None and not (isinstance(self.top_p, float | int) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]")

    def __call__(
        self, logits: Float[Array, "B V"], row_keys: Key[Array, " B"] | None, step: Int[Array, ""]
    ) -> Int[Array, " B"]:
        if row_keys is None:
            raise ValueError("sampling needs a key: pass key=jax.random.key(seed)")
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            threshold = lax.top_k(logits, self.top_k)[0][:, -1:]
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        if self.top_p is not None and self.top_p < 1:
            logits = jax.vmap(functools.partial(_nucleus, top_p=self.top_p))(logits)
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
        return draw(independent(row_keys), logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, " V"], top_p: float) -> Float[Array, " V"]:
    """The logits of the smallest set of most likely tokens whose probability reaches `top_p`, -inf for the others. Of
    equal tokens at the edge of the set those with lower ids are kept."""
    order = jnp.argsort(-logits)[::-1]  # from the least likely on; of equal tokens the higher id first
    # as transformers sums: a token is dropped while it and all less likely ones together have at most 1 - top_p
    is_kept = jnp.cumsum(jax.nn.softmax(logits[order])) > 1 - top_p
    is_kept = is_kept.at[-1].set(True)
    return jnp.where(jnp.zeros_like(is_kept).at[order].set(is_kept), logits, -jnp.inf)


def independent(keys: Key[Array, "..."]) -> Key[Array, "..."]:
    """Keys that draw the same numbers whatever other keys a `jax.vmap` draws with: threefry keys as they are, others
    (`rbg`, `unsafe_rbg`, whose batches draw from their first key alone) as threefry keys made of their bits."""
    if str(jax.random.key_impl(keys)) == "threefry2x32":
        return keys

    def fold(words: Array) -> Key[Array, ""]:
        key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        for word in words[2:]:
            key = jax.random.fold_in(key, word)
        return key

    words = jax.random.key_data(keys)
    flat = jax.vmap(fold)(words.reshape(-1, words.shape[-1]))
    return flat.reshape(keys.shape)
