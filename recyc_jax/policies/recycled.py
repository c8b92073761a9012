"""Recycled Attention (Xu, Goyal and Choi, https://arxiv.org/abs/2411.05787; RefreshKV at ACL 2025).

Prefill notes which tokens the last prompt token attends to; partial steps attend to those `budget` tokens only; a full
step, every `stride`-th or where the query has moved away, attends to the whole cache and notes them anew. Nothing leaves
the full cache, so a token that was not recycled can come back at the next full step.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from recyc_jax.attention.api import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.config import whole_number
from recyc_jax.policies.base import Attended, Observed, Observes, Policy, Step
from recyc_jax.policies.recycled_set import Recycled, Unevicted, ranked_slots
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity

ABLATIONS = ("no_refresh", "no_full_attention")


@flax.struct.dataclass
class RecycledState:
    """One layer's."""

    kept: Recycled | Unevicted
    query: Leaf | None  # float32 [B, H]: what the schedule remembers of the last full step


@dataclasses.dataclass(frozen=True)
class RecycledAttention(Policy):
    """Full attention when the schedule says so, attention to the recycled top `budget` tokens in between.

    `budget` (the paper's K) counts the entries that a partial step reads in each layer and key/value head, the new token
    among them (our decision); a budget above the context is legal and equals full attention. Scores are the last full
    step's log-probabilities, the maximum over the query heads of a group, max-pooled over `pool` neighbouring keys
    (section 3.1); ranks are exact, ties to the earlier token.

    `lookahead` (ours; 0 is the paper's rule) stretches the pooling backwards, so that the `lookahead` tokens after an
    attended one are kept too: text that is copied token by token moves on by one each step, and a centred window of 7
    covers only the next three. `"auto"` covers the steps until the next decision, `schedule.period - 1`.

    `evict=False`: a partial step reads `budget` ranked tokens and every token since the refresh, the form that the paper
    trains with (section 5). Under `QuerySimilarity` nothing bounds their number, and a partial step gathers over the whole
    cache: exact, not fast.

    `ablation` (the paper's table of ablations): `"no_refresh"`, full steps leave the set as it is;
    `"no_full_attention"`, they renew it but their output still comes from the old one (and is not counted as full).
    """

    budget: int
    schedule: FixedStride | QuerySimilarity
    pool: int = 7
    lookahead: int | Literal["auto"] = 0
    evict: bool = True
    ablation: Literal["no_refresh", "no_full_attention"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 1))
        object.__setattr__(self, "pool", whole_number("pool", self.pool, 1))
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd: the window is centred on its token")
        if self.lookahead != "auto":
            object.__setattr__(self, "lookahead", whole_number("lookahead", self.lookahead, 0))
        if not isinstance(self.schedule, FixedStride | QuerySimilarity):
            raise ValueError(f"schedule={self.schedule!r} must be a schedule, such as FixedStride(10)")
        if self.ablation not in (None, *ABLATIONS):
            raise ValueError(f"ablation={self.ablation!r} is unknown; there is {', '.join(ABLATIONS)}")

    @property
    def period(self) -> int:
        return self.schedule.period

    @property
    def decides(self) -> bool:
        return True

    @property
    def observes(self) -> Observes:
        return Observes(windows=frozenset({1}), query=self.schedule.by_row)

    def start(self, observed: Observed, visible: Bool[Array, "B S"]) -> RecycledState:
        query = None
        if self.schedule.by_row:
            assert observed.q is not None
            assert observed.plain_q is not None
            query = self.schedule.remember(observed.q, observed.plain_q)
        return RecycledState(self.select(observed.scores[1], visible), query)

    def select(self, scores: Float[Array, "B K S"], visible: Bool[Array, "B S"]) -> Recycled | Unevicted:
        """The set that a full step with these scores leaves."""
        lookahead = self.period - 1 if self.lookahead == "auto" else self.lookahead
        slots = ranked_slots(scores, visible, self.budget, self.pool, lookahead)
        if self.evict:
            return Recycled.of(slots)
        length = jnp.max(jnp.where(visible, jnp.arange(1, visible.shape[1] + 1, dtype=jnp.int32), 0))
        return Unevicted.of(slots, length)

    def attend(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        """A partial step: the new token enters the set before attending."""
        kept = state.kept.insert(step.slot)
        out = attention.selected(step.q, step.keys, step.values, kept.read(step.length, self._newest(step)))
        return Attended(out, RecycledState(kept, state.query), jnp.zeros(step.q.shape[0], jnp.bool_))

    def _newest(self, step: Step) -> int:
        """The most tokens that a partial step can find since the refresh, its own among them."""
        capacity = step.keys.shape[2]
        if self.schedule.by_row or self.ablation == "no_refresh":
            return capacity
        return min(self.period - (self.ablation is None), capacity)

    def refresh(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        """A full step: attend to everything and rebuild the set from this step's scores."""
        out, scores = attention.full_with_scores(step.q, step.keys, step.values, step.visible)
        kept, full = self.select(scores, step.visible), jnp.ones(step.q.shape[0], jnp.bool_)
        if self.ablation == "no_refresh":
            kept = state.kept.insert(step.slot)
        if self.ablation == "no_full_attention":
            out, _, full = self.attend(attention, step, state)
        return Attended(out, RecycledState(kept, self.schedule.remember(step.q, step.plain_q)), full)

    def decide(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        due = self.schedule.due(step.number, step.q, step.plain_q, state.query) & ~step.done

        def full() -> Attended:
            refreshed = self.refresh(attention, step, state)
            if not self.schedule.by_row:
                return refreshed
            # a row that doesn't ask keeps what it would have alone, whatever its neighbours do
            return _by_row(due, refreshed, self.attend(attention, step, state))

        return lax.cond(jnp.any(due), full, lambda: self.attend(attention, step, state))


def _by_row(choose: Bool[Array, " B"], one: Attended, other: Attended) -> Attended:
    """Row by row `one` where `choose`, else `other`."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(choose.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, one, other)
