"""Full attention that records how much of its probability falls on the kept sets of other policies."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax

from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM

PLAIN = Implementation()
"""The implementation of the candidates: its kept sets hold slots, whichever implementation attends."""


@flax.struct.dataclass
class Followed:
    """The state of one layer: the C candidates' states, and how much attention their sets covered."""

    states: tuple[Any, ...]
    covered: Leaf  # float32 [B, M, C + 1]: probability at each of M steps, mean over query heads; the best set last


@dataclasses.dataclass(frozen=True)
class Probe(Policy):
    """Full attention that records, for at most `steps` steps, how much of its probability falls on the set of each
    candidate and on the best set of the same budget."""

    candidates: tuple[SnapKV | StreamingLLM, ...]
    steps: int

    @property
    def needs(self) -> PromptNeeds:
        return functools.reduce(operator.or_, (policy.needs for policy in self.candidates), PromptNeeds())

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[Followed, ...]:
        by_policy = [policy.start(PLAIN, prompt, caches) for policy in self.candidates]
        covered = jnp.zeros((caches.visible.shape[0], self.steps, len(self.candidates) + 1), jnp.float32)
        return tuple(Followed(states, covered) for states in zip(*by_policy, strict=True))

    def partial_step(self, attention: Implementation, step: Step, state: Followed) -> Attended:
        """Attend to everything, and sum the probability of the slots that each candidate would read."""
        out, log_probabilities = attention.full_with_log_probabilities(step.q, step.cached, step.visible)
        weights = jnp.where(step.visible[:, None, None], jnp.exp(log_probabilities), 0)
        shares = []
        for policy, candidate in zip(self.candidates, state.states, strict=True):
            kept, reads = policy.reads(PLAIN, step, candidate)
            is_read = kept.mask(reads, step.cached.capacity)
            shares.append(jnp.sum(jnp.where(is_read[:, :, None], weights, 0), axis=-1))
        budget = min(self.candidates[0].budget, weights.shape[-1])
        shares.append(jnp.sum(lax.top_k(jnp.mean(weights, axis=2, keepdims=True), budget)[0], axis=-1))
        now = jnp.stack([jnp.mean(share, axis=(1, 2)) for share in shares], axis=-1)
        covered = lax.dynamic_update_slice_in_dim(state.covered, now[:, None], step.number - 1, axis=1)
        return Attended(out, Followed(state.states, covered), full=jnp.ones_like(step.done))
