"""SnapKV (Li et al., https://arxiv.org/abs/2404.14469): the tokens that the end of the prompt attends to, chosen once.

Deviations from the publication: every layer and key/value head keeps `budget` entries in all rather than a prompt part
beside the window, and new tokens take the place of the lowest-ranked ones instead of adding to them, so that all methods
read the same number of entries. Scores are the maximum over a group's query heads, as the recycled-attention
paper has it for all methods. The full cache is kept and a subset of it is read: quality and read cost are SnapKV's, the
memory that it saves is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from recyc_jax.attention.api import Implementation
from recyc_jax.config import whole_number
from recyc_jax.policies.base import LOOK_EVERY, Attended, Caches, Observed, Observes, Policy, Step
from recyc_jax.policies.recycled_set import AnySet, chosen_set, rank


@dataclasses.dataclass(frozen=True)
class SnapKV(Policy):
    """Attention to the `budget` tokens that the last `window` prompt tokens attend to most, never chosen anew.

    With `window=1` this is recycled attention that never refreshes. A longer window sums the probabilities of its
    queries (those that a short prompt has), then takes the maximum over the group, then pools. `pool`, `budget` and
    `lookahead` are those of `RecycledAttention`; as nothing is ever renewed, `lookahead` takes a number and no "auto".
    """

    budget: int
    window: int = 1
    pool: int = 7
    lookahead: int = 0

    def __post_init__(self) -> None:
        for name, least in (("budget", 1), ("window", 1), ("pool", 1), ("lookahead", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd: the window is centred on its token")

    @property
    def period(self) -> int:
        return LOOK_EVERY

    @property
    def observes(self) -> Observes:
        return Observes(windows=frozenset({self.window}))

    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[AnySet, ...]:
        scores = [layer.scores[self.window] for layer in observed]
        rankings = rank(caches.attention, scores, caches.visible, self.budget, self.pool, self.lookahead, caches.steps)
        return tuple(
            chosen_set(caches.attention, cached, ranking, caches.length, evict=True)
            for cached, ranking in zip(caches.layers, rankings, strict=True)
        )

    def attend(self, attention: Implementation, step: Step, state: AnySet) -> Attended:
        state = state.insert(step.slot)
        out = state.attend(attention, step, step.keys.shape[2])
        return Attended(out, state, jnp.zeros(step.q.shape[0], jnp.bool_))
