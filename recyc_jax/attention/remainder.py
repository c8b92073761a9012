"""The tokens that a step does not read, as one token that stands for all of them.

Letters: B batch, N query heads, K key/value heads, G = N // K, H head dim.

The attention that a query q pays to a set of tokens with keys k_i and values v_i enters the softmax as the sum of
exp(q k_i / sqrt(H)). The logarithm of this sum is a convex function of q, whose gradient at a query q_0 is the mean of
the keys, weighted by their attention under q_0, over sqrt(H). So one token with that mean key, the mean value, and a
bias that makes it exact at q_0 stands for the whole set near q_0, and by convexity it never takes a larger part of the
softmax than the set itself would."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recyc_jax.cache import Leaf

LEAST = 1e-4
"""The least probability outside of a kept set that is told from rounding."""


@flax.struct.dataclass
class Moments:
    """Attention of one query per head over a set of tokens, all float32."""

    lse: Leaf  # [B, K, G]: the logsumexp of the scaled logits
    value: Leaf  # [B, K, G, H]: the attention output, which is the mean of the values under the attention
    key: Any = None  # [B, K, G, H]: the mean of the keys under the attention, where it was asked for


@flax.struct.dataclass
class Remainder:
    """One token for each query head that stands for the tokens outside of a kept set, all float32."""

    key: Leaf  # [B, K, G, H]
    value: Leaf  # [B, K, G, H]
    bias: Leaf  # [B, K, G]: is added to its scaled logits; -inf where it stands for nothing

    def share(self, q: Float[Array, "B N H"], kept: Moments) -> Float[Array, "B K G"]:
        """The part of the softmax that this token takes from the tokens of `kept` under the query q."""
        grouped = q.reshape(self.key.shape).astype(jnp.float32)
        logit = jnp.sum(grouped * self.key, axis=-1) * q.shape[-1] ** -0.5 + self.bias
        return jax.nn.sigmoid(logit - kept.lse)

    def added(self, q: Float[Array, "B N H"], kept: Moments) -> Float[Array, "B N H"]:
        """The output of the query q over the tokens of `kept` and this token, in the dtype of q."""
        share = self.share(q, kept)[..., None]
        return (kept.value * (1 - share) + self.value * share).astype(q.dtype).reshape(q.shape)


def outside(q: Float[Array, "B N H"], everything: Moments, kept: Moments, is_any: Bool[Array, " B"]) -> Remainder:
    """What remains of `everything` without `kept`, both under the query q and with keys. `is_any`: the rows in which a
    token is outside of the kept set. What is outside counts as nothing below the probability `LEAST`."""
    inside = jnp.exp(jnp.minimum(kept.lse - everything.lse, 0))
    probability = 1 - inside
    counts = is_any[:, None, None] & (probability >= LEAST)
    divisor = jnp.where(counts, probability, 1)[..., None]
    key = (everything.key - inside[..., None] * kept.key) / divisor
    value = (everything.value - inside[..., None] * kept.value) / divisor
    logit = jnp.sum(q.reshape(key.shape).astype(jnp.float32) * key, axis=-1) * q.shape[-1] ** -0.5
    bias = everything.lse + jnp.log(divisor[..., 0]) - logit
    return Remainder(key, value, jnp.where(counts, bias, -jnp.inf))
