"""Recycled Attention (Xu, Goyal and Choi, https://arxiv.org/abs/2411.05787; RefreshKV at ACL 2025).

Prefill notes which tokens the last prompt token attends to; partial steps attend to those `budget` tokens only; a full
step, every `stride`-th or where the query has moved away, attends to the whole cache and notes them anew. Nothing leaves
the full cache, so a token that was not recycled can come back at the next full step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from recyc_jax.attention.api import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.config import real_number, whole_number
from recyc_jax.policies.base import Attended, Caches, Observed, Observes, Policy, Step
from recyc_jax.policies.recycled_set import AnySet, Listed, Ranking, chosen_set, rank
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity

ABLATIONS = ("no_refresh", "no_full_attention")


@flax.struct.dataclass
class RecycledState:
    """One layer's."""

    kept: AnySet
    query: Leaf | None  # float32 [B, H]: what the schedule remembers of the last full step
    scores: Leaf | None  # float32 [B, K, S]: what the set was chosen by; None where nothing is remembered


@flax.struct.dataclass
class Unsettled:
    """What a deciding step leaves of one layer: the state that a partial step would, and what a full one has seen."""

    partial: RecycledState
    query: Leaf | None
    scores: Leaf  # float32 [B, K, S]: the full step's; -inf, by which a choice is soon made, where there was none
    renew: Leaf  # bool [B]: the row's set is to be chosen anew from them


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

    `decay` and `window` (ours; None and 1 are the paper's rule) remember: at a refresh a token's score is the maximum of
    the full step's and of what it was chosen by before, less `decay` nats. What mattered a while ago, such as the next
    item of a list that is being answered, stays within reach, while tokens that never mattered make room. The prompt's
    scores are those of its last `window` tokens (the log of the probability summed over them), as in `SnapKV`.

    `evict=False`: a partial step reads `budget` ranked tokens and every token since the refresh, the form that the paper
    trains with (section 5). Under `QuerySimilarity` nothing bounds their number, and a partial step of the plain functions
    gathers over the whole cache: exact, not fast.

    `ablation` (the paper's table of ablations): `"no_refresh"`, full steps leave the set as it is;
    `"no_full_attention"`, they renew it but their output still comes from the old one (and is not counted as full).
    """

    budget: int
    schedule: FixedStride | QuerySimilarity
    pool: int = 7
    lookahead: int | Literal["auto"] = 0
    evict: bool = True
    ablation: Literal["no_refresh", "no_full_attention"] | None = None
    window: int = 1
    decay: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 1))
        object.__setattr__(self, "pool", whole_number("pool", self.pool, 1))
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd: the window is centred on its token")
        if self.lookahead != "auto":
            object.__setattr__(self, "lookahead", whole_number("lookahead", self.lookahead, 0))
        if not isinstance(self.schedule, FixedStride | QuerySimilarity):
            raise ValueError(f"schedule={self.schedule!r} must be a schedule, such as FixedStride(10)")
        object.__setattr__(self, "window", whole_number("window", self.window, 1))
        if self.decay is not None:
            object.__setattr__(self, "decay", real_number("decay", self.decay, 0.0, math.inf))
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
        return Observes(windows=frozenset({self.window}), query=self.schedule.by_row)

    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[RecycledState, ...]:
        scores = [layer.scores[self.window] for layer in observed]
        states = []
        for kept, layer in zip(self._choose(scores, caches), observed, strict=True):
            query = None
            if self.schedule.by_row:
                query = self.schedule.remember(cast(Array, layer.q), cast(Array, layer.plain_q))
            remembered = None if self.decay is None else layer.scores[self.window]
            states.append(RecycledState(kept, query, remembered))
        return tuple(states)

    def _rank(self, scores: Sequence[Float[Array, "B K S"]], caches: Caches) -> list[Ranking]:
        lookahead = self.period - 1 if self.lookahead == "auto" else self.lookahead
        # as many as tokens can come before the next refresh; who copies asks for the last one's rank even if none leave
        leaving = 1 if not self.evict else caches.steps if self._longest is None else min(self._longest, caches.steps)
        return rank(caches.attention, scores, caches.visible, self.budget, self.pool, lookahead, leaving)

    def _choose(self, scores: Sequence[Float[Array, "B K S"]], caches: Caches) -> list[AnySet]:
        """The set that a full step with these scores leaves, a layer each."""
        rankings = self._rank(scores, caches)
        return [
            chosen_set(caches.attention, cached, ranking, caches.length, self.evict)
            for cached, ranking in zip(caches.layers, rankings, strict=True)
        ]

    def attend(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        """A partial step: the new token enters the set before attending."""
        kept = state.kept.insert(step.slot)
        out = kept.attend(attention, step, self._newest(step))
        return Attended(out, dataclasses.replace(state, kept=kept), jnp.zeros(step.q.shape[0], jnp.bool_))

    def _newest(self, step: Step) -> int:
        """The most tokens that a partial step can find since the refresh, its own among them."""
        capacity = step.keys.shape[2]
        return capacity if self._longest is None else min(self._longest - (self.ablation is None), capacity)

    @property
    def _longest(self) -> int | None:
        """Steps from one refresh to the next, at most."""
        return None if self.ablation == "no_refresh" else self.schedule.longest

    def decide(self, attention: Implementation, step: Step, state: RecycledState) -> Attended:
        due = self.schedule.due(step.number, step.q, step.plain_q, state.query) & ~step.done

        def full() -> Attended:
            """Attend to everything, and keep the scores by which `settle` rebuilds the set."""
            out, scores = attention.full_with_scores(step.q, step.keys, step.values, step.visible)
            query, is_full = self.schedule.remember(step.q, step.plain_q), due
            rows_differ = self.schedule.by_row and step.q.shape[0] > 1
            if self.ablation == "no_full_attention" or rows_differ:
                # a row that isn't due keeps what it would have alone, whatever its neighbours do
                is_full = due & (self.ablation != "no_full_attention")
                out = jnp.where(is_full[:, None, None], out, self.attend(attention, step, state).out)
            if query is not None:
                query = jnp.where(due[:, None], query, cast(Array, state.query))
            renew = due & (self.ablation != "no_refresh")
            inserted = dataclasses.replace(state, kept=state.kept.insert(step.slot))
            return Attended(out, Unsettled(inserted, query, scores, renew), is_full)

        def partial() -> Attended:
            out, after, nobody = self.attend(attention, step, state)
            nothing = jnp.full(step.keys.shape[:3], -jnp.inf, jnp.float32)
            return Attended(out, Unsettled(after, after.query, nothing, nobody), nobody)

        def each_row_its_own(kept: Listed) -> Attended:
            out, scores = kept.attend_or_all(attention, step, due)
            query = jnp.where(due[:, None], self.schedule.remember(step.q, step.plain_q), cast(Array, state.query))
            return Attended(out, Unsettled(state, query, scores, due), due)

        if isinstance(state.kept, Listed) and self.schedule.by_row and self.ablation is None:
            return each_row_its_own(state.kept)
        return full() if self.schedule.always else lax.cond(jnp.any(due), full, partial)

    def settle(self, states: tuple[Unsettled, ...], caches: Caches) -> tuple[RecycledState, ...]:
        """The refresh: the sets of the layers and rows that took a full step, chosen from its scores."""

        def renewed() -> tuple[RecycledState, ...]:
            scores = [self._remembering(state) for state in states]
            made = []
            for kept, state, layer_scores in zip(self._choose(scores, caches), states, scores, strict=True):
                remembered = None if self.decay is None else layer_scores
                fresh = RecycledState(kept, state.query, remembered)
                if not self.schedule.always:  # else all are due at once, but for rows that have ended
                    fresh = _by_row(state.renew, fresh, dataclasses.replace(state.partial, query=state.query))
                made.append(fresh)
            return tuple(made)

        def as_they_are() -> tuple[RecycledState, ...]:
            return tuple(dataclasses.replace(state.partial, query=state.query) for state in states)

        if self.ablation == "no_refresh":
            return as_they_are()
        if self.schedule.always:
            return renewed()
        return lax.cond(jnp.any(jnp.stack([state.renew for state in states])), renewed, as_they_are)

    def _remembering(self, state: Unsettled) -> Float[Array, "B K S"]:
        """The scores that a set is chosen by."""
        if self.decay is None:
            return state.scores
        return jnp.maximum(state.scores, cast(Array, state.partial.scores) - self.decay)


def _by_row(choose: Bool[Array, " B"], one: Any, other: Any) -> Any:
    """Row by row `one` where `choose`, else `other`; trees of arrays [B, ...]."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(choose.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return jax.tree.map(pick, one, other)
