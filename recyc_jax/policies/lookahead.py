"""Recycled attention by the rule of this project, beside the paper's in `recycled.py`.

A full step every `stride` steps; the steps between attend to `budget` tokens, chosen at the last full step, as in the
paper. Ours, each measured in docs/results/lookahead.md:

look-ahead: the tokens that follow an attended one are kept too, because copied text moves on by a token per step
memory:     a token's score is the maximum of this full step's and of those before, from the question on, so that the
            next item of a list stays although the model is still writing out the item before it
remainder:  the tokens that are not read are represented by one token for each query head, which a full step makes
            (`attention/remainder.py`), so that what was spread over thousands of tokens is not lost"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array

from recyc_jax.attention import remainder, selection
from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import Reads
from recyc_jax.attention.remainder import Moments
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_parts import RecycledState, States
from recyc_jax.policies.schedules import FixedStride
from recyc_jax.validation import whole_number

ITEM = 24
"""The look-ahead of short strides, if the budget has room: the length of a copied item, such as an identifier."""
ITEMS = 32
"""With room for fewer attended tokens and what follows each, a longer look-ahead costs more than it gains."""


@flax.struct.dataclass
class LookaheadState:
    """What one layer carries from step to step."""

    recycled: RecycledState
    remainder: Any  # a Remainder: the tokens that the kept set left out when it was chosen; None without it


class FullStep(NamedTuple):
    """What a full step notes for `refresh`."""

    scores: Array  # float32 [B, K, S]
    q: Array  # [B, N, H]
    everything: Moments | None  # of its attention


@dataclasses.dataclass(frozen=True)
class Lookahead(Policy):
    """Every `stride`-th step attends to everything, the others to `budget` recycled tokens and to one token that stands
    for all others.

    `budget` counts the cached tokens that a partial step reads per layer and key/value head, the new one included.
    `lookahead` is the number of tokens kept after each attended one; "auto" covers the steps until the next full one,
    and is 24 at least, or `budget // 32` if that is less.
    `window`, `decay` and `pool` are those of `RecycledAttention`. `remainder=False` leaves the rest out, as
    `RecycledAttention` does."""

    method: ClassVar[str] = "lookahead"

    budget: int = 1024
    stride: int = 50
    lookahead: int | Literal["auto"] = "auto"
    window: int = 32
    decay: float = 1.0
    pool: int = 7
    remainder: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", whole_number("stride", self.stride, 1))
        for name in ("budget", "window", "decay", "pool"):
            object.__setattr__(self, name, getattr(self.rule, name))
        if self.lookahead != "auto":
            object.__setattr__(self, "lookahead", self.rule.lookahead)
        if not isinstance(self.remainder, bool):
            raise ValueError(f"remainder={self.remainder!r} must be True or False")

    @property
    def ahead(self) -> int:
        """The number of tokens kept after each attended one."""
        if self.lookahead == "auto":
            return max(self.stride - 1, min(ITEM, self.budget // ITEMS))
        return self.lookahead

    @property
    def rule(self) -> RecycledAttention:
        """How tokens are chosen and read."""
        schedule = FixedStride(self.stride)
        return RecycledAttention(self.budget, schedule, self.pool, self.ahead, window=self.window, decay=self.decay)

    @property
    def period(self) -> int:
        return self.stride

    @property
    def needs(self) -> PromptNeeds:
        return PromptNeeds(windows=frozenset({self.window}), query=self.remainder)

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> States:
        states = self.rule.start(attention, prompt, caches)
        noted = []
        for layer, cached in zip(prompt, caches.layers, strict=True):
            everything = None
            if self.remainder:
                everything = attention.full_with_moments(layer.q, cached, caches.visible, caches.length)[2]
            noted.append(FullStep(layer.scores[self.window], layer.q, everything))
        return self._with_remainders(states, noted, caches)

    def reads(self, attention: Implementation, step: Step, state: LookaheadState) -> tuple[Any, Reads]:
        """The kept set, and what a partial step reads of it and of newer tokens."""
        return self.rule.reads(attention, step, state.recycled)

    def partial_step(self, attention: Implementation, step: Step, state: LookaheadState) -> Attended:
        """Attend to the kept tokens, to those since the refresh, and to the token that stands for the others."""
        kept, reads = self.reads(attention, step, state)
        if state.remainder is None:
            out = kept.attend(step.q, step.cached, reads)
        else:
            out = kept.attend_also(state.remainder, step.q, step.cached, reads)
        return Attended(out, state, full=jnp.zeros_like(step.done))

    def deciding_step(self, attention: Implementation, step: Step, state: LookaheadState) -> Attended:
        """Attend to everything, and hand the scores and moments to `refresh`."""
        everything = None
        if self.remainder:
            out, log_probabilities, everything = attention.full_with_moments(
                step.q, step.cached, step.visible, step.length
            )
        else:
            out, log_probabilities = attention.full_with_log_probabilities(step.q, step.cached, step.visible)
        noted = FullStep(selection.group_maximum(log_probabilities), step.q, everything)
        return Attended(out, state, full=jnp.ones_like(step.done), noted=noted)

    def refresh(self, attention: Implementation, states: States, noted: Sequence[FullStep], caches: Caches) -> States:
        """Choose new kept sets, and make the tokens that stand for the others."""
        chosen = self.rule.chosen(
            attention, [layer.scores for layer in noted], [state.recycled for state in states], caches
        )
        return self._with_remainders(chosen, noted, caches)

    def _with_remainders(self, chosen: States, noted: Sequence[FullStep], caches: Caches) -> States:
        states = []
        for state, full, cached in zip(chosen, noted, caches.layers, strict=True):
            rest = None
            if full.everything is not None:
                reads = Reads(state.since, caches.length, 1)
                kept = state.kept.moments(full.q, cached, reads, with_key=True)
                is_any = jnp.sum(caches.visible, axis=1) > state.kept.size
                rest = remainder.outside(full.q, full.everything, kept, is_any)
            states.append(LookaheadState(state, rest))
        return tuple(states)
