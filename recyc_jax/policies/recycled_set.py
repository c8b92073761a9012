"""The recycled tokens of a layer: ranked ones, and what has come since.

Three are indices into the full cache; the fourth, for machines that read single slots slowly, is a copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention import select
from recyc_jax.attention.api import Implementation
from recyc_jax.cache import LayerCache, Leaf
from recyc_jax.policies.base import Step


class Ranking(NamedTuple):
    """What a layer's set is made of."""

    slots: Array  # int32 [B, K, R]: the best ones, the first to leave last; -1 beyond the tokens there are
    scores: Array  # float32 [B, K, S]: what they were ranked by; -inf at slots without a token


def rank(
    attention: Implementation,
    scores: Sequence[Float[Array, "B K S"]],
    visible: Bool[Array, "B S"],
    budget: int,
    pool: int,
    lookahead: int,
    ordered: int,
) -> list[Ranking]:
    """For each layer the R = min(budget, S) best slots by pooled score, ties to the earlier, at least the last `ordered` of
    them in rank order. All layers' are chosen at once: starting a choice takes long, and so does compiling it."""
    pooled = [select.pool(layer_scores, visible, pool, lookahead) for layer_scores in scores]
    best = attention.top_slots(jnp.stack(pooled), budget, ordered)
    return [Ranking(*both) for both in zip(list(best), pooled, strict=True)]


def by_position(slots: Int[Array, "B K R"], *others: Array) -> tuple[Array, ...]:
    """The slots in ascending order, -1 last, and arrays [B, K, R] that go with them."""
    absent = jnp.iinfo(jnp.int32).max
    first, *rest = lax.sort((jnp.where(slots < 0, absent, slots), *others), dimension=2, num_keys=1)
    return jnp.where(first == absent, -1, first), *rest


def chosen_set(
    attention: Implementation, cached: LayerCache, ranking: Ranking, length: Int[Array, ""], evict: bool
) -> AnySet:
    """The set that a ranking leaves, in the form that this implementation reads; `length` slots are written."""
    if attention.COPIES:
        return Copied.of(attention, cached, ranking, length, evict)
    if attention.INDEXES:
        return Listed(ranking.slots, jnp.broadcast_to(length, ranking.slots.shape[:1]), evict)
    return Recycled.of(ranking.slots) if evict else Unevicted.of(ranking.slots, length)


@flax.struct.dataclass
class Recycled:
    """A set of constant size: each new token takes the place of the lowest-ranked one."""

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

    def attend(self, attention: Implementation, step: Step, newest: int) -> Array:
        """One query a row over the set, [B, N, H]."""
        return attention.selected(step.q, step.keys, step.values, self.slots)


@flax.struct.dataclass
class Unevicted:
    """A set that grows: the ranked tokens, and every token since they were ranked."""

    slots: Leaf  # int32 [B, K, R]
    since: Leaf  # int32 [B]: the first slot after the refresh

    @classmethod
    def of(cls, slots: Int[Array, "B K R"], length: Int[Array, ""]) -> Unevicted:
        return cls(slots, jnp.broadcast_to(length, slots.shape[:1]))

    def insert(self, slot: Int[Array, ""]) -> Unevicted:
        """The set itself: what is new is told by `since`."""
        return self

    def attend(self, attention: Implementation, step: Step, newest: int) -> Array:
        """One query a row over the set, [B, N, H]; at most `newest` tokens have come since the refresh."""
        new = self.since[:, None, None] + jnp.arange(newest, dtype=jnp.int32)
        new = jnp.where(new < step.length, new, -1)
        new = jnp.broadcast_to(new, (*self.slots.shape[:2], newest))
        slots = jnp.concatenate([self.slots, new], axis=2)
        return attention.selected(step.q, step.keys, step.values, slots)


@flax.struct.dataclass
class Listed:
    """`Recycled` or `Unevicted` without upkeep: who has left, and what is new, is told by the number of new tokens."""

    slots: Leaf  # int32 [B, K, R]: as ranked
    since: Leaf  # int32 [B]: the first slot after the refresh
    evict: bool = flax.struct.field(pytree_node=False)

    def insert(self, slot: Int[Array, ""]) -> Listed:
        """The set itself: what is new is told by `since`."""
        return self

    def attend(self, attention: Implementation, step: Step, newest: int) -> Array:
        """One query a row over the set, [B, N, H], however many tokens have come since the refresh."""
        return attention.recycled(step.q, step.keys, step.values, self.slots, self.since, step.length, self.evict)

    def attend_or_all(
        self, attention: Implementation, step: Step, due: Bool[Array, " B"]
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K S"]]:
        """`attend`, but rows that are due attend to everything; and these rows' scores, -inf for the others."""
        return attention.full_or_recycled(
            step.q, step.keys, step.values, step.visible, due, self.slots, self.since, step.length, self.evict
        )


FEW = 128
"""New tokens up to which `Copied` reads a short piece of the cache."""


@flax.struct.dataclass
class Copied:
    """`Recycled` or `Unevicted` without reading by index: the ranked tokens' keys and values, copied when they were
    ranked, and the newest tokens, which lie side by side in the cache. Who leaves is told by rank and number."""

    copied: LayerCache  # P entries, in the slots' order
    ranks: Leaf  # int32 [B, K, P]: 0 is the best; that of an entry that holds nothing is beyond all
    since: Leaf  # int32 [B]: the first slot after the refresh
    entries: int = flax.struct.field(pytree_node=False)  # R
    evict: bool = flax.struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, attention: Implementation, cached: LayerCache, ranking: Ranking, length: Int[Array, ""], evict: bool
    ) -> Copied:
        slots, entries = ranking.slots, ranking.slots.shape[2]
        keys, values = attention.compact(cached.keys, cached.values, select.listed(ranking.scores, slots), entries)
        beyond = jnp.iinfo(jnp.int32).max
        ordered, ranks = by_position(slots, jnp.broadcast_to(jnp.arange(entries, dtype=jnp.int32), slots.shape))
        ranks = jnp.where(ordered < 0, beyond, ranks)
        ranks = jnp.pad(ranks, ((0, 0), (0, 0), (0, keys.shape[2] - entries)), constant_values=beyond)
        return cls(cached.with_others(keys, values), ranks, jnp.broadcast_to(length, slots.shape[:1]), entries, evict)

    def insert(self, slot: Int[Array, ""]) -> Copied:
        """The set itself: what is new is told by `since`."""
        return self

    def attend(self, attention: Implementation, step: Step, newest: int) -> Array:
        """One query a row over the set, [B, N, H]; at most `newest` tokens have come since the refresh."""
        new = step.length - self.since  # the token of this step among them
        if self.evict:
            newest = min(newest, self.entries)
            old_seen = self.ranks < (self.entries - new)[:, None, None]
        else:
            old_seen = self.ranks < self.entries
        newest = min(newest, step.keys.shape[2])

        def over(count: int) -> Array:
            keys, values, slots = step.cached.latest(step.length, count)
            new_seen = (slots >= self.since[:, None]) & (slots < step.length)
            if self.evict:  # once all ranked ones have left, the oldest new ones do
                new_seen &= slots >= step.length - self.entries
            pieces = ((self.copied.keys, self.copied.values, old_seen), (keys, values, new_seen[:, None]))
            return attention.pieces_with_weights(step.q, pieces)[0]

        if newest <= 2 * FEW:
            return over(newest)
        return lax.cond(jnp.max(new) <= FEW, lambda: over(FEW), lambda: over(newest))


AnySet = Recycled | Unevicted | Listed | Copied
