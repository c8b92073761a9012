"""The full KV cache: one pair of arrays a layer, never evicted, appended in place.

Rows are right-aligned: every row's newest token sits in the same slot, so appending is one `dynamic_update_slice`
for the whole batch (or a kernel's write), and row b's tokens start at slot `starts[b]`. A token's RoPE position is
`slot - starts[b]`.
One array per layer (rather than a stacked [L, ...] one) is what lets XLA update it in place in every form of loop.

An implementation may want the slots last in memory (`SLOTS_LAST`). `keys` and `values` are [B, K, S, H] either way: inside
a compiled program the exchange of two axes is a name, not a move.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import flax.struct
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
"""Where slots come last their number is a multiple of this, a TPU's lanes: other sizes are copied on entering a kernel."""

_AS_STORED = Layout((0, 1, 2, 3))
"""Said of every array that slots come last in: XLA would else turn a whole cache around to read a few of its slots."""


@flax.struct.dataclass
class LayerCache:
    """One layer's keys (after RoPE) and values."""

    stored_keys: Leaf  # [B, K, S, H], or [B, K, H, S]
    stored_values: Leaf
    slots_last: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def keys(self) -> Array:
        """[B, K, S, H]"""
        return self._seen(self.stored_keys)

    @property
    def values(self) -> Array:
        """[B, K, S, H]"""
        return self._seen(self.stored_values)

    def _seen(self, stored: Array) -> Array:
        return with_layout_constraint(stored, _AS_STORED).swapaxes(2, 3) if self.slots_last else stored

    def with_others(self, keys: Float[Array, "B K R H"], values: Float[Array, "B K R H"]) -> LayerCache:
        """Other keys and values, stored as these are."""
        if self.slots_last:
            keys, values = (with_layout_constraint(one.swapaxes(2, 3), _AS_STORED) for one in (keys, values))
        return dataclasses.replace(self, stored_keys=keys, stored_values=values)

    def latest(self, length: Int[Array, ""], count: int) -> tuple[Array, Array, Int[Array, " R"]]:
        """Keys and values [B, K, R, H] that hold the last `count` of `length` slots, and which slots they are. More may be
        among them, older ones and such as are not written yet: where slots come last, whole tiles are taken."""
        capacity = self.keys.shape[2]
        tile, axis = (TILE, 3) if self.slots_last else (1, 2)
        most = min(count if tile == 1 else -(-count // tile) * tile + tile, capacity)
        first = jnp.clip((length - count) // tile * tile, 0, capacity - most)
        pieces = [
            lax.dynamic_slice_in_dim(cached, first, most, axis) for cached in (self.stored_keys, self.stored_values)
        ]
        if self.slots_last:
            pieces = [with_layout_constraint(piece, _AS_STORED).swapaxes(2, 3) for piece in pieces]
        return pieces[0], pieces[1], first + jnp.arange(most, dtype=jnp.int32)

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], slot: Int[Array, ""]) -> LayerCache:
        """The cache with T tokens written from `slot` on."""
        zero = jnp.zeros((), jnp.int32)
        order, at = (
            ((0, 2, 3, 1), (zero, zero, zero, slot)) if self.slots_last else ((0, 2, 1, 3), (zero, zero, slot, zero))
        )
        after = [
            lax.dynamic_update_slice(cached, new.transpose(order), at)
            for cached, new in ((self.stored_keys, k), (self.stored_values, v))
        ]
        if self.slots_last:
            after = [with_layout_constraint(cached, _AS_STORED) for cached in after]
        return dataclasses.replace(self, stored_keys=after[0], stored_values=after[1])


@flax.struct.dataclass
class KVCache:
    """All layers' caches and which of their slots hold tokens: `starts[b] <= slot < length`."""

    layers: tuple[LayerCache, ...]
    starts: Leaf  # int32 [B]: the slot of each row's first token
    length: Leaf  # int32 []: slots written so far, the same in every row

    @property
    def capacity(self) -> int:
        return self.layers[0].stored_keys.shape[3 if self.layers[0].slots_last else 2]


def empty(
    config: LlamaConfig,
    batch: int,
    capacity: int,
    dtype: jnp.dtype,
    starts: Int[Array, " B"],
    slots_last: bool = False,
) -> KVCache:
    """A cache of at least `capacity` slots a row with nothing in it. Zero-filled: 0 x NaN would leak through masks."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    if slots_last:
        shape = (*shape[:2], config.head_dim, -(-capacity // TILE) * TILE)

    def zeros() -> Array:
        return sharding.spread(jnp.zeros(shape, dtype), "BK--", batch)

    layers = tuple(LayerCache(zeros(), zeros(), slots_last) for _ in range(config.num_hidden_layers))
    return KVCache(layers, starts, jnp.zeros((), jnp.int32))


def filled(starts: Int[Array, " B"], length: Int[Array, ""], capacity: int) -> Bool[Array, "B S"]:
    """Which slots hold a token."""
    slots = jnp.arange(capacity, dtype=jnp.int32)
    return (slots >= starts[:, None]) & (slots < length)
