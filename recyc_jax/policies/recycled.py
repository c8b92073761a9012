"""Recycled Attention (Xu, Goyal and Choi, https://arxiv.org/abs/2411.05787; RefreshKV at ACL 2025), section 3:

read the prompt with full attention;  kept = refresh(scores of the last prompt token)        3.1
for step t = 1, 2, ..., in each layer:
    append the new token's key and value to the full cache, which evicts nothing             3.1
    if t % period != 0:  partial step                (period: the stride, or `check_every`)  3.1
    else:                deciding step: full step if the schedule says so, else partial step 3.2
partial step:  attend to `kept` and the tokens since the refresh; each puts out the lowest-ranked (`Reads.remaining`)
full step:     attend to the full cache;  kept = refresh(scores of this step)
refresh:       score = max over the group's query heads, max-pooled over neighbouring keys;  kept = the top `budget`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from recyc_jax.attention import selection
from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import Reads
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.policies.recycled_parts import Memory, Noted, RecycledState, Rows, States, check_fields, where_rows
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity


@dataclasses.dataclass(frozen=True)
class RecycledAttention(Policy):
    """Full attention when the schedule says so, attention to the `budget` recycled tokens (the paper's K) in between.

    `budget` counts the entries that a partial step reads per layer and key/value head, including the new token; `pool`
    is the width of max-pooling; with `evict=False` no token leaves before the next refresh (section 5). Ours, off in
    the paper's rule: `lookahead` also keeps that many tokens after each attended token ("auto": one per step until the
    next deciding step), `decay` remembers scores (`Memory`), the prompt's last `window` tokens make the first choice."""

    method: ClassVar[str] = "recycled"

    budget: int
    schedule: FixedStride | QuerySimilarity
    pool: int = 7
    lookahead: int | Literal["auto"] = 0
    evict: bool = True
    ablation: Literal["no_refresh", "no_full_attention"] | None = None
    window: int = 1
    decay: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    period = property(lambda self: self.schedule.period, doc="Steps from one deciding step to the next.")
    max_interval = property(lambda self: self.schedule.max_interval, doc="The most steps between refreshes, or None.")

    @property
    def needs(self) -> PromptNeeds:
        return PromptNeeds(windows=frozenset({self.window}), query=self.schedule.compares_queries)

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> States:
        states = [RecycledState(None, None, self.schedule.remember(layer.q, layer.q_before_rope)) for layer in prompt]
        return self.chosen(attention, [layer.scores[self.window] for layer in prompt], states, caches)

    def partial_step(self, attention: Implementation, step: Step, state: RecycledState, rows: Rows = None) -> Attended:
        """Attend to the kept tokens and to the tokens since the refresh (section 3.1)."""
        kept, reads = self.reads(attention, step, state)
        return Attended(kept.attend(step.q, step.cached, reads, rows), state, full=jnp.zeros_like(step.done))

    def reads(self, attention: Implementation, step: Step, state: RecycledState) -> tuple[Any, Reads]:
        """The kept set, and what a partial step reads of it and of newer tokens (eviction order: `Reads.remaining`)."""
        size, capacity = state.kept.size, step.cached.capacity
        most = min(
            self.max_interval or capacity, size if self.evict else capacity, capacity
        )  # tokens since the refresh
        return state.kept, Reads(state.since, step.length, most, replacing=self.evict)

    def full_step(self, attention: Implementation, step: Step, state: RecycledState, rows: Rows = None) -> Attended:
        """Attend to the full cache, and hand the scores to `refresh`."""
        out, log_probabilities = attention.full_with_log_probabilities(step.q, step.cached, step.visible, rows)
        scores = where_rows(rows, selection.group_maximum(log_probabilities), -jnp.inf)
        state = dataclasses.replace(state, query=self.schedule.remember(step.q, step.q_before_rope))
        return Attended(out, state, full=jnp.ones_like(step.done), noted=Noted(scores, rows))

    def deciding_step(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        """A full step in rows that are due by the schedule, a partial step in other rows (section 3.2)."""
        if self.schedule.always_due:  # no `lax.cond`, which costs 2.6% of a step (H100, 8B, 131,072 tokens, stride 10)
            return self.full_step(attention, step, state)
        due = self.schedule.due(step, state.query) & ~step.done

        def row_by_row() -> Attended:
            full, partial = self.full_step(attention, step, state, due), self.partial_step(attention, step, state, ~due)
            return where_rows(due, full, partial._replace(noted=full.noted))

        def all_partial() -> Attended:
            return self.partial_step(attention, step, state)._replace(noted=Noted.nothing(step, due))

        # kernels that skip rows take both steps, each of its own rows; others branch once for all rows
        return row_by_row() if attention.skips_rows else lax.cond(jnp.any(due), row_by_row, all_partial)

    def refresh(self, attention: Implementation, states: States, noted: Sequence[Noted], caches: Caches) -> States:
        """For each layer's rows that took a full step, choose a new kept set by its scores (section 3.1)."""

        def renewed() -> States:
            fresh = self.chosen(attention, [one.scores for one in noted], states, caches)
            return tuple(where_rows(one.rows, new, old) for one, new, old in zip(noted, fresh, states, strict=True))

        return renewed() if self.schedule.always_due else lax.cond(Noted.any_row(noted), renewed, lambda: states)

    def chosen(self, attention: Implementation, scores: Sequence[Array], states: States, caches: Caches) -> States:
        """Each layer's state with a new kept set: the top `budget` tokens by the pooled scores."""
        memory, lookahead = Memory(self.decay), self.schedule.period - 1 if self.lookahead == "auto" else self.lookahead
        scores = [memory.recalled(state.scores, new) for state, new in zip(states, scores, strict=True)]
        pooled = [selection.pool(one, caches.visible, self.pool, lookahead) for one in scores]
        leaving = (
            min(self.max_interval or caches.steps, caches.steps) if self.evict else 1
        )  # only these need exact ranks
        kept = attention.keep(caches.layers, pooled, self.budget, leaving)
        since = jnp.broadcast_to(caches.length, caches.visible.shape[:1])
        layers = zip(kept, states, map(memory.remembered, scores), strict=True)
        return tuple(RecycledState(its_kept, since, state.query, past) for its_kept, state, past in layers)
