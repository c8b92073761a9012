"""Schedules that decide by what the kept set covers when to take a full step, compared with a fixed stride
(docs/results/lookahead.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp

from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, Step
from recyc_jax.policies.lookahead import Lookahead
from recyc_jax.policies.recycled_parts import where_rows
from recyc_jax.policies.registry import Options


@flax.struct.dataclass
class Watched:
    """A layer's state, and when its next full step is due."""

    base: Any  # LookaheadState
    wait: Any  # int32 [B]: steps from the last full step to the next


@dataclasses.dataclass(frozen=True)
class Scheduled(Policy):
    """`Lookahead` whose full steps another schedule decides, every `check_every` steps."""

    rule: Lookahead
    check_every: int
    goal: float

    @property
    def period(self) -> int:
        return self.check_every

    @property
    def needs(self) -> PromptNeeds:
        return self.rule.needs


@dataclasses.dataclass(frozen=True)
class ByCoverage(Scheduled):
    """`Lookahead`, where each layer of each row waits twice as long for its next full step if the kept set covered, the
    mean over heads, at least `goal` of this full step's attention, and half as long otherwise: from `check_every` to
    `rule.stride` steps."""

    def start(self, attention: Implementation, prompt: Any, caches: Caches) -> Any:
        states = self.rule.start(attention, prompt, caches)
        wait = jnp.full(caches.visible.shape[0], self.check_every, jnp.int32)
        return tuple(Watched(state, wait) for state in states)

    def partial_step(self, attention: Implementation, step: Step, state: Watched) -> Attended:
        seen = self.rule.partial_step(attention, step, state.base)
        return seen._replace(state=Watched(seen.state, state.wait))

    def deciding_step(self, attention: Implementation, step: Step, state: Watched) -> Attended:
        due = (step.length - state.base.recycled.since >= state.wait) & ~step.done
        seen = full_or_partial(self.rule, attention, step, state.base, due)
        kept, reads = self.rule.reads(attention, step, state.base)
        inside = kept.moments(step.q, step.cached, reads).lse - seen.noted[0].everything.lse
        covered = jnp.mean(jnp.exp(jnp.minimum(inside, 0)), axis=(1, 2))
        wait = jnp.where(covered >= self.goal, 2 * state.wait, state.wait // 2)
        wait = jnp.where(due, jnp.clip(wait, self.check_every, self.rule.stride), state.wait)
        return seen._replace(state=Watched(seen.state, wait))

    def refresh(self, attention: Implementation, states: Any, noted: Any, caches: Caches) -> Any:
        renewed = refreshed(self.rule, attention, [state.base for state in states], noted, caches)
        return tuple(Watched(new, state.wait) for new, state in zip(renewed, states, strict=True))


@dataclasses.dataclass(frozen=True)
class ByShare(Scheduled):
    """`Lookahead` that takes a full step, in each layer and row, where the token that stands for the rest takes more
    than `goal` of the softmax (the mean over heads); decided every `check_every` steps, and `rule.stride` steps after
    the last at the latest."""

    def start(self, attention: Implementation, prompt: Any, caches: Caches) -> Any:
        return self.rule.start(attention, prompt, caches)

    def partial_step(self, attention: Implementation, step: Step, state: Any) -> Attended:
        return self.rule.partial_step(attention, step, state)

    def deciding_step(self, attention: Implementation, step: Step, state: Any) -> Attended:
        kept, reads = self.rule.reads(attention, step, state)
        share = state.remainder.share(step.q, kept.moments(step.q, step.cached, reads))
        late = step.length - state.recycled.since > self.rule.stride - self.check_every
        due = ((jnp.mean(share, axis=(1, 2)) > self.goal) | late) & ~step.done
        return full_or_partial(self.rule, attention, step, state, due)

    def refresh(self, attention: Implementation, states: Any, noted: Any, caches: Caches) -> Any:
        return refreshed(self.rule, attention, states, noted, caches)


def full_or_partial(rule: Lookahead, attention: Implementation, step: Step, state: Any, due: Any) -> Attended:
    """A full step in the rows that are due, a partial step in the others; notes the full step and these rows."""
    full, partial = rule.deciding_step(attention, step, state), rule.partial_step(attention, step, state)
    return where_rows(due, full._replace(noted=None), partial._replace(noted=None))._replace(noted=(full.noted, due))


def refreshed(rule: Lookahead, attention: Implementation, states: Any, noted: Any, caches: Caches) -> Any:
    """The states with a refresh in the rows that took a full step."""
    fresh = rule.refresh(attention, states, [full for full, _ in noted], caches)
    return tuple(where_rows(due, new, old) for (_, due), new, old in zip(noted, fresh, states, strict=True))


def _rule(options: Options) -> Lookahead:
    return Lookahead(options.budget(), options.integer("longest", 100), options.lookahead(49))


def coverage(options: Options) -> ByCoverage:
    """The policy of `idea_coverage:...`."""
    return ByCoverage(_rule(options), options.integer("check_every"), options.number("goal"))


def share(options: Options) -> ByShare:
    """The policy of `idea_share:...`."""
    return ByShare(_rule(options), options.integer("check_every"), options.number("goal"))
