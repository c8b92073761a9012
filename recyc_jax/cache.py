"""The KV cache: one pair of arrays per layer, never evicted, appended to in place. A layer with a sliding window keeps
the slots of its window alone, in a ring: slot s lies at place s % R of its R places.

Rows are right-aligned: the newest token of every row sits in the same slot, so one write appends a token to the whole
batch, and the tokens of row b start at slot `starts[b]`. A token's RoPE position is `slot - starts[b]`.

One array per layer (rather than one stacked [L, ...] array) is what lets XLA update it in place in every form of loop.

An implementation may store the slots last in memory (`slots_last`). `keys` and `values` are [B, K, S, H] either way:
inside a compiled program the exchange of two axes moves nothing."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import sharding
from recyc_jax.config import LlamaConfig

# A field of a pytree: an array, though `jax.tree.map` may put anything in its place, so it is not checked at run time.
if TYPE_CHECKING:
    Leaf: TypeAlias = Array
else:
    Leaf = Any

TILE = 128
"""With the slots last, the capacity is a multiple of this (a TPU's lanes): XLA would copy other sizes before a
kernel."""

_AS_STORED = Layout((0, 1, 2, 3))
"""The layout that is pinned for every array with the slots last: XLA would otherwise transpose a whole cache in memory
in order to read a few of its slots."""


@flax.struct.dataclass
class LayerCache:
    """The keys (after RoPE) and values of one layer."""

    stored_keys: Leaf  # [B, K, S, H], or [B, K, H, S] with the slots last
    stored_values: Leaf
    slots_last: bool = flax.struct.field(pytree_node=False, default=False)
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    """The tokens that the layer attends to, if it has a sliding window: the cache is then a ring."""

    @property
    def keys(self) -> Array:
        """[B, K, S, H]"""
        return self._slots_third(self.stored_keys)

    @property
    def values(self) -> Array:
        """[B, K, S, H]"""
        return self._slots_third(self.stored_values)

    @property
    def capacity(self) -> int:
        """S, the number of slots (R, that of places, in a ring)."""
        return self.stored_keys.shape[3 if self.slots_last else 2]

    @property
    def letters(self) -> str:
        """The dimensions of both arrays, for `sharding.by_letters`: a ring is not split."""
        return _letters(self.slots_last, self.window)

    def place(self, slot: Int[Array, "..."]) -> Int[Array, "..."]:
        """Where a slot lies in the arrays."""
        return slot if self.window is None else slot % self.capacity

    def _slots_third(self, stored: Array) -> Array:
        return with_layout_constraint(stored, _AS_STORED).swapaxes(2, 3) if self.slots_last else stored

    def replaced(self, keys: Float[Array, "B K R H"], values: Float[Array, "B K R H"]) -> LayerCache:
        """A cache of these keys and values, stored in the same layout as this one."""
        if self.slots_last:
            keys, values = (with_layout_constraint(one.swapaxes(2, 3), _AS_STORED) for one in (keys, values))
        return dataclasses.replace(self, stored_keys=keys, stored_values=values)

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        slot: Int[Array, ""] | Int[Array, " B"],
        is_new: Bool[Array, "B T"] | None = None,
    ) -> LayerCache:
        """The cache with T tokens written from `slot`, or each row's slot, on; T = 1 in a ring. Slots that are not new stay
        as they are."""
        slot = jnp.asarray(slot)  # a number where jit is disabled
        if self.window is None and sharding.slot_shares() > 1 and not sharding.unsplit():
            is_new = jnp.ones(k.shape[:2], jnp.bool_) if is_new is None else is_new
            inputs = self.letters, "B-K-", "B-K-", "B" if slot.ndim else "", "B-"
            local = sharding.split_kernel(LayerCache._append_to_part, k.shape[0], inputs, self.letters)
            return local(self, k, v, slot, is_new)
        if slot.ndim == 1:
            assert is_new is None  # no caller has both
            return self._append_by_row(k, v, slot)
        zero, slot = jnp.zeros((), jnp.int32), self.place(slot)
        axes, begin = ((0, 2, 1, 3), (zero, zero, slot, zero))
        if self.slots_last:
            axes, begin = (0, 2, 3, 1), (zero, zero, zero, slot)

        def written(stored: Array, new: Array) -> Array:
            new = new.transpose(axes)
            if is_new is not None:
                before = lax.dynamic_slice(stored, begin, new.shape)
                new = jnp.where(is_new[:, :, None, None].transpose(axes), new, before)
            stored = lax.dynamic_update_slice(stored, new, begin)
            return with_layout_constraint(stored, _AS_STORED) if self.slots_last else stored

        return dataclasses.replace(
            self, stored_keys=written(self.stored_keys, k), stored_values=written(self.stored_values, v)
        )

    def _append_to_part(self, k: Array, v: Array, slot: Array, is_new: Array) -> LayerCache:
        """`append` on a device that has a part of the slots: a window of slots around those that are its own, of as many
        as there are tokens, is read and written again, with the tokens in it."""
        assert not self.slots_last
        width, slot = min(k.shape[1], self.capacity), slot - sharding.first_slot(self.capacity)
        begin = jnp.clip(slot, 0, self.capacity - width)
        # the number of the token that belongs into each slot of the window: [B, W]
        number = (begin - slot)[..., None] + jnp.arange(width, dtype=jnp.int32)
        number = jnp.broadcast_to(number, (k.shape[0], width))
        token = jnp.clip(number, 0, k.shape[1] - 1)
        is_here = (number == token) & jnp.take_along_axis(is_new, token, axis=1)

        def written(stored: Array, new: Array) -> Array:
            new = jnp.take_along_axis(new, token[:, :, None, None], axis=1).transpose(0, 2, 1, 3)
            read, write = lax.dynamic_slice_in_dim, lax.dynamic_update_slice_in_dim
            axis = 2
            if slot.ndim:  # each row its own window
                axis, read, write = 1, jax.vmap(read, (0, 0, None, None)), jax.vmap(write, (0, 0, 0, None))
            before = read(stored, begin, width, axis)
            return write(stored, jnp.where(is_here[:, None, :, None], new, before), begin, axis)

        keys, values = written(self.stored_keys, k), written(self.stored_values, v)
        return dataclasses.replace(self, stored_keys=keys, stored_values=values)

    def _append_by_row(self, k: Array, v: Array, slots: Array) -> LayerCache:
        """`append` from each row's own slot on; not in a ring."""
        assert self.window is None
        axis = 2 if self.slots_last else 1

        def written(stored: Array, new: Array) -> Array:
            new = new.transpose((0, 2, 3, 1) if self.slots_last else (0, 2, 1, 3))
            if slots.shape[0] == 1:  # no scatter
                return lax.dynamic_update_slice_in_dim(stored, new, slots[0], axis + 1)
            write = functools.partial(lax.dynamic_update_slice_in_dim, axis=axis)
            return jax.vmap(write)(stored, new, slots)

        keys, values = written(self.stored_keys, k), written(self.stored_values, v)
        if self.slots_last:
            keys, values = (with_layout_constraint(one, _AS_STORED) for one in (keys, values))
        return dataclasses.replace(self, stored_keys=keys, stored_values=values)

    def shifted(self, by: Int[Array, " B"]) -> LayerCache:
        """The cache with every row's tokens `by` slots further on (or back); what leaves at one end comes in at the
        other."""
        axis = 2 if self.slots_last else 1

        def roll(stored: Array) -> Array:
            return jax.vmap(lambda row, steps: jnp.roll(row, steps, axis=axis))(stored, by)

        return dataclasses.replace(self, stored_keys=roll(self.stored_keys), stored_values=roll(self.stored_values))

    def grown(self, capacity: int) -> LayerCache:
        """The cache with `capacity` slots (a ring: with as many places as its window needs for these)."""
        wanted = _places(capacity, self.window, self.slots_last)
        pads = [(0, 0)] * 4
        pads[3 if self.slots_last else 2] = (0, max(0, wanted - self.capacity))
        rows = self.stored_keys.shape[0]
        keys, values = (
            sharding.spread(jnp.pad(stored, pads), self.letters, rows)
            for stored in (self.stored_keys, self.stored_values)
        )
        return dataclasses.replace(self, stored_keys=keys, stored_values=values)

    def newest(self, length: Int[Array, ""], count: int) -> tuple[Array, Array, Int[Array, " R"]]:
        """Keys and values [B, K, R, H] of a run of slots that includes the last `count` of the `length` slots written,
        and the numbers of these slots. With the slots last, whole tiles are read, so R can exceed `count`: the run then
        also holds older slots and slots that are not written yet."""
        tile, axis = (TILE, 3) if self.slots_last else (1, 2)
        most = min(count if tile == 1 else -(-count // tile) * tile + tile, self.capacity)
        first = jnp.clip((length - count) // tile * tile, 0, self.capacity - most)
        pieces = [
            lax.dynamic_slice_in_dim(stored, first, most, axis) for stored in (self.stored_keys, self.stored_values)
        ]
        keys, values = (self._slots_third(piece) for piece in pieces)
        return keys, values, first + jnp.arange(most, dtype=jnp.int32)


@flax.struct.dataclass
class KVCache:
    """The caches of all layers. Row b has a token in each slot with `starts[b] <= slot < length`."""

    layers: tuple[LayerCache, ...]
    starts: Leaf  # int32 [B]: the slot of each row's first token
    length: Leaf  # int32 []: slots written so far, the same in every row

    @property
    def full_layers(self) -> tuple[LayerCache, ...]:
        """The caches of the layers with full attention."""
        return tuple(layer for layer in self.layers if layer.window is None)

    @property
    def capacity(self) -> int:
        """S, the number of slots of a layer with full attention (the largest ring, if there is no such layer)."""
        return max(layer.capacity for layer in self.full_layers or self.layers)

    @property
    def visible(self) -> Bool[Array, "B S"]:
        """Which slots hold a token."""
        return visible(self.starts, self.length, self.capacity)


def empty(
    config: LlamaConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    starts: Int[Array, " B"],
    slots_last: bool = False,
) -> KVCache:
    """A cache of at least `capacity` slots per row with nothing in it. Zero-filled: 0 x NaN would leak through
    masks."""

    def layer(window: int | None) -> LayerCache:
        places, heads, dim = _places(capacity, window, slots_last), config.num_key_value_heads, config.head_dim
        shape = (batch, heads, dim, places) if slots_last else (batch, heads, places, dim)
        letters = _letters(slots_last, window)
        keys, values = (sharding.spread(jnp.zeros(shape, dtype), letters, batch) for _ in range(2))
        return LayerCache(keys, values, slots_last, window)

    layers = tuple(layer(config.window(number)) for number in range(config.num_hidden_layers))
    return KVCache(layers, starts, jnp.zeros((), jnp.int32))


def _letters(slots_last: bool, window: int | None) -> str:
    slots = "-" if window is not None else "S"
    return f"BK-{slots}" if slots_last else f"BK{slots}-"


def _places(capacity: int, window: int | None, slots_last: bool) -> int:
    """The places of a layer's cache with room for `capacity` slots: as many on each device that shares them."""
    wanted, multiple = capacity if window is None else min(window, capacity), TILE if slots_last else 1
    if window is None:
        multiple *= sharding.slot_shares()
    return -(-wanted // multiple) * multiple


def visible(starts: Int[Array, " B"], length: Int[Array, ""] | Int[Array, " B"], capacity: int) -> Bool[Array, "B S"]:
    """Which slots hold a token: those from `starts[b]` to `length - 1`, or to `length[b] - 1`."""
    slots = jnp.arange(capacity, dtype=jnp.int32)
    return (slots >= starts[:, None]) & (slots < jnp.reshape(length, (-1, 1)))
