"""Full attention: every step reads the whole cache. The baseline of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from recyc_jax.attention.api import Implementation
from recyc_jax.policies.base import LOOK_EVERY, Attended, Caches, Observed, Policy, Step


@dataclasses.dataclass(frozen=True)
class FullAttention(Policy):
    """Attend to every token so far, at every step."""

    @property
    def period(self) -> int:
        return LOOK_EVERY

    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[None, ...]:
        return (None,) * len(observed)

    def attend(self, attention: Implementation, step: Step, state: None) -> Attended:
        out = attention.full(step.q, step.keys, step.values, step.visible)
        return Attended(out, None, jnp.ones(step.q.shape[0], jnp.bool_))
