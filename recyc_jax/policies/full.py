"""Full attention: every step reads the whole cache. The baseline of all comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Policy, PromptStats, Step


@dataclasses.dataclass(frozen=True)
class FullAttention(Policy):
    """Attend to every token so far, at every step."""

    method: ClassVar[str] = "full"

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[None, ...]:
        return (None,) * len(prompt)

    def partial_step(self, attention: Implementation, step: Step, state: None) -> Attended:
        """Attend to the whole cache; the output counts as full."""
        out = attention.full(step.q, step.cached, step.visible)
        return Attended(out, None, full=jnp.ones_like(step.done))
