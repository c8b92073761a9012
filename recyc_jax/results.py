"""What a generation returns, and what each step records for it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Array  # int32 [B, max_new_tokens]: pad_id after a row's end
    lengths: Array  # int32 [B]: new tokens of each row, its eos included
    full_steps: Array  # int32 [B, L]: full-attention decode steps within `lengths`; prefill not counted. L counts
    # the layers with full attention, not those with a sliding window


class LosslessGeneration(NamedTuple):
    """What `generate` returns under a `Lossless` policy: a `Generation`, whose `full_steps` are passes of full attention
    over blocks, and how many of the drafts were kept."""

    tokens: Array
    lengths: Array
    full_steps: Array
    drafted: Array  # int32 [B]
    accepted: Array  # int32 [B]


class ScoredGeneration(NamedTuple):
    """What `generate` returns with `top_log_probabilities`: a `Generation`, and the log-probabilities under the model
    itself."""

    tokens: Array
    lengths: Array
    full_steps: Array
    log_probabilities: Array  # float32 [B, max_new_tokens]: of each token
    top_tokens: Array  # int32 [B, max_new_tokens, n]: the n most likely ones in each place
    top_log_probabilities: Array  # float32 [B, max_new_tokens, n]


AnyGeneration: TypeAlias = Generation | LosslessGeneration | ScoredGeneration


def columns(rows: int, new_tokens: int, pad_id: int, top: int | None) -> tuple[Array, ...]:
    """Empty columns for what `recorded` records."""
    tokens = jnp.full((rows, new_tokens), pad_id, jnp.int32)
    if top is None:
        return (tokens,)
    zeros = jnp.zeros((rows, new_tokens, top), jnp.float32)
    return tokens, jnp.zeros((rows, new_tokens), jnp.float32), zeros.astype(jnp.int32), zeros


def recorded(logits: Array, token: Array, top: int | None) -> tuple[Array, ...]:
    """The token, and its log-probability and the `top` most likely ones if asked for."""
    if top is None:
        return (token,)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    its = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
    best, ids = lax.top_k(log_probabilities, top)
    return token, its, ids.astype(jnp.int32), best
