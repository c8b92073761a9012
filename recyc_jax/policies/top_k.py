"""The ideal top K: at every step, the tokens that receive the most attention in this very step.

A yardstick of quality, not a method: to know these tokens, a step reads every key of the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from recyc_jax.attention import reference, selection
from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Policy, PromptStats, Step
from recyc_jax.validation import whole_number


@dataclasses.dataclass(frozen=True)
class TopK(Policy):
    """Attention to the `budget` tokens, chosen anew at every step, with the highest attention probabilities in that
    step: the maximum over the group's query heads; ties keep the earlier token.

    Its output is what the best set of `budget` tokens gives if a group shares one set. Keys of the whole cache are read
    at every step, so it saves the values alone."""

    method: ClassVar[str] = "top_k"

    budget: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 1))

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[None, ...]:
        return (None,) * len(prompt)

    def partial_step(self, attention: Implementation, step: Step, state: None) -> Attended:
        """Rank all tokens by this step's attention, then attend to the first `budget`."""
        _, log_probabilities = attention.full_with_log_probabilities(step.q, step.cached, step.visible)
        scores = jnp.where(step.visible[:, None], selection.group_maximum(log_probabilities), -jnp.inf)
        slots = selection.top_slots(scores, self.budget)
        out, _ = reference.selected(step.q, step.cached.keys, step.cached.values, slots)
        return Attended(out, None, full=jnp.zeros_like(step.done))
