"""Samplers: how the next token is chosen from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key


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

    Row b draws the token of step s with the key `fold_in(row_keys[b], s)`, so its draws do not depend on other rows.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; use Greedy() for the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")

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
            descending = -jnp.sort(-logits, axis=-1)
            probabilities = jax.nn.softmax(descending, axis=-1)
            # a token is kept while the total probability of the tokens *before* it is below top_p, so the most likely
            # token is always kept
            is_kept = jnp.cumsum(probabilities, axis=-1) - probabilities < self.top_p
            threshold = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < threshold, -jnp.inf, logits)
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
        return draw(row_keys, logits).astype(jnp.int32)
