"""StreamingLLM (Xiao et al., https://arxiv.org/abs/2309.17453): the first tokens, as attention sinks, and the latest.

Deviations from the publication: keys keep their original RoPE positions instead of being renumbered inside the cache,
as in the comparison of the recycled-attention paper. The full cache is kept and a subset of it is read: quality and
read cost are StreamingLLM's, but its memory savings are not modelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp

from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import Reads
from recyc_jax.policies.base import Attended, Caches, Policy, PromptStats, Step
from recyc_jax.validation import whole_number


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """Attention to a row's first `sinks` tokens and its latest `budget - sinks` tokens, including the new one.

    With `full_stride`, every `full_stride`-th step (counted from 1, as in `FixedStride`) attends to the whole cache:
    "StreamingLLM++" of the recycled-attention paper's first version, whose full steps do not change the kept set."""

    method: ClassVar[str] = "streaming_llm"

    budget: int
    sinks: int = 4
    full_stride: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 1))
        if self.budget <= self.sinks:
            raise ValueError(f"budget={self.budget} must exceed sinks={self.sinks}: the rest is for the latest tokens")
        if self.full_stride is not None:
            object.__setattr__(self, "full_stride", whole_number("full_stride", self.full_stride, 1))

    @property
    def period(self) -> int | None:
        return self.full_stride

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[None, ...]:
        return (None,) * len(prompt)

    def reads(self, attention: Implementation, step: Step, state: None) -> tuple[Any, Reads]:
        """The kept set of the sinks, and what a step reads of it and of the newest tokens."""
        recent = self.budget - self.sinks
        first = jnp.maximum(step.starts + self.sinks, step.length - recent)
        sinks = attention.first_slots(step.cached, step.starts, self.sinks)
        return sinks, Reads(first, step.length, min(recent, step.cached.capacity))

    def partial_step(self, attention: Implementation, step: Step, state: None) -> Attended:
        """Attend to the sinks and to the latest tokens."""
        sinks, reads = self.reads(attention, step, state)
        return Attended(sinks.attend(step.q, step.cached, reads), None, full=jnp.zeros_like(step.done))

    def deciding_step(self, attention: Implementation, step: Step, state: None) -> Attended:
        """With `full_stride`: attend to everything."""
        out = attention.full(step.q, step.cached, step.visible)
        return Attended(out, None, full=jnp.ones_like(step.done))
