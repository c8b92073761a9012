"""Attention over a KV cache, as the decoder's layers call it: write the new keys and values, then attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jaxtyping import Array

from recyc_jax import sliding_window
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache
from recyc_jax.model import Heads


class CachedAttention(NamedTuple):
    """An `attend` function for the decoder (`model.Attend`). A layer's state is a pair: its cache, and what `read`
    carries.

    Writing comes first and stands outside of every `lax.cond`, so that XLA updates the cache in place.
    """

    slot: Array  # int32 []: the slot of the first new token, the same in every row
    starts: Array  # int32 [B]: the slot of each row's first token
    implementation: Implementation
    read: Callable[[int, Heads, LayerCache, Any], tuple[Array, Any]]
    """(layer, heads, cache with the new tokens in it, state) -> (output [B, T, N, H], state), for layers with full
    attention"""
    is_new: Array | None = None  # bool [B, T]: False for padding in front of a row's new tokens, whose slot is taken
    goes_on: Array | None = None  # bool [B]: False for rows that have ended, whose rings must stay for a further turn

    def __call__(self, layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
        cached, carried = state
        if cached.window is not None and heads.k.shape[1] > 1:
            new = heads.q, heads.k, heads.v
            out, cached = sliding_window.read_chunk(
                self.implementation, *new, cached, self.starts, self.slot, self.is_new
            )
            return out, (cached, carried)
        after = cached.append(heads.k, heads.v, self.slot, self.is_new)
        cached = self.with_ended_rows(cached, after)
        out, carried = self.read_written(layer, heads, cached, carried)
        return out, (cached, carried)

    def with_ended_rows(self, before: LayerCache, after: LayerCache) -> LayerCache:
        """The cache `after` a token was written in every row, but with what a ring had in its place in rows that have
        ended: a token there is behind the row's end, and what it overwrote may be within the next turn's window."""
        if after.window is None or self.goes_on is None:
            return after
        place, axis = before.place(self.slot), 3 if before.slots_last else 2
        k, v = (
            lax.dynamic_slice_in_dim(stored, place, 1, axis).transpose((0, 3, 1, 2) if axis == 3 else (0, 2, 1, 3))
            for stored in (before.stored_keys, before.stored_values)
        )
        return after.append(k, v, self.slot, ~self.goes_on[:, None])

    def read_written(self, layer: int, heads: Heads, cached: LayerCache, carried: Any) -> tuple[Array, Any]:
        """The output and what the layer carries, its new token's key and value being in the cache already."""
        if cached.window is None:
            return self.read(layer, heads, cached, carried)
        out = sliding_window.read_one(self.implementation, heads.q[:, 0], cached, self.starts, self.slot)
        return out[:, None], carried
