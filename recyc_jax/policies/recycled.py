"""Recycled Attention (Xu, Goyal and Choi, arXiv:2411.05787; RefreshKV at ACL 2025).

Prefill notes which tokens the last prompt token attends to; partial steps attend to those `budget` tokens only; every
`stride`-th step attends to the whole cache and notes them anew. Nothing leaves the full cache, so a token that was not
recycled can come back at the next full step.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention import select
from recyc_jax.attention.api import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.config import whole_number
from recyc_jax.policies.base import Attended, Policy, View
from recyc_jax.policies.schedules import FixedStride


@flax.struct.dataclass
class Recycled:
    """The partial cache of one layer, as indices into the full one."""

    slots: Leaf  # int32 [B, K, R]: in rank order at the refresh; -1 is an empty entry
    lowest: Leaf  # int32 [B]: the entry that the next new token replaces

    @classmethod
    def of(cls, slots: Int[Array, "B K R"]) -> Recycled:
        batch, _, entries = slots.shape
        return cls(slots, jnp.full(batch, entries - 1, jnp.int32))

    def insert(self, slot: Int[Array, ""]) -> Recycled:
        """The set with the new token's slot in place of the lowest-ranked entry.

        Going through the entries backwards and around does all three of our decisions: empty entries are
        used up first, then ranked ones from the lowest up, and after the last of them the oldest new token leaves.
        """
        entries = self.slots.shape[-1]
        replaced = jnp.arange(entries, dtype=jnp.int32) == self.lowest[:, None, None]
        return Recycled(jnp.where(replaced, slot, self.slots), (self.lowest - 1) % entries)


@dataclasses.dataclass(frozen=True)
class RecycledAttention(Policy):
    """Full attention every `schedule.stride` steps, attention to the recycled top `budget` tokens in between.

    `budget` (the paper's K) counts the entries that a partial step reads in each layer and key/value head, the new token
    among them (our decision); a budget above the context is legal and equals full attention. Scores are the last full
    step's log-probabilities, the maximum over the query heads of a group, max-pooled over `pool` neighbouring keys
    (section 3.1); ranks are exact, ties to the earlier token.

    `lookahead` (ours; 0 is the paper's rule) stretches the pooling backwards, so that the `lookahead` tokens after an
    attended one are kept too: text that is copied token by token moves on by one each step, and a centred window of 7
    covers only the next three. `"auto"` covers the steps until the next refresh, `schedule.period - 1`.
    """

    budget: int
    schedule: FixedStride
    pool: int = 7
    lookahead: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 1))
        object.__setattr__(self, "pool", whole_number("pool", self.pool, 1))
        if self.pool % 2 == 0:
            raise ValueError(f"pool={self.pool} must be odd: the window is centred on its token")
        if self.lookahead != "auto":
            object.__setattr__(self, "lookahead", whole_number("lookahead", self.lookahead, 0))
        if not isinstance(self.schedule, FixedStride):
            raise ValueError(f"schedule={self.schedule!r} must be a schedule, such as FixedStride(10)")

    @property
    def period(self) -> int:
        return self.schedule.period

    @property
    def decides(self) -> bool:
        return True

    @property
    def observes_scores(self) -> bool:
        return True

    def start(self, scores: Float[Array, "B K S"] | None, visible: Bool[Array, "B S"]) -> Recycled:
        if scores is None:
            raise ValueError(
                "recycled attention starts from prefill's scores: name the policy in prefill(policies=...)"
            )
        lookahead = self.period - 1 if self.lookahead == "auto" else self.lookahead
        pooled = select.pool(scores, visible, self.pool, lookahead)
        return Recycled.of(select.top_slots(pooled, self.budget))

    def attend(self, attention: Implementation, q: Float[Array, "B N H"], view: View, state: Recycled) -> Attended:
        """A partial step: the new token enters the set before attending."""
        state = state.insert(view.length - 1)
        out = attention.selected(q, view.keys, view.values, state.slots)
        return Attended(out, state, jnp.zeros(q.shape[0], jnp.bool_))

    def refresh(self, attention: Implementation, q: Float[Array, "B N H"], view: View) -> Attended:
        """A full step: attend to everything and rebuild the set from this step's scores."""
        out, scores = attention.full_with_scores(q, view.keys, view.values, view.visible)
        return Attended(out, self.start(scores, view.visible), jnp.ones(q.shape[0], jnp.bool_))

    def decide(
        self, attention: Implementation, q: Float[Array, "B N H"], view: View, state: Recycled, step: Int[Array, ""]
    ) -> Attended:
        return lax.cond(
            self.schedule.is_full(step),
            lambda: self.refresh(attention, q, view),
            lambda: self.attend(attention, q, view, state),
        )
