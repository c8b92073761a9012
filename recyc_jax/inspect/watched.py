"""A policy that also tells, step by step, which tokens the step could read and which it would have attended to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import recyc_jax as rj
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.policies.full import FullAttention

MOST = 16
"""Attended tokens that are told for each step and head."""


@flax.struct.dataclass
class Seen:
    """The state of one layer: the policy's own, and what the last step saw."""

    inner: Any
    is_read: Leaf  # bool [B, K, S]: the slots that the step could read
    slots: Leaf  # int32 [B, K, M]: those that full attention would have attended to most, mean over the group's heads
    probabilities: Leaf  # float32 [B, K, M]: the attention that they would have received
    covered: Leaf  # float32 [B, K]: the attention that falls on what the step could read
    full: Leaf  # bool [B]: the step attended to everything


@dataclasses.dataclass(frozen=True)
class Watched(Policy):
    """The policy `inner`, and what each step sees. Costs an attention to everything at each step. Raises ValueError for a
    policy that does not tell what it reads."""

    inner: Policy

    def __post_init__(self) -> None:
        if not isinstance(self.inner, FullAttention) and not hasattr(self.inner, "reads"):
            known = "full, lookahead, recycled, snapkv and streaming_llm"
            raise ValueError(f"the policy {self.inner} does not tell what its steps read: there is {known}")

    @property
    def period(self) -> int | None:
        return self.inner.period

    @property
    def needs(self) -> PromptNeeds:
        return self.inner.needs

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[Seen, ...]:
        seen = []
        for cached, state in zip(caches.layers, self.inner.start(attention, prompt, caches), strict=True):
            rows, heads, slots = cached.keys.shape[:3]
            most, none = min(MOST, slots), jnp.zeros((rows, heads), jnp.float32)
            best = jnp.zeros((rows, heads, most), jnp.int32), jnp.zeros((rows, heads, most), jnp.float32)
            seen.append(
                Seen(state, jnp.zeros((rows, heads, slots), jnp.bool_), *best, none, jnp.zeros(rows, jnp.bool_))
            )
        return tuple(seen)

    def partial_step(self, attention: Implementation, step: Step, state: Seen) -> Attended:
        return self._watched(self.inner.partial_step, attention, step, state)

    def deciding_step(self, attention: Implementation, step: Step, state: Seen) -> Attended:
        return self._watched(self.inner.deciding_step, attention, step, state)

    def refresh(
        self, attention: Implementation, states: tuple[Seen, ...], noted: tuple[Any, ...], caches: Caches
    ) -> tuple[Seen, ...]:
        inner = self.inner.refresh(attention, tuple(state.inner for state in states), noted, caches)
        return tuple(dataclasses.replace(state, inner=one) for state, one in zip(states, inner, strict=True))

    def _watched(self, take: Any, attention: Implementation, step: Step, state: Seen) -> Attended:
        out, inner, full, noted = take(attention, step, state.inner)
        visible = jnp.broadcast_to(step.visible[:, None], state.is_read.shape)
        is_read = visible
        if not isinstance(self.inner, FullAttention):
            kept, reads = self.inner.reads(attention, step, state.inner)  # pyright: ignore[reportAttributeAccessIssue]
            is_read = jnp.where(full[:, None, None], visible, kept.mask(reads, step.cached.capacity) & visible)
        _, log_probabilities = attention.full_with_log_probabilities(step.q, step.cached, step.visible)
        weights = jnp.mean(jnp.where(visible[:, :, None], jnp.exp(log_probabilities), 0), axis=2)
        probabilities, slots = lax.top_k(weights, state.slots.shape[2])
        covered = jnp.sum(jnp.where(is_read, weights, 0), axis=2)
        return Attended(out, Seen(inner, is_read, slots, probabilities, covered, full), full, noted)


class StepSeen(NamedTuple):
    """What one step of one row saw; tokens are counted from the prompt's first."""

    token: int  # that the step made
    is_full: np.ndarray  # bool [L]
    is_read: np.ndarray  # bool [L, K, N], N tokens being there
    tokens: np.ndarray  # int32 [L, K, M]
    probabilities: np.ndarray  # float32 [L, K, M]
    covered: np.ndarray  # float32 [L, K]


def steps(lm: Any, ids: list[int], policy: Policy, max_new_tokens: int) -> Iterator[StepSeen | int]:
    """The first token that follows the prompt, then what each further step saw, until the answer ends."""
    watched = Watched(policy)
    options: dict[str, Any] = dict(implementation="reference" if jax.default_backend() == "tpu" else None)
    state = rj.prefill(lm.params, lm.config, [ids], policies=(watched,), max_new_tokens=max_new_tokens, **options)
    start = int(state.cache.starts[0])
    for number in range(max_new_tokens):
        out, state = rj.decode(lm.params, lm.config, state, policy=watched, max_new_tokens=1, rewind=False, **options)
        token = int(out.tokens[0, 0])
        if number == 0:
            yield token
        else:
            assert state.answer is not None
            seen = jax.device_get(state.answer.policy_states)
            count = len(ids) + number
            yield StepSeen(
                token,
                np.stack([layer.full[0] for layer in seen]),
                np.stack([layer.is_read[0, :, start : start + count] for layer in seen]),
                np.stack([layer.slots[0] for layer in seen]) - start,
                np.stack([layer.probabilities[0] for layer in seen]),
                np.stack([layer.covered[0] for layer in seen]),
            )
        if bool(state.answer.done[0]) if state.answer is not None else False:
            return
