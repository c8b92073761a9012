"""H2O (Zhang et al., https://arxiv.org/abs/2306.14048): the tokens with the most accumulated attention, and the latest.

Deviations from the publication: each key/value head keeps one set, chosen by the maximum over its query heads (as the
recycled-attention paper does for all methods); a token is evicted before the new token attends, not after, so that a
step reads `budget` entries and not one more; `budget // 2` entries are heavy hitters, the rest are recent tokens. The
full cache is kept and a subset of it is read: quality and read cost are H2O's, but its memory savings are not
modelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import Reads, newest
from recyc_jax.cache import Leaf
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, PromptStats, Step
from recyc_jax.validation import whole_number


@flax.struct.dataclass
class HeavyHitters:
    """What one layer carries from step to step: the heavy tokens, and the masses of the heavy and the recent tokens. A
    token's mass is its softmax probability summed over all queries so far, for each query head."""

    heavy: Any  # the kept set of the R heavy tokens, in no order
    heavy_mass: Leaf  # float32 [B, K, G, R]
    recent_mass: Leaf  # float32 [B, K, G, W]: of the newest W slots, in slot order


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Attention to the latest `budget - budget // 2` tokens, including the new one, and to the `budget // 2` other
    tokens with the most accumulated attention.

    A token's score is its softmax probability summed over all queries so far, including the prompt's, for each query
    head, then the maximum over the group's query heads; ties keep the earlier token. A dropped token never returns.
    With `full_stride`, every `full_stride`-th step (counted from 1) attends to the whole cache and adds its
    probabilities to the masses of kept tokens only."""

    method: ClassVar[str] = "h2o"

    budget: int
    full_stride: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 2))
        if self.full_stride is not None:
            object.__setattr__(self, "full_stride", whole_number("full_stride", self.full_stride, 1))

    @property
    def period(self) -> int | None:
        return self.full_stride

    @property
    def needs(self) -> PromptNeeds:
        return PromptNeeds(mass=True)

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[Any, ...]:
        capacity = caches.visible.shape[1]
        budget = min(self.budget, capacity + 1)  # no step needs more entries than the cache has slots
        heavy, recent = budget // 2, budget - budget // 2
        # `recent` counts the new token of the next step, so only recent - 1 tokens of the prompt are recent
        is_old = caches.visible & (jnp.arange(capacity, dtype=jnp.int32) < caches.length - (recent - 1))
        scores = [jnp.where(is_old[:, None], jnp.max(layer.mass, axis=2), -jnp.inf) for layer in prompt]
        states = []
        for kept, layer, chosen_by in zip(attention.keep(caches.layers, scores, heavy, 1), prompt, scores, strict=True):
            recent_mass = newest(jnp.where(caches.visible[:, None, None], layer.mass, 0), 0, caches.length, recent, 0.0)
            recent_mass = recent_mass.at[..., 0].set(-jnp.inf)  # `keep` has judged it: never promote it again
            states.append(HeavyHitters(kept, kept.pick(layer.mass, chosen_by), recent_mass))
        return tuple(states)

    def _entered(self, step: Step, state: HeavyHitters) -> HeavyHitters:
        """The state with the new token among the recent ones. The oldest recent token leaves them: it replaces the
        heavy token of least mass if its own mass is larger, and is dropped otherwise."""
        recent = state.recent_mass.shape[3]
        leaving, mass = step.length - 1 - recent, state.recent_mass[..., :1]
        is_kept = state.heavy.slots >= 0
        standing = jnp.where(is_kept, jnp.max(state.heavy_mass, axis=2), -jnp.inf)
        least = jnp.min(standing, axis=2, keepdims=True)
        # of heavy tokens with equal mass, the latest leaves
        candidates = jnp.where(standing == least, state.heavy.slots, -2)
        weakest = jnp.argmax(candidates, axis=2, keepdims=True).astype(jnp.int32)
        promoted = (leaving >= step.starts)[:, None, None] & (jnp.max(mass, axis=2) > least)
        entries = promoted & (jnp.arange(standing.shape[2], dtype=jnp.int32) == weakest)
        return HeavyHitters(
            state.heavy.replaced(step.cached, entries, leaving),
            jnp.where(entries[:, :, None], mass, state.heavy_mass),
            jnp.concatenate([state.recent_mass[..., 1:], jnp.zeros_like(mass)], axis=3),
        )

    def partial_step(self, attention: Implementation, step: Step, state: HeavyHitters) -> Attended:
        """Attend to the heavy and the recent tokens, and add the attention that they receive to their masses."""
        state, recent = self._entered(step, state), state.recent_mass.shape[3]
        first = jnp.maximum(step.starts, step.length - recent)
        reads = Reads(first, step.length, recent)
        out, *received = state.heavy.attend_with_log_probabilities(step.q, step.cached, reads)
        return Attended(out, _credited(state, *received), full=jnp.zeros_like(step.done))

    def deciding_step(self, attention: Implementation, step: Step, state: HeavyHitters) -> Attended:
        """With `full_stride`: attend to everything, and add the attention that kept tokens receive to their masses."""
        state, recent = self._entered(step, state), state.recent_mass.shape[3]
        out, received = attention.full_with_log_probabilities(step.q, step.cached, step.visible)
        received = jnp.where(step.visible[:, None, None], received, -jnp.inf)
        of_heavy = jnp.take_along_axis(received, jnp.maximum(state.heavy.slots, 0)[:, :, None], axis=3)
        of_recent = newest(received, 0, step.length, recent, -jnp.inf)
        return Attended(out, _credited(state, of_heavy, of_recent), full=jnp.ones_like(step.done))


def _credited(
    state: HeavyHitters, of_heavy: Float[Array, "B K G R"], of_recent: Float[Array, "B K G W"]
) -> HeavyHitters:
    """The state with a step's probabilities, given as log-probabilities, added to the masses."""
    received = jnp.where(state.heavy.slots[:, :, None] >= 0, jnp.exp(of_heavy), 0)
    return HeavyHitters(state.heavy, state.heavy_mass + received, state.recent_mass + jnp.exp(of_recent))
