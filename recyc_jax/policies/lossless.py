"""Lossless decoding: recycled attention drafts, full attention verifies, and the text is full attention's own.

The pattern is speculative sampling (Leviathan et al., https://arxiv.org/abs/2211.17192) with the model as its own drafter,
as in TriForce (https://arxiv.org/abs/2404.11912) and MagicDec (https://arxiv.org/abs/2408.11049): `lossless.py` has the
loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.policies.lookahead import Lookahead
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_parts import States
from recyc_jax.policies.schedules import FixedStride
from recyc_jax.validation import whole_number


@dataclasses.dataclass(frozen=True)
class Lossless(Policy):
    """Partial steps of `drafter` draft `draft_length` tokens at most; one pass of full attention over them keeps those that
    full attention itself would have chosen, and chooses one more. Samples follow full attention's distribution; greedy
    tokens are its own, up to rounding: a pass over several tokens sums in another order than a step of one, so where two
    tokens nearly tie, which in float32 is rare, the other one may be chosen, and neighbours in the batch, by whose drafts
    the blocks are as long as they are, have a part in that.

    `drafter` is a `RecycledAttention` or a `Lookahead`, of which the budget and the rule of choice count: the first pass
    after `refresh_every` tokens refreshes the set (1: every pass does), so there is no schedule, and no remainder;
    `lookahead="auto"` covers two blocks. A draft ends where the drafter is too unsure for another token to be worth its
    time, and none are made while few are kept or a draft step costs too much of a full one; with `adapt=False` all have
    `draft_length` tokens. In loops that force tokens (`score`) it is full attention."""

    drafter: Any  # RecycledAttention after __post_init__
    draft_length: int = 8
    adapt: bool = True
    refresh_every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft_length", whole_number("draft", self.draft_length, 1))
        object.__setattr__(self, "refresh_every", whole_number("refresh_every", self.refresh_every, 1))
        two_blocks, drafter = 2 * self.draft_length + 2, self.drafter
        if isinstance(drafter, Lookahead):
            drafter = dataclasses.replace(drafter, stride=two_blocks).rule
        if not isinstance(self.adapt, bool):
            raise ValueError(f"adapt={self.adapt!r} must be True or False")
        if type(drafter) is not RecycledAttention or drafter.ablation is not None or not drafter.evict:
            raise ValueError(f"drafter={self.drafter!r} must be a RecycledAttention or a Lookahead that evicts")
        if drafter.lookahead == "auto":
            drafter = dataclasses.replace(drafter, lookahead=two_blocks - 1)
        object.__setattr__(self, "drafter", dataclasses.replace(drafter, schedule=FixedStride(self.most_steps)))

    def __str__(self) -> str:
        options = str(self.drafter).replace(f",stride={self.most_steps}", "")
        every = "" if self.refresh_every == type(self).refresh_every else f",refresh_every={self.refresh_every}"
        return f"{options},draft={self.draft_length}{'' if self.adapt else ',adapt=false'}{every}"

    @property
    def most_steps(self) -> int:
        """A bound on the tokens from the query that chose a set to the last draft that reads it: a pass may come before
        `refresh_every` tokens and leave the set, and drafts of two blocks follow it."""
        return self.refresh_every + 2 * self.draft_length + 1

    @property
    def budget(self) -> int:
        """The entries that a draft reads per layer and key/value head."""
        return self.drafter.budget

    @property
    def needs(self) -> PromptNeeds:
        return dataclasses.replace(self.drafter.needs, spare=self.draft_length)

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> States:
        return self.drafter.start(attention, prompt, caches)

    def partial_step(self, attention: Implementation, step: Step, state: Any) -> Attended:
        """Attend to everything."""
        out = attention.full(step.q, step.cached, step.visible)
        return Attended(out, state, full=jnp.ones_like(step.done))
