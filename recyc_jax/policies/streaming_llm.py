"""StreamingLLM (Xiao et al., https://arxiv.org/abs/2309.17453): the first tokens, as attention sinks, and the latest.

Deviations from the publication: keys keep their original RoPE positions instead of being renumbered inside the cache, as
in the comparison of the recycled-attention paper. The full cache is kept and a subset of it is read: quality and
read cost are StreamingLLM's, the memory that it saves is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from recyc_jax.attention.api import Implementation
from recyc_jax.config import whole_number
from recyc_jax.policies.base import LOOK_EVERY, Attended, Caches, Observed, Policy, Step


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """Attention to a row's first `sinks` tokens and its latest `budget - sinks`, the new one among them.

    With `full_stride`, every such step (counted from 1, as in `FixedStride`) attends to the whole cache: "StreamingLLM++"
    of the recycled-attention paper's first version, which has the full steps without what they would teach.
    """

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
    def period(self) -> int:
        return self.full_stride or LOOK_EVERY

    @property
    def decides(self) -> bool:
        return self.full_stride is not None

    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[None, ...]:
        return (None,) * len(observed)

    def slots(self, starts: Int[Array, " B"], length: Int[Array, ""], capacity: int) -> Int[Array, "B R"]:
        """What a step reads; -1 where a row is shorter."""
        recent = min(self.budget - self.sinks, capacity)
        sinks = starts[:, None] + jnp.arange(min(self.sinks, capacity), dtype=jnp.int32)
        latest = jnp.broadcast_to(length - recent + jnp.arange(recent, dtype=jnp.int32), (starts.shape[0], recent))
        sinks = jnp.where(sinks < length, sinks, -1)
        return jnp.concatenate([sinks, jnp.where(latest >= starts[:, None] + self.sinks, latest, -1)], axis=1)

    def attend(self, attention: Implementation, step: Step, state: None) -> Attended:
        read = self._in_pieces if attention.COPIES else self._by_index
        return Attended(read(attention, step), None, jnp.zeros(step.q.shape[0], jnp.bool_))

    def _in_pieces(self, attention: Implementation, step: Step) -> Array:
        """The sinks and the latest as they lie in the cache."""
        capacity = step.keys.shape[2]
        sinks = min(self.sinks, capacity)

        def first(cached: Array) -> Array:
            return jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, sinks, axis=1))(cached, starts)

        starts = jnp.minimum(
            step.starts, capacity - sinks
        )  # a row of fewer tokens than sinks may start at the very end
        sink_slots = starts[:, None] + jnp.arange(sinks, dtype=jnp.int32)
        sinks_seen = (sink_slots >= step.starts[:, None]) & (sink_slots < step.length)
        recent = min(self.budget - self.sinks, capacity)
        keys, values, slots = step.cached.latest(step.length, recent)
        seen = (slots >= step.starts[:, None] + self.sinks) & (slots >= step.length - recent) & (slots < step.length)
        pieces = ((first(step.keys), first(step.values), sinks_seen[:, None]), (keys, values, seen[:, None]))
        return attention.pieces_with_weights(step.q, pieces)[0]

    def _by_index(self, attention: Implementation, step: Step) -> Array:
        slots = self.slots(step.starts, step.length, step.keys.shape[2])
        slots = jnp.broadcast_to(slots[:, None], (slots.shape[0], step.keys.shape[1], slots.shape[1]))
        return attention.selected(step.q, step.keys, step.values, slots)

    def decide(self, attention: Implementation, step: Step, state: None) -> Attended:
        def full() -> Attended:
            out = attention.full(step.q, step.keys, step.values, step.visible)
            return Attended(out, None, jnp.ones(step.q.shape[0], jnp.bool_))

        return lax.cond(step.number % self.period == 0, full, lambda: self.attend(attention, step, state))
