"""H2O (Zhang et al., https://arxiv.org/abs/2306.14048): the tokens with the most accumulated attention, and the latest.

Deviations from the publication: a group's key/value head keeps one set, by the maximum over its query heads (the
recycled-attention paper's choice for all methods); the token that leaves does so before the new one attends,
rather than after, so that a step reads `budget` entries and not one more; the halves are `budget // 2` heavy hitters and
the rest recent. The full cache is kept and a subset of it is read: quality and read cost are H2O's, the memory that it
saves is not modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention import select
from recyc_jax.attention.api import Implementation
from recyc_jax.cache import LayerCache, Leaf
from recyc_jax.config import whole_number
from recyc_jax.policies.base import LOOK_EVERY, Attended, Caches, Observed, Observes, Policy, Step


@flax.struct.dataclass
class Hitters:
    """One layer's kept tokens: first the heavy ones, in no order, then a ring of recent ones by `slot % recent`."""

    slots: Leaf  # int32 [B, K, R]; -1 is an empty entry
    mass: Leaf  # float32 [B, K, G, R]: each one's probability summed over all queries so far
    copied: LayerCache | None = None  # P entries: the heavy ones', where the implementation wants copies


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Attention to the `budget - budget // 2` latest tokens, the new one among them, and the `budget // 2` others with the
    highest accumulated attention.

    A key's score is its softmax probability summed over all queries so far, the prompt's included, in each query head,
    then the maximum over the group; ties stay with the earlier token. What is dropped never returns. With `full_stride`,
    every such step (counted from 1) attends to the whole cache for its output, and adds that step's probabilities to
    kept keys only.
    """

    budget: int
    full_stride: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", whole_number("budget", self.budget, 2))
        if self.full_stride is not None:
            object.__setattr__(self, "full_stride", whole_number("full_stride", self.full_stride, 1))

    @property
    def period(self) -> int:
        return self.full_stride or LOOK_EVERY

    @property
    def decides(self) -> bool:
        return self.full_stride is not None

    @property
    def observes(self) -> Observes:
        return Observes(mass=True)

    def _halves(self, capacity: int) -> tuple[int, int]:
        """Heavy and recent entries; more than the cache has slots are never needed."""
        budget = min(self.budget, capacity + 1)
        return budget // 2, budget - budget // 2

    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[Hitters, ...]:
        attention, visible = caches.attention, caches.visible
        capacity = visible.shape[1]
        heavy, recent = self._halves(capacity)
        at = jnp.arange(capacity, dtype=jnp.int32)
        length = caches.length
        # the next token makes the recent ones complete, so one place less is taken now
        is_old = visible & (at < length - (recent - 1))
        # entry e of the ring holds the one recent slot that leaves the remainder e; `length` itself is still to come
        entry = jnp.arange(recent, dtype=jnp.int32)
        ring = length - 1 - (length - 1 - entry) % recent
        seen = (ring > length - recent) & (ring >= jnp.argmax(visible, axis=1).astype(jnp.int32)[:, None])
        ring = jnp.where(seen, ring, -1)[:, None]

        masses = [cast(Array, layer.mass) for layer in observed]
        standing = [jnp.where(is_old[:, None], jnp.max(mass, axis=2), -jnp.inf) for mass in masses]
        states = []
        for mass, scores, slots, cached in zip(
            masses, standing, select.top_slots(jnp.stack(standing), heavy), caches.layers, strict=True
        ):
            if attention.COPIES:
                listed = select.listed(scores, slots)
                copied = cached.with_others(*attention.compact(cached.keys, cached.values, listed, heavy))
                slots, kept = _side_by_side(listed, mass, slots.shape[2])
            else:
                copied = None
                kept = jnp.take_along_axis(mass, jnp.maximum(slots, 0)[:, :, None], axis=3)
            spare = ((0, 0), (0, 0), (0, heavy - slots.shape[2]))
            slots = jnp.pad(slots, spare, constant_values=-1)
            slots = jnp.concatenate([slots, jnp.broadcast_to(ring, (*slots.shape[:2], recent))], axis=2)
            kept = jnp.pad(kept, ((0, 0), *spare))
            kept = jnp.concatenate([kept, _as_ring(mass, jnp.int32(0), length, recent)], axis=3)
            states.append(Hitters(slots, jnp.where(slots[:, :, None] < 0, 0, kept), copied))
        return tuple(states)

    def insert(self, kept: Hitters, step: Step) -> Hitters:
        """The set with the new token in it. The one that is recent no longer competes with the heavy ones."""
        slot, capacity = step.slot, step.keys.shape[2]
        heavy, recent = self._halves(capacity)
        entries = jnp.arange(heavy + recent, dtype=jnp.int32)
        at = heavy + slot % recent
        leaving = lax.dynamic_index_in_dim(kept.slots, at, axis=2)
        leaving_mass = lax.dynamic_index_in_dim(kept.mass, at, axis=3)
        standing = jnp.where(kept.slots < 0, -jnp.inf, jnp.max(kept.mass, axis=2))
        standing = jnp.where(entries < heavy, standing, jnp.inf)
        least = jnp.min(standing, axis=2, keepdims=True)
        # among equals the latest goes
        weakest = jnp.argmax(jnp.where(standing == least, kept.slots, -2), axis=2, keepdims=True)
        promoted = (leaving >= 0) & (jnp.max(leaving_mass, axis=2) > least)
        here = promoted & (entries == weakest)
        slots = jnp.where(here, leaving, kept.slots)
        mass = jnp.where(here[:, :, None], leaving_mass, kept.mass)
        copied = kept.copied
        if copied is not None:
            gone = jnp.clip(slot - recent, 0, capacity - 1)
            spare = copied.keys.shape[2] - heavy
            placed = jnp.pad(here[..., :heavy], ((0, 0), (0, 0), (0, spare)))[..., None]
            keys, values, near = step.cached.latest(gone + 1, 1)
            key, value = (lax.dynamic_slice_in_dim(some, gone - near[0], 1, axis=2) for some in (keys, values))
            copied = copied.with_others(jnp.where(placed, key, copied.keys), jnp.where(placed, value, copied.values))
        newest = entries == at
        return Hitters(jnp.where(newest, slot, slots), jnp.where(newest, 0, mass), copied)

    def attend(self, attention: Implementation, step: Step, state: Hitters) -> Attended:
        kept = self.insert(state, step)
        if kept.copied is None:
            out, weights = attention.selected_with_weights(step.q, step.keys, step.values, kept.slots)
        else:
            out, weights = self._in_pieces(attention, step, kept)
        return Attended(out, _credited(kept, weights), jnp.zeros(step.q.shape[0], jnp.bool_))

    def _in_pieces(self, attention: Implementation, step: Step, kept: Hitters) -> tuple[Array, Array]:
        """`selected_with_weights` over the copies of the heavy ones and the recent ones as they lie in the cache."""
        capacity = step.keys.shape[2]
        heavy, recent = self._halves(capacity)
        near = cast(LayerCache, kept.copied)
        spare = near.keys.shape[2] - heavy
        is_heavy = jnp.pad(kept.slots[..., :heavy] >= 0, ((0, 0), (0, 0), (0, spare)))
        keys, values, slots = step.cached.latest(step.length, min(recent, capacity))
        seen = (slots >= step.starts[:, None]) & (slots > step.slot - recent) & (slots < step.length)
        pieces = ((near.keys, near.values, is_heavy), (keys, values, seen[:, None]))
        out, weights = attention.pieces_with_weights(step.q, pieces)
        of_recent = _as_ring(weights[..., heavy + spare :], slots[0], step.length, recent)
        return out, jnp.concatenate([weights[..., :heavy], of_recent], axis=3)

    def decide(self, attention: Implementation, step: Step, state: Hitters) -> Attended:
        def full() -> Attended:
            kept = self.insert(state, step)
            out, weights = attention.full_with_weights(step.q, step.keys, step.values, step.visible)
            weights = jnp.take_along_axis(weights, jnp.maximum(kept.slots, 0)[:, :, None], axis=3)
            return Attended(out, _credited(kept, weights), jnp.ones(step.q.shape[0], jnp.bool_))

        return lax.cond(step.number % self.period == 0, full, lambda: self.attend(attention, step, state))


def _side_by_side(
    listed: Bool[Array, "B K S"], mass: Float[Array, "B K G S"], most: int
) -> tuple[Int[Array, "B K R"], Float[Array, "B K G R"]]:
    """The listed slots in ascending order, -1 last, and their masses, without a gather: a TPU would turn the masses around
    for one, and pad them to 128 times their size."""
    absent = jnp.iinfo(jnp.int32).max
    at = jnp.where(listed, jnp.arange(listed.shape[2], dtype=jnp.int32), absent)
    by_head = [mass[:, :, head] for head in range(mass.shape[2])]
    slots, *masses = lax.sort((at, *by_head), dimension=2, num_keys=1)
    slots = slots[..., :most]
    return jnp.where(slots == absent, -1, slots), jnp.stack([one[..., :most] for one in masses], axis=2)


def _as_ring(by_slot: Float[Array, "B K G W"], first: Array, length: Array, recent: int) -> Float[Array, "B K G R"]:
    """Numbers of the slots from `first` on, as the ring of the last `recent` of `length` slots has them: entry e is the
    slot that leaves the remainder e. Zero at slots before `first`."""
    padded = jnp.pad(by_slot, ((0, 0), (0, 0), (0, 0), (recent, 0)))
    in_order = lax.dynamic_slice_in_dim(padded, length - first, recent, axis=3)
    return jnp.roll(in_order, (length - recent) % recent, axis=3)


def _credited(kept: Hitters, weights: Float[Array, "B K G R"]) -> Hitters:
    mass = kept.mass + jnp.where(kept.slots[:, :, None] < 0, 0, weights)
    return dataclasses.replace(kept, mass=mass)
