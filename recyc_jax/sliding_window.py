"""Attention of layers with a sliding window: a token attends to the latest W tokens, itself among them.

Policies do not touch these layers. Their cache is a ring (`cache.py`), so it costs W slots whatever the length.
Letters: W window, R places of the ring.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache


def read_one(
    attention: Implementation,
    q: Float[Array, "B N H"],
    ring: LayerCache,
    starts: Int[Array, " B"],
    slot: Int[Array, ""],
) -> Float[Array, "B N H"]:
    """One query per row, whose key and value are in the ring at `slot` already."""
    held = slot - (slot - jnp.arange(ring.capacity, dtype=jnp.int32)) % ring.capacity  # the slot in each place
    assert ring.window is not None
    visible = (held >= starts[:, None]) & (held > slot - ring.window)
    return attention.window_step(q, ring.keys, ring.values, visible)


def read_chunk(
    attention: Implementation,
    q: Float[Array, "B C N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    ring: LayerCache,
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    is_new: Bool[Array, "B C"] | None = None,
) -> tuple[Float[Array, "B C N H"], LayerCache]:
    """C consecutive queries, the first in slot `offset`, over their windows; and the ring with their keys and values.
    Where a query is not new, its slot holds an older token, which stays; no new token's window reaches a slot that such
    tokens have overwritten in the ring.

    The ring is laid out in the order of slots in front of the new tokens, whose keys would otherwise overwrite keys
    that the first of these queries see."""
    width, places = q.shape[1], ring.capacity
    padding = -places % width  # so that the queries begin at a multiple of their number, as `reference.chunk` wants

    def in_order(stored: Array, new: Array) -> Array:
        if is_new is not None:
            here = jnp.take(stored, (offset + jnp.arange(width, dtype=jnp.int32)) % places, axis=2)
            new = jnp.where(is_new[:, :, None, None], new, here.swapaxes(1, 2))
        before = jnp.pad(jnp.roll(stored, -(offset % places), axis=2), ((0, 0), (0, 0), (padding, 0), (0, 0)))
        return jnp.concatenate([before, new.swapaxes(1, 2)], axis=2)

    keys, values = in_order(ring.keys, k), in_order(ring.values, v)
    begin = jnp.asarray(padding + places, jnp.int32)
    assert ring.window is not None
    out = attention.window_chunk(q, keys, values, starts - offset + begin, begin, ring.window)
    after = (jnp.roll(one[:, :, -places:], (offset + width) % places, axis=2) for one in (keys, values))
    return out, ring.replaced(*after)
