"""The gradients of selected keys, stored entry by entry, brought back to their keys (Pallas, Triton): each block of keys
gathers those of its own keys, so that no two programs write to the same element."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.whole_sequence import tiling
from recyc_jax.kernels.gpu.whole_sequence.backward import Entries, Pair
from recyc_jax.kernels.gpu.whole_sequence.tiling import Form, Tiles

GATHERED = Tiles(entries=32, warps=2)
RUN = 8
"""Entries of a segment that the program of a block of keys gathers at a time."""


def gathered(
    gradients: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]],
    entry_gradients: Entries,
    slots: Int[Array, "c B K P"],
    begin: Int[Array, ""],
    form: Form,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """The gradients of keys and values, with those of the entries of the segments from `begin` on added at the entries'
    slots. The slots of a segment are in ascending order, `NOWHERE` last."""
    batch, kv_heads, width, _ = gradients[0].shape
    size = tiling.side(width, GATHERED.entries)
    blocks = width // size
    edges = size * jnp.arange(blocks + 1, dtype=jnp.int32)
    rows = slots.reshape(-1, slots.shape[-1])
    # the first entry of each block of keys, and the entry after the last block's
    firsts = jax.vmap(functools.partial(jnp.searchsorted, method="scan_unrolled"), (0, None))(rows, edges)
    key_gradients, value_gradients = triton_call.call(
        _gathered,
        [
            *entry_gradients,
            slots,
            firsts.astype(jnp.int32).reshape(*slots.shape[:-1], blocks + 1),
            jnp.reshape(begin, 1),
        ],
        [],
        (blocks, kv_heads, batch),
        "gather_keys_back",
        warps=GATHERED.warps,
        stages=GATHERED.stages,
        in_place=gradients,
        form=form,
        size=size,
    )
    return key_gradients, value_gradients


def _gathered(
    entry_keys_ref: Any,
    entry_values_ref: Any,
    slots_ref: Any,
    firsts_ref: Any,
    begin_ref: Any,
    old_keys_ref: Any,
    old_values_ref: Any,
    new_keys_ref: Any,
    new_values_ref: Any,
    *,
    form: Form,
    size: int,
) -> None:
    """One program of `gathered`: a block of keys. It reads the runs of entries of a few segments at a time, and a
    product with a one-hot matrix brings each entry's gradient to its key."""
    block, kv_head, batch = (pl.program_id(axis) for axis in range(3))
    count, entries = slots_ref.shape[0], slots_ref.shape[3]
    segments_at_once = max(1, size // RUN)
    lane, lanes = jnp.arange(entry_keys_ref.shape[4]), jnp.arange(segments_at_once * RUN)
    run, run_lane = tiling.div_rem(lanes, RUN)
    key_slot = block * size + jnp.arange(size)

    def add_segments(number: Array, pair: Pair) -> Pair:
        segment = number * segments_at_once + run
        segment_in_range = jnp.minimum(segment, count - 1)
        begin = plt.load(firsts_ref.at[segment_in_range, batch, kv_head, block])
        end = plt.load(firsts_ref.at[segment_in_range, batch, kv_head, block + 1])
        end = jnp.where(segment < count, end, begin)

        def add_runs(number: Array, pair: Pair) -> Pair:
            entry = begin + number * RUN + run_lane
            is_entry, entry_in_range = entry < end, jnp.minimum(entry, entries - 1)
            slot = plt.load(slots_ref.at[segment_in_range, batch, kv_head, entry_in_range], mask=is_entry, other=-1)
            one_hot = (slot[None, :] == key_slot[:, None]).astype(entry_keys_ref.dtype)
            mask = jnp.broadcast_to(is_entry[:, None], (lanes.size, lane.size))
            key_gradients, value_gradients = (
                plt.load(
                    ref.at[segment_in_range[:, None], batch, kv_head, entry_in_range[:, None], lane[None, :]],
                    mask=mask,
                    other=0,
                )
                for ref in (entry_keys_ref, entry_values_ref)
            )
            return Pair(
                pair.keys + tiling.dot(one_hot, key_gradients), pair.values + tiling.dot(one_hot, value_gradients)
            )

        return lax.fori_loop(0, (jnp.max(end - begin) + RUN - 1) // RUN, add_runs, pair)

    old = (plt.load(ref.at[batch, kv_head, key_slot[:, None], lane[None, :]]) for ref in (old_keys_ref, old_values_ref))
    # the first segment that may have selected any of these keys
    first = jnp.maximum(block * size - form.first + form.stride - 1, 0) // form.stride
    first = jnp.maximum(first - plt.load(begin_ref.at[jnp.int32(0)]), 0) // segments_at_once
    pair = lax.fori_loop(first, pl.cdiv(count, segments_at_once), add_segments, Pair(*old))
    for ref, gradients in ((new_keys_ref, pair.keys), (new_values_ref, pair.values)):
        plt.store(ref.at[batch, kv_head, key_slot[:, None], lane[None, :]], gradients)
