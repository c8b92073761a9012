"""Kept sets: the tokens that one layer reads between two full steps.

A policy says what is kept and what of it a step reads (`Reads`); how a set is stored and read is an implementation's
business. Here a set is stored as indices into the full cache, and gathered.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention import reference
from recyc_jax.attention.remainder import Moments, Remainder
from recyc_jax.cache import LayerCache, Leaf


class Reads(NamedTuple):
    """What a partial step may read: the entries of a kept set whose slots are written, and the newest tokens of the
    full cache, in the slots from `first` to `length - 1`. With `replacing`, `remaining` says which of them it reads."""

    first: Array  # int32 [B]
    length: Array  # int32 [], or by row [B]: slots written
    most: int  # an upper bound on the newest tokens that a row reads
    replacing: bool = False  # each new token takes the place of one entry: a step reads as many as the set has

    def remaining(self, size: int) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """How many entries of a set of `size` are still read (the best-ranked ones), and the first new slot that is.

        This is the eviction order; the set itself does not change. Each new token puts out the lowest-ranked remaining
        entry, empty entries first; once no entry remains, each puts out the oldest new token."""
        new = self.length - self.first
        if not self.replacing:
            return jnp.full_like(new, size), self.first
        return size - new, jnp.maximum(self.first, self.length - size)


@flax.struct.dataclass
class KeptSlots:
    """A kept set stored as slots of the full cache."""

    slots: Leaf  # int32 [B, K, R]: in rank order; -1 is an entry that holds nothing

    @property
    def size(self) -> int:
        """R, the number of entries."""
        return self.slots.shape[2]

    def attend(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads, rows: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B N H"]:
        """One query per row over what `reads` names. Only the output of `rows` (None: all rows) is needed; kernels skip
        the other rows."""
        return self.attend_with_log_probabilities(q, cached, reads)[0]

    def attend_with_log_probabilities(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"], Float[Array, "B K G W"]]:
        """`attend`, the log-probability of each entry of the set, and that of each of the newest W = `reads.most`
        slots, in the order of slots; -inf for what is not read."""
        slots = self._read_slots(reads)
        out, log_probabilities = reference.selected(q, cached.keys, cached.values, slots)
        log_probabilities = jnp.where(slots[:, :, None] >= 0, log_probabilities, -jnp.inf)
        return out, log_probabilities[..., : self.size], log_probabilities[..., self.size :]

    def moments(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        reads: Reads,
        with_key: bool = False,
        rows: Bool[Array, " B"] | None = None,
    ) -> Moments:
        """`attend`, unrounded, with its logsumexp, and with the mean of the keys if asked for."""
        piece = reference.listed(cached.keys, cached.values, self._read_slots(reads))
        return reference.moments(q, [piece], with_key)

    def attend_also(
        self, rest: Remainder, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads
    ) -> Float[Array, "B N H"]:
        """`attend` to what `reads` names and to one more token for each query head."""
        return rest.added(q, self.moments(q, cached, reads))

    def _read_slots(self, reads: Reads) -> Int[Array, "B K R"]:
        """The slots that `reads` names, -1 in places of none: those of the set's entries, then the newest W."""
        remaining, first = reads.remaining(self.size)
        length = jnp.reshape(reads.length, (-1, 1))
        remains = (jnp.arange(self.size, dtype=jnp.int32) < remaining[:, None, None]) & (self.slots < length[..., None])
        newest_slots = length - reads.most + jnp.arange(reads.most, dtype=jnp.int32)
        is_new = (newest_slots >= first[:, None]) & (newest_slots >= 0)
        new = jnp.broadcast_to(jnp.where(is_new, newest_slots, -1)[:, None], (*self.slots.shape[:2], reads.most))
        return jnp.concatenate([jnp.where(remains, self.slots, -1), new], axis=2)

    def mask(self, reads: Reads, capacity: int) -> Bool[Array, "B K S"]:
        """Which of the cache's `capacity` slots a step reads."""
        slots = self._read_slots(reads)
        rows, heads = (jnp.arange(size, dtype=jnp.int32) for size in slots.shape[:2])
        nowhere = jnp.where(slots < 0, capacity, slots)
        none = jnp.zeros((*slots.shape[:2], capacity), jnp.bool_)
        return none.at[rows[:, None, None], heads[:, None], nowhere].set(True, mode="drop")

    def replaced(self, cached: LayerCache, entries: Bool[Array, "B K R"], slot: Int[Array, ""]) -> KeptSlots:
        """The set with `slot` in place of the marked entries."""
        return dataclasses.replace(self, slots=jnp.where(entries, slot, self.slots))

    def pick(self, by_slot: Float[Array, "B K G S"], scores: Float[Array, "B K S"]) -> Float[Array, "B K G R"]:
        """The numbers of the kept slots in the order of the set's entries; any number for an entry that holds nothing.
        `scores` are those that the set was chosen by."""
        return jnp.take_along_axis(by_slot, jnp.maximum(self.slots, 0)[:, :, None], axis=3)


def newest(
    by_slot: Float[Array, "B K G W"], first: Int[Array, ""] | int, length: Int[Array, ""], count: int, fill: float
) -> Float[Array, "B K G R"]:
    """The numbers of the slots from `length - count` to `length - 1`, out of those of the slots from `first` on; `fill`
    for slots before these."""
    padded = jnp.pad(by_slot, ((0, 0), (0, 0), (0, 0), (count, 0)), constant_values=fill)
    return lax.dynamic_slice_in_dim(padded, length - first, count, axis=3)
