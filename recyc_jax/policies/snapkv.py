"""SnapKV (Li et al., https://arxiv.org/abs/2404.14469): the tokens that the end of the prompt attends to, chosen once.

Deviations from the publication: every layer and key/value head keeps `budget` entries in total, instead of some prompt
tokens plus the window, and new tokens replace the lowest-ranked entries instead of adding to them, so that all methods
read the same number of entries. Scores are the maximum over a group's query heads, as in the recycled-attention paper
for all methods. The full cache is kept and a subset of it is read: quality and read cost are SnapKV's, but its memory
savings are not modelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import Reads
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_parts import RecycledState, States
from recyc_jax.policies.schedules import FixedStride
from recyc_jax.validation import whole_number

NEVER = FixedStride(2**30)


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """Attention to the `budget` tokens that the last `window` prompt tokens attend to most, chosen once.

    This is recycled attention that never refreshes. A token's score is its probability summed over the queries of the
    window (all queries of a shorter prompt), then the maximum over the group's query heads, then max-pooled. `pool`,
    `budget` and `lookahead` are those of `RecycledAttention`, but `lookahead` cannot be "auto", because no refresh
    follows."""

    method: ClassVar[str] = "snapkv"

    budget: int
    window: int = 1
    pool: int = 7
    lookahead: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lookahead", whole_number("lookahead", self.lookahead, 0))
        for name in ("budget", "window", "pool"):
            object.__setattr__(self, name, getattr(self._recycled, name))

    @property
    def needs(self) -> PromptNeeds:
        return self._recycled.needs

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> States:
        return self._recycled.start(attention, prompt, caches)

    def reads(self, attention: Implementation, step: Step, state: RecycledState) -> tuple[Any, Reads]:
        """The kept set, and what a step reads of it and of the newest tokens."""
        return self._recycled.reads(attention, step, state)

    def partial_step(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        """Attend to the kept tokens and to the new tokens, which replace the lowest-ranked entries."""
        return self._recycled.partial_step(attention, step, state)

    @property
    def _recycled(self) -> RecycledAttention:
        return RecycledAttention(self.budget, NEVER, self.pool, self.lookahead, window=self.window)
