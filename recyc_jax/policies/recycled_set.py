"""The recycled tokens of a layer, as indices into the full cache: ranked ones, and what has come since."""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention import select
from recyc_jax.cache import Leaf


def ranked_slots(
    scores: Sequence[Float[Array, "B K S"]], visible: Bool[Array, "B S"], budget: int, pool: int, lookahead: int
) -> list[Int[Array, "B K R"]]:
    """For each layer the R = min(budget, S) best slots by pooled score, best first, ties to the earlier; -1 beyond the
    tokens there are. All layers in one sort, which is what takes long to compile and to start."""
    return best_slots([select.pool(layer_scores, visible, pool, lookahead) for layer_scores in scores], budget)


def best_slots(scores: Sequence[Float[Array, "B K S"]], count: int) -> list[Int[Array, "B K R"]]:
    """`select.top_slots` of each layer, in one sort."""
    together = select.top_slots(jnp.concatenate(scores, axis=0), count)
    return jnp.split(together, len(scores), axis=0)


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

    def read(self, length: Int[Array, ""], newest: int) -> Int[Array, "B K R"]:
        """The slots to attend to."""
        return self.slots


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

    def read(self, length: Int[Array, ""], newest: int) -> Int[Array, "B K R_and_newest"]:
        """The slots to attend to; at most `newest` tokens have come since the refresh."""
        new = self.since[:, None, None] + jnp.arange(newest, dtype=jnp.int32)
        new = jnp.where(new < length, new, -1)
        return jnp.concatenate([self.slots, jnp.broadcast_to(new, (*self.slots.shape[:2], newest))], axis=2)
