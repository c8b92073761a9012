"""Which slots to keep: pooling of attention scores and exact top-k."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def pool(
    scores: Float[Array, "B K S"], visible: Bool[Array, "B S"], width: int, lookahead: int = 0
) -> Float[Array, "B K S"]:
    """Max-pooled scores: slot j takes the maximum of slots `j - width // 2 - lookahead` to `j + width // 2`.

    `lookahead=0` is the paper's centred window (section 3.1; odd `width`). A positive `lookahead` (ours) also keeps
    the tokens that follow an attended one. Invisible slots add nothing and come out as -inf.
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


def listed(scores: Float[Array, "B K S"], slots: Int[Array, "B K R"]) -> Bool[Array, "B K S"]:
    """Which slots `top_slots` of these scores has listed, without a scatter: those before the last one in its order."""
    last = slots[..., -1:]
    least = jnp.take_along_axis(scores, jnp.maximum(last, 0), axis=2)
    at = jnp.arange(scores.shape[2], dtype=jnp.int32)
    before = (scores > least) | ((scores == least) & (at <= last))
    return jnp.where(last < 0, scores > -jnp.inf, before)
