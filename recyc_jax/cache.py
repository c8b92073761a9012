"""The full KV cache: one pair of arrays a layer, never evicted, appended in place.

Rows are right-aligned: every row's newest token sits in the same slot, so appending is one `dynamic_update_slice`
for the whole batch, and row b's tokens start at slot `starts[b]`. A token's RoPE position is `slot - starts[b]`.
One array per layer (rather than a stacked [L, ...] one) is what lets XLA update it in place in every form of loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.config import LlamaConfig

# A field of a pytree: an array, though `jax.tree.map` may put anything in its place, so it is not checked at run time.
if TYPE_CHECKING:
    Leaf: TypeAlias = Array
else:
    Leaf = Any


@flax.struct.dataclass
class LayerCache:
    """One layer's keys (after RoPE) and values."""

    keys: Leaf  # [B, K, S, H]
    values: Leaf  # [B, K, S, H]

    def append(self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], slot: Int[Array, ""]) -> LayerCache:
        """The cache with T tokens written from `slot` on."""
        zero = jnp.zeros((), jnp.int32)
        at = (zero, zero, slot, zero)
        return LayerCache(
            lax.dynamic_update_slice(self.keys, k.swapaxes(1, 2), at),
            lax.dynamic_update_slice(self.values, v.swapaxes(1, 2), at),
        )


@flax.struct.dataclass
class KVCache:
    """All layers' caches and which of their slots hold tokens: `starts[b] <= slot < length`."""

    layers: tuple[LayerCache, ...]
    starts: Leaf  # int32 [B]: the slot of each row's first token
    length: Leaf  # int32 []: slots written so far, the same in every row

    @property
    def capacity(self) -> int:
        return self.layers[0].keys.shape[2]


def empty(config: LlamaConfig, batch: int, capacity: int, dtype: jnp.dtype, starts: Int[Array, " B"]) -> KVCache:
    """A cache of `capacity` slots a row with nothing in it. Zero-filled: 0 x NaN would leak through masks."""
    shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
    layers = tuple(
        LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers)
    )
    return KVCache(layers, starts, jnp.zeros((), jnp.int32))


def filled(starts: Int[Array, " B"], length: Int[Array, ""], capacity: int) -> Bool[Array, "B S"]:
    """Which slots hold a token."""
    slots = jnp.arange(capacity, dtype=jnp.int32)
    return (slots >= starts[:, None]) & (slots < length)
