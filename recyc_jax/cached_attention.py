"""Attention over a KV cache, as the decoder's layers call it: write the new keys and values, then attend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from recyc_jax.cache import LayerCache
from recyc_jax.model import Heads


class CachedAttention(NamedTuple):
    """An `attend` function for the decoder (`model.Attend`). A layer's state is a pair: its cache, and what `read`
    carries.

    Writing comes first and stands outside of every `lax.cond`, so that XLA updates the cache in place.
    """

    slot: Array  # int32 []: the slot of the first new token, the same in every row
    read: Callable[[int, Heads, LayerCache, Any], tuple[Array, Any]]
    """(layer, heads, cache with the new tokens in it, state) -> (output [B, T, N, H], state)"""

    def __call__(self, layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
        cached, carried = state
        cached = cached.append(heads.k, heads.v, self.slot)
        out, carried = self.read(layer, heads, cached, carried)
        return out, (cached, carried)
