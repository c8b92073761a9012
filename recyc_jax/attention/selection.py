"""Which slots to keep: scores of a full step, their pooling, and exact top-k."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def group_maximum(log_probabilities: Float[Array, "B K G S"]) -> Float[Array, "B K S"]:
    """Each slot's score: the maximum over the query heads of a group (section 3.1 of the paper)."""
    # without the barrier XLA may fuse the maximum into the pooling that follows and compute it once per window element
    return lax.optimization_barrier(jnp.max(log_probabilities, axis=2))


def pool(
    scores: Float[Array, "B K S"], visible: Bool[Array, "B S"], width: int, lookahead: int = 0
) -> Float[Array, "B K S"]:
    """Max-pooled scores: slot j takes the maximum of slots `j - width // 2 - lookahead` to `j + width // 2`.

    `lookahead=0` is the paper's centred window (section 3.1; odd `width`). A positive `lookahead` (ours) also keeps
    the tokens that follow an attended one. Slots that are not visible add nothing and come out as -inf.
    """
    hidden = ~visible[:, None, :]
    scores = jnp.where(hidden, -jnp.inf, scores)
    half = width // 2
    pooled = lax.reduce_window(
        scores,
        np.float32(-np.inf),
        lax.max,
        window_dimensions=(1, 1, width + lookahead),
        window_strides=(1, 1, 1),
        padding=((0, 0), (0, 0), (half + lookahead, half)),
    )
    return jnp.where(hidden, -jnp.inf, pooled)


def top_slots(scores: Float[Array, "*heads S"], budget: int) -> Int[Array, "*heads R"]:
    """The R = min(budget, S) best slots in rank order, ties to the lower slot; -1 where the score is -inf."""
    best, slots = lax.top_k(scores, min(budget, scores.shape[-1]))
    return jnp.where(best == -jnp.inf, -1, slots.astype(jnp.int32))
