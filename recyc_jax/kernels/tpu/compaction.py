"""Kept sets on TPUs: the keys and values of the kept slots, copied into contiguous arrays at a refresh.

A TPU is too slow at reading a row's single slots by index (one DMA descriptor for each 256 bytes; the arithmetic is in
docs/results/tpu.md), so a refresh copies the kept keys and values, and partial steps read the copy and the newest
slots. Letters: P entries of a copy (a multiple of 128), W slots of a block, R ranked slots."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from recyc_jax import sharding
from recyc_jax.kernels.tpu.tiles import BLOCK, LANES, round_up, sum_over_slots


def _compact_kernel(
    before: Any,  # int32 [1, 1, 1, 1, W / 128 + 1] in scalar memory: the number of entries before each 128 slots
    entry: Any,  # int32 [1, 1, 1, W]: the entry that each slot is copied to; negative for slots that are not copied
    keys: Any,  # [1, 1, H, W]
    values: Any,
    copied_keys: Any,  # [1, 1, H, P]
    copied_values: Any,
    *,
    capacity: int,
) -> None:
    """One program: a block of slots of one key/value head. A product with a one-hot matrix moves 128 slots into a
    window of 256 entries that contains their entries. Entries are in the order of slots, so the window already holds
    only slots just before these 128, in other entries: adding the product to the window is exact."""
    block = pl.program_id(2)
    width, entries = keys.shape[-1], copied_keys.shape[-1]

    @pl.when(block == 0)
    def _() -> None:
        copied_keys[...] = jnp.zeros_like(copied_keys)
        copied_values[...] = jnp.zeros_like(copied_values)

    for part in range(width // LANES):
        first = part * LANES
        entries_before = before[0, 0, 0, 0, part]

        @pl.when(before[0, 0, 0, 0, part + 1] > entries_before)
        def _(first: int = first, entries_before: Any = entries_before) -> None:
            base = pl.multiple_of(jnp.minimum(entries_before // LANES * LANES, entries - 2 * LANES), LANES)
            slot = block * width + first + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            is_slot = slot < capacity
            target = jnp.where(is_slot, entry[0, 0, :, first : first + LANES] - base, -1)
            one_hot = lax.broadcasted_iota(jnp.int32, (2 * LANES, LANES), 0) == target
            for cached, copied in ((keys, copied_keys), (values, copied_values)):
                part_values = jnp.where(is_slot, cached[0, 0, :, first : first + LANES], 0)
                moved = sum_over_slots(part_values, one_hot.astype(part_values.dtype)).astype(part_values.dtype)
                copied[0, 0, :, pl.ds(base, 2 * LANES)] += moved


def compact(
    keys: Float[Array, "B K S H"], values: Float[Array, "B K S H"], chosen: Bool[Array, "B K S"], most: int
) -> tuple[Float[Array, "B K P H"], Float[Array, "B K P H"]]:
    """The keys and values of the chosen slots, at most `most` per head, in the order of slots, then zeros. P is `most`,
    at least 256, rounded up to a multiple of 128. The cache is read once, from beginning to end."""
    batch, _, capacity, dim = keys.shape
    entries = max(2 * LANES, round_up(most, LANES))

    def local(chosen: Array, keys: Array, values: Array) -> tuple[Array, Array]:
        batch, kv_heads = chosen.shape[:2]
        width = min(BLOCK, round_up(capacity, LANES))
        blocks, parts = pl.cdiv(capacity, width), width // LANES
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, blocks * width - capacity)))
        chosen_count = jnp.cumsum(chosen, axis=2, dtype=jnp.int32)
        entry = jnp.where(chosen, chosen_count - 1, -1)[:, :, None]
        # the number of entries before each 128 slots of a block, and before the slots after the block
        ends = jnp.concatenate([jnp.zeros_like(chosen_count[..., :1]), chosen_count[..., LANES - 1 :: LANES]], axis=2)
        before = jnp.stack([ends[..., i * parts : (i + 1) * parts + 1] for i in range(blocks)], axis=2)[:, :, :, None]
        cached = pl.BlockSpec((1, 1, dim, width), lambda b, k, s: (b, k, 0, s))
        copied = pl.BlockSpec((1, 1, dim, entries), lambda b, k, s: (b, k, 0, 0))
        scalars = pl.BlockSpec((1, 1, 1, 1, parts + 1), lambda b, k, s: (b, k, s, 0, 0), memory_space=pltpu.SMEM)
        rows = batch * kv_heads
        size = keys.dtype.itemsize
        shape = jax.ShapeDtypeStruct((batch, kv_heads, dim, entries), keys.dtype)
        # the pipeline holds two buffers of each array
        vmem = 2 * 2 * size * dim * (width + entries) + 2 * 4 * 8 * width
        return pl.pallas_call(
            functools.partial(_compact_kernel, capacity=capacity),
            grid=(batch, kv_heads, blocks),
            in_specs=[scalars, pl.BlockSpec((1, 1, 1, width), lambda b, k, s: (b, k, 0, s)), cached, cached],
            out_specs=(copied, copied),
            out_shape=(shape, shape),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=None if vmem < 12 * 2**20 else vmem + 8 * 2**20,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * 2 * rows * capacity * dim * 2 * LANES,
                bytes_accessed=rows * (2 * size * dim * (capacity + entries) + 4 * capacity),
                transcendentals=0,
            ),
            name="compact",
        )(before, entry, keys, values)

    call = sharding.split_kernel(local, batch, ("BK-", "BK--", "BK--"), ("BK--", "BK--"))
    copied_keys, copied_values = call(chosen, keys.swapaxes(2, 3), values.swapaxes(2, 3))
    return copied_keys.swapaxes(2, 3), copied_values.swapaxes(2, 3)
