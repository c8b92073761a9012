"""Kept sets as copies, for devices that are too slow at reading single slots of a cache by index."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention import reference, selection
from recyc_jax.attention.kept import Reads, newest
from recyc_jax.attention.remainder import Moments, Remainder
from recyc_jax.cache import LayerCache, Leaf

FEW = 128
"""The most new tokens per row for which a partial step reads a short piece of the cache, of this many slots."""

Compact = Callable[[Array, Array, Array, int], tuple[Array, Array]]
"""(keys [B, K, S, H], values [B, K, S, H], which slots are chosen [B, K, S], R) -> keys and values [B, K, P, H] of the
chosen slots, at most R per head, in the order of slots, then zeros."""

ABSENT = jnp.iinfo(jnp.int32).max
"""The rank of an entry that holds nothing. In sorts it comes after all ranks and slots."""


@flax.struct.dataclass
class CopiedSet:
    """A kept set stored as copies of its keys and values, in the order of their slots."""

    copied: LayerCache  # P >= R entries
    slots: Leaf  # int32 [B, K, R]: ascending; -1, at the end, is an entry that holds nothing
    ranks: Leaf  # int32 [B, K, P]: 0 is the best; `ABSENT` is an entry that holds nothing
    size: int = flax.struct.field(pytree_node=False)  # R

    @classmethod
    def of_slots(
        cls, slots: Int[Array, "B K R"], scores: Float[Array, "B K S"], cached: LayerCache, compact: Compact
    ) -> CopiedSet:
        """The set of these slots, which are in rank order and were chosen by these scores."""
        size = slots.shape[2]
        keys, values = compact(cached.keys, cached.values, _not_below(scores, slots[..., -1:]), size)
        rank = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), slots.shape)
        spare = ((0, 0), (0, 0), (0, keys.shape[2] - size))
        ascending, ranks = lax.sort((jnp.where(slots < 0, ABSENT, slots), rank), dimension=2, num_keys=1)
        return cls(
            cached.replaced(keys, values),
            jnp.where(ascending == ABSENT, -1, ascending),
            jnp.pad(jnp.where(ascending == ABSENT, ABSENT, ranks), spare, constant_values=ABSENT),
            size,
        )

    def attend(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads, rows: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B N H"]:
        """As `KeptSlots.attend`."""
        if reads.most <= 2 * FEW:
            return self._attend(q, cached, reads)[0]
        few = jnp.max(reads.length - reads.first) <= FEW
        return lax.cond(
            few,
            lambda: self._attend(q, cached, reads._replace(most=FEW))[0],
            lambda: self._attend(q, cached, reads)[0],
        )

    def attend_with_log_probabilities(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"], Float[Array, "B K G W"]]:
        """As `KeptSlots.attend_with_log_probabilities`."""
        out, entry_log_probabilities, newest_log_probabilities = self._attend(q, cached, reads)
        return out, entry_log_probabilities[..., : self.size], newest_log_probabilities

    def moments(self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads, with_key: bool = False) -> Moments:
        """As `KeptSlots.moments`."""
        return reference.moments(q, self._pieces(cached, reads)[0], with_key)

    def attend_also(
        self, rest: Remainder, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads
    ) -> Float[Array, "B N H"]:
        """As `KeptSlots.attend_also`; as in `attend`, a short piece of the cache is read while it holds all new
        tokens."""
        if reads.most <= 2 * FEW:
            return rest.added(q, self.moments(q, cached, reads))
        few = jnp.max(reads.length - reads.first) <= FEW
        return lax.cond(
            few,
            lambda: rest.added(q, self.moments(q, cached, reads._replace(most=FEW))),
            lambda: rest.added(q, self.moments(q, cached, reads)),
        )

    def _pieces(self, cached: LayerCache, reads: Reads) -> tuple[tuple[Any, Any], Array]:
        """What `reads` names as two pieces of one softmax: the copies, and the newest slots, which are read from the
        cache; and the numbers of the slots of the second piece."""
        remaining, first = reads.remaining(self.size)
        spare = ((0, 0), (0, 0), (0, self.ranks.shape[2] - self.size))
        is_written = jnp.pad(self.slots < reads.length, spare)
        is_ranked = (self.ranks < jnp.minimum(remaining, self.size)[:, None, None]) & is_written
        keys, values, slots = cached.newest(reads.length, min(reads.most, cached.capacity))
        is_new = (slots >= first[:, None]) & (slots < reads.length)
        return ((self.copied.keys, self.copied.values, is_ranked), (keys, values, is_new[:, None])), slots

    def _attend(self, q: Array, cached: LayerCache, reads: Reads) -> tuple[Array, Array, Array]:
        """The output, and the log-probabilities of the entries [B, K, G, P] and of the newest slots [B, K, G, W]."""
        pieces, slots = self._pieces(cached, reads)
        is_ranked, is_new = (visible for _, _, visible in pieces)
        out, log_probabilities = reference.over_pieces(q, pieces)
        count = is_ranked.shape[2]
        entry_log_probabilities = jnp.where(is_ranked[:, :, None], log_probabilities[..., :count], -jnp.inf)
        run_log_probabilities = jnp.where(is_new[:, None], log_probabilities[..., count:], -jnp.inf)
        # the run of slots that was read can begin before the newest slots, and, while few slots are written, it holds
        # fewer than `most` of them
        return (
            out,
            entry_log_probabilities,
            newest(run_log_probabilities, slots[0], reads.length, reads.most, -jnp.inf),
        )

    def replaced(self, cached: LayerCache, entries: Bool[Array, "B K R"], slot: Int[Array, ""]) -> CopiedSet:
        """The set with `slot` in place of the marked entries."""
        slot_in_range = jnp.clip(slot, 0, cached.capacity - 1)
        keys, values, slots = cached.newest(slot_in_range + 1, 1)
        key, value = (lax.dynamic_slice_in_dim(one, slot_in_range - slots[0], 1, axis=2) for one in (keys, values))
        marked = jnp.pad(entries, ((0, 0), (0, 0), (0, self.ranks.shape[2] - self.size)))
        copied = self.copied.replaced(
            jnp.where(marked[..., None], key, self.copied.keys), jnp.where(marked[..., None], value, self.copied.values)
        )
        # a set whose entries are replaced one by one has no order: any rank but `ABSENT` means that the entry is read
        ranks = jnp.where(marked, 0, self.ranks)
        return dataclasses.replace(self, copied=copied, slots=jnp.where(entries, slot, self.slots), ranks=ranks)

    def pick(self, by_slot: Float[Array, "B K G S"], scores: Float[Array, "B K S"]) -> Float[Array, "B K G R"]:
        """As `KeptSlots.pick`, but with a sort: for a gather a TPU would transpose the numbers, padded to 128 times
        their size."""
        last = jnp.max(jnp.where(self.ranks[..., : self.size] == self.size - 1, self.slots, -1), axis=2, keepdims=True)
        is_kept = _not_below(scores, last)
        order = jnp.where(is_kept, jnp.arange(by_slot.shape[3], dtype=jnp.int32), ABSENT)
        _, *sorted_heads = lax.sort((order, *jnp.moveaxis(by_slot, 2, 0)), dimension=2, num_keys=1)
        return jnp.stack([head[..., : self.size] for head in sorted_heads], axis=2)


def keep_copies(
    layers: Sequence[LayerCache],
    scores: Sequence[Float[Array, "B K S"]],
    budget: int,
    compact: Compact,
) -> list[CopiedSet]:
    """The sets of `Implementation.keep`, stored as copies."""
    slots = selection.top_slots(jnp.stack(scores), budget)
    return [
        CopiedSet.of_slots(layer_slots, layer_scores, cached, compact)
        for layer_slots, layer_scores, cached in zip(slots, scores, layers, strict=True)
    ]


def copy_first_slots(cached: LayerCache, starts: Int[Array, " B"], count: int) -> CopiedSet:
    """The set of `Implementation.first_slots`, stored as a copy of one contiguous run of slots per row."""
    size = max(1, min(count, cached.capacity))
    # a row of fewer tokens than `count` can begin at the very end of the cache
    begin = jnp.minimum(starts, cached.capacity - size)
    run = lambda x: jax.vmap(lambda row, slot: lax.dynamic_slice_in_dim(row, slot, size, axis=1))(x, begin)  # noqa: E731
    slots = begin[:, None] + jnp.arange(size, dtype=jnp.int32)
    ranks = jnp.where((slots >= starts[:, None]) & (count > 0), slots - starts[:, None], ABSENT)
    shape = (*cached.keys.shape[:2], size)
    slots, ranks = (jnp.broadcast_to(one[:, None], shape) for one in (slots, ranks))
    return CopiedSet(cached.replaced(run(cached.keys), run(cached.values)), slots, ranks, size)


def _not_below(scores: Float[Array, "B K S"], last: Int[Array, "B K 1"]) -> Bool[Array, "B K S"]:
    """The slots that rank before slot `last` by these scores, and slot `last` itself, found without a scatter. With
    `last` -1, all slots whose score is not -inf."""
    least = jnp.take_along_axis(scores, jnp.maximum(last, 0), axis=2)
    slots = jnp.arange(scores.shape[2], dtype=jnp.int32)
    before = (scores > least) | ((scores == least) & (slots <= last))
    return jnp.where(last < 0, scores > -jnp.inf, before)
