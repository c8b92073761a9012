"""Full attention: every step reads the whole cache. The baseline of every comparison."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recyc_jax.attention.api import Implementation
from recyc_jax.policies.base import Attended, Policy, View


@dataclasses.dataclass(frozen=True)
class FullAttention(Policy):
    """Attend to every token so far, at every step."""

    @property
    def period(self) -> int:
        return 16  # nothing is ever decided: this only sets how often the loop looks whether all rows have ended

    def start(self, scores: Float[Array, "B K S"] | None, visible: Bool[Array, "B S"]) -> None:
        return None

    def attend(self, attention: Implementation, q: Float[Array, "B N H"], view: View, state: None) -> Attended:
        out = attention.full(q, view.keys, view.values, view.visible)
        return Attended(out, None, jnp.ones(q.shape[0], jnp.bool_))
