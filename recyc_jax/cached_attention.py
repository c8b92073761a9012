"""Attention over a KV cache, as the decoder's layers call it: write the new keys and values, then attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

    def __call__(self, layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
        cached, carried = state
        if cached.window is not None and heads.k.shape[1] > 1:
            new = heads.q, heads.k, heads.v
            out, cached = sliding_window.read_chunk(self.implementation, *new, cached, self.starts, self.slot)
            return out, (cached, carried)
        cached = cached.append(heads.k, heads.v, self.slot)
        out, carried = self.read_written(layer, heads, cached, carried)
        return out, (cached, carried)

    def read_written(self, layer: int, heads: Heads, cached: LayerCache, carried: Any) -> tuple[Array, Any]:
        """The output and what the layer carries, its new token's key and value being in the cache already."""
        if cached.window is None:
            return self.read(layer, heads, cached, carried)
        out = sliding_window.read_one(self.implementation, heads.q[:, 0], cached, self.starts, self.slot)
        return out[:, None], carried
