"""Attention on TPU: Pallas kernels where XLA's own program moves more bytes, the plain functions elsewhere.

All kernels read a cache whose slots come last in memory, [B, K, H, S] (`SLOTS_LAST`): a TPU keeps the last dimension in 128
lanes, so heads of 64 would take twice their bytes otherwise, and XLA itself asks for that order. A row's single
slots cannot be read by index at any speed (a descriptor for 256 bytes; docs/results/tpu.md has the sums), so a recycled set
is copied side by side once, at the refresh (`COPIES`, `compact`), and partial steps read the copy and the newest slots.

Letters: P entries of a copy (a multiple of 128), W slots of a block, R ranked slots. Nothing here runs on a CPU but
under `jax.experimental.pallas.tpu.force_tpu_interpret_mode()`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import projections, sharding
from recyc_jax.attention.reference import (
    MASKED,
    chunk_with_mass,
    full_or_recycled,
    pieces_with_weights,
    recycled,
    selected,
    selected_with_weights,
    top_slots,
    window_scores,
)

__all__ = [
    "chunk",
    "chunk_with_mass",
    "compact",
    "full",
    "full_or_recycled",
    "full_with_scores",
    "full_with_weights",
    "pieces_with_weights",
    "projections",
    "recycled",
    "selected",
    "selected_with_weights",
    "top_slots",
    "window_scores",
]

SLOTS_LAST: bool = True
COPIES: bool = True
INDEXES: bool = False

LANES = 128
BLOCK = 2048
"""Slots of a grid step in decode kernels: at 128 bfloat16 a slot 1 MiB of keys and values, some 1.3 us of a v5e's
bandwidth, beside which the third of a microsecond that a grid step costs is hidden."""
QUERIES, KEYS = 256, 512
"""Queries (of each head of a group) and keys of a grid step in prefill."""


def _ceil(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


# --- decode: one query a row over every visible slot ----------------------------------------------------------------------


def _decode_kernel(
    bounds: Any,  # int32 [B, 2]: the first and one past the last visible slot
    q: Any,  # [1, 1, G, H]
    keys: Any,  # [1, 1, H, W]
    values: Any,
    out: Any,  # [1, 1, G, H]
    *rest: Any,  # logits [1, 1, G, W] and normaliser [1, 1, G, 128] where they are wanted; then scratch
    with_logits: bool,
) -> None:
    peak, total, sums = rest[-3:]
    row, block, blocks = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    width = keys.shape[-1]

    @pl.when(block == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    slots = block * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
    seen = (slots >= bounds[row, 0]) & (slots < bounds[row, 1])
    products = jnp.dot(q[0, 0], keys[0, 0], preferred_element_type=jnp.float32, precision=_precision(q))
    logits = jnp.where(seen, products * q.shape[-1] ** -0.5, MASKED)
    if with_logits:
        rest[0][0, 0] = logits
    new_peak = jnp.maximum(peak[:, :1], jnp.max(logits, axis=1, keepdims=True))
    shrink = jnp.exp(peak[:, :1] - new_peak)
    # a block without a visible slot must add nothing, even while the peak is still the masked value itself
    weights = jnp.where(seen, jnp.exp(logits - new_peak), 0)
    here = jnp.where(seen, values[0, 0], 0)  # slots past the cache's end hold anything, and 0 x NaN is NaN
    sums[...] = sums[...] * shrink + _over_slots(weights.astype(here.dtype), here)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    peak[...] = jnp.broadcast_to(new_peak, peak.shape)

    @pl.when(block == blocks - 1)
    def _() -> None:
        sum_of_weights = jnp.maximum(total[...], jnp.finfo(jnp.float32).tiny)
        out[0, 0] = (sums[...] / sum_of_weights[:, :1]).astype(out.dtype)
        if with_logits:
            rest[1][0, 0] = peak[...] + jnp.log(sum_of_weights)


def _precision(array: Any) -> lax.Precision:
    """Float32 is multiplied as such: a TPU's default would round it. Bfloat16 has no other precision there."""
    return lax.Precision.HIGHEST if array.dtype == jnp.float32 else lax.Precision.DEFAULT


def _over_slots(weights: Array, stored: Array) -> Array:
    """[G, W] x [H, W] -> [G, H]"""
    return lax.dot_general(
        weights, stored, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32, precision=_precision(stored)
    )


def _decode(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
    with_logits: bool,
) -> tuple[Array, ...]:
    """The output [B, N, H]; `with_logits` also scaled logits [B, K, G, S] and their logsumexp [B, K, G], float32."""
    batch, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    # visible slots are one run in each row
    first = jnp.argmax(visible, axis=1).astype(jnp.int32)
    bounds = jnp.stack([first, first + jnp.sum(visible, axis=1, dtype=jnp.int32)], axis=1)
    grouped = q.reshape(batch, kv_heads, groups, dim)

    def local(bounds: Array, q: Array, keys: Array, values: Array) -> tuple[Array, ...]:
        batch, kv_heads = q.shape[:2]
        width = min(BLOCK, _ceil(capacity, LANES))
        blocks = pl.cdiv(capacity, width)
        whole = pl.BlockSpec((1, 1, groups, dim), lambda b, k, s, bounds: (b, k, 0, 0))
        cached = pl.BlockSpec((1, 1, dim, width), lambda b, k, s, bounds: (b, k, 0, s))
        out_specs, out_shapes = [whole], [jax.ShapeDtypeStruct(q.shape, q.dtype)]
        if with_logits:
            out_specs += [
                pl.BlockSpec((1, 1, groups, width), lambda b, k, s, bounds: (b, k, 0, s)),
                pl.BlockSpec((1, 1, groups, LANES), lambda b, k, s, bounds: (b, k, 0, 0)),
            ]
            out_shapes += [
                jax.ShapeDtypeStruct((batch, kv_heads, groups, capacity), jnp.float32),
                jax.ShapeDtypeStruct((batch, kv_heads, groups, LANES), jnp.float32),
            ]
        entries = batch * kv_heads * capacity
        return pl.pallas_call(
            functools.partial(_decode_kernel, with_logits=with_logits),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, kv_heads, blocks),
                in_specs=[whole, cached, cached],
                out_specs=tuple(out_specs),
                scratch_shapes=[
                    pltpu.VMEM((groups, LANES), jnp.float32),
                    pltpu.VMEM((groups, LANES), jnp.float32),
                    pltpu.VMEM((groups, dim), jnp.float32),
                ],
            ),
            out_shape=tuple(out_shapes),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=4 * entries * groups * dim,
                bytes_accessed=entries * (2 * dim * keys.dtype.itemsize + 4 * groups * with_logits),
                transcendentals=entries * groups,
            ),
            name="full_decode",
        )(bounds, q, keys, values)

    specs = ("BK--", "BK--", "BK--") if with_logits else ("BK--",)
    call = sharding.split_kernel(local, batch, ("B-", "BK--", "BK--", "BK--"), specs)
    out, *others = call(bounds, grouped, keys.swapaxes(2, 3), values.swapaxes(2, 3))
    out = out.reshape(q.shape)
    return (out, others[0], others[1][..., 0]) if with_logits else (out,)


def full(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """`reference.full`, for visible slots that are one run a row; the logits never leave the chip's memory."""
    return _decode(q, keys, values, visible, with_logits=False)[0]


def full_with_weights(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
    """`reference.full_with_weights`, for visible slots that are one run a row."""
    out, logits, normaliser = _decode(q, keys, values, visible, with_logits=True)
    return out, jnp.exp(logits - normaliser[..., None])


def full_with_scores(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K S"]]:
    """`reference.full_with_scores`, for visible slots that are one run a row: output and logits in one pass over the
    cache; the maximum over the group needs no exponential and is XLA's."""
    out, logits, normaliser = _decode(q, keys, values, visible, with_logits=True)
    return out, jnp.max(logits - normaliser[..., None], axis=2)


# --- refresh: the selected slots side by side -----------------------------------------------------------------------------


def _compact_kernel(
    before: Any,  # int32 [1, 1, 1, 1, W / 128 + 1] in scalar memory: entries that go before each 128 slots
    entry: Any,  # int32 [1, 1, 1, W]: where each slot goes; below 0 nowhere
    keys: Any,  # [1, 1, H, W]
    values: Any,
    copied_keys: Any,  # [1, 1, H, P]
    copied_values: Any,
    *,
    capacity: int,
) -> None:
    """A one-hot product moves 128 slots to the 256 entries around theirs. Entries are in the slots' order, so
    what is there already was put there by the slots just before: adding to it is exact."""
    block = pl.program_id(2)
    width, entries = keys.shape[-1], copied_keys.shape[-1]

    @pl.when(block == 0)
    def _() -> None:
        copied_keys[...] = jnp.zeros_like(copied_keys)
        copied_values[...] = jnp.zeros_like(copied_values)

    for part in range(width // LANES):
        first = part * LANES
        here = before[0, 0, 0, 0, part]

        @pl.when(before[0, 0, 0, 0, part + 1] > here)
        def _(first: int = first, here: Any = here) -> None:
            base = pl.multiple_of(jnp.minimum(here // LANES * LANES, entries - 2 * LANES), LANES)
            slot = block * width + first + lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
            inside = slot < capacity
            goal = jnp.where(inside, entry[0, 0, :, first : first + LANES] - base, -1)
            moves = lax.broadcasted_iota(jnp.int32, (2 * LANES, LANES), 0) == goal
            for cached, copied in ((keys, copied_keys), (values, copied_values)):
                rows = jnp.where(inside, cached[0, 0, :, first : first + LANES], 0)
                moved = _over_slots(rows, moves.astype(rows.dtype)).astype(rows.dtype)
                copied[0, 0, :, pl.ds(base, 2 * LANES)] += moved


def compact(
    keys: Float[Array, "B K S H"], values: Float[Array, "B K S H"], chosen: Bool[Array, "B K S"], most: int
) -> tuple[Float[Array, "B K P H"], Float[Array, "B K P H"]]:
    """The keys and values of the chosen slots, at most `most` a head, in the slots' order, then zeros: P is `most`, at
    least 256, rounded up to 128. The cache is read once, from one end to the other."""
    batch, _, capacity, dim = keys.shape
    entries = max(2 * LANES, _ceil(most, LANES))

    def local(chosen: Array, keys: Array, values: Array) -> tuple[Array, Array]:
        batch, kv_heads = chosen.shape[:2]
        width = min(BLOCK, _ceil(capacity, LANES))
        blocks, parts = pl.cdiv(capacity, width), width // LANES
        chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, blocks * width - capacity)))
        upto = jnp.cumsum(chosen, axis=2, dtype=jnp.int32)
        entry = jnp.where(chosen, upto - 1, -1)[:, :, None]
        # entries before each 128 slots of each block, and after its last
        ends = jnp.concatenate([jnp.zeros_like(upto[..., :1]), upto[..., LANES - 1 :: LANES]], axis=2)
        starts = jnp.stack([ends[..., i * parts : (i + 1) * parts + 1] for i in range(blocks)], axis=2)[:, :, :, None]
        cached = pl.BlockSpec((1, 1, dim, width), lambda b, k, s: (b, k, 0, s))
        copied = pl.BlockSpec((1, 1, dim, entries), lambda b, k, s: (b, k, 0, 0))
        scalars = pl.BlockSpec((1, 1, 1, 1, parts + 1), lambda b, k, s: (b, k, s, 0, 0), memory_space=pltpu.SMEM)
        rows = batch * kv_heads
        size = keys.dtype.itemsize
        shape = jax.ShapeDtypeStruct((batch, kv_heads, dim, entries), keys.dtype)
        # two buffers for each array that passes through
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
        )(starts, entry, keys, values)

    call = sharding.split_kernel(local, batch, ("BK-", "BK--", "BK--"), ("BK--", "BK--"))
    near_keys, near_values = call(chosen, keys.swapaxes(2, 3), values.swapaxes(2, 3))
    return near_keys.swapaxes(2, 3), near_values.swapaxes(2, 3)


# --- prefill --------------------------------------------------------------------------------------------------------------


def _chunk_kernel(
    scalars: Any,  # int32 [1 + B]: the first query's slot, and each row's first slot
    q: Any,  # [1, 1, G, Q, H]
    keys: Any,  # [1, 1, H, W]
    values: Any,
    out: Any,  # [1, 1, G, Q, H]
    peak: Any,
    total: Any,
    sums: Any,
    *,
    capacity: int,
) -> None:
    row, piece, block, blocks = pl.program_id(0), pl.program_id(2), pl.program_id(3), pl.num_programs(3)
    groups, queries, dim = q.shape[2:]
    width = keys.shape[-1]
    offset, start = scalars[0], scalars[1 + row]

    @pl.when(block == 0)
    def _() -> None:
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    last_query = offset + (piece + 1) * queries - 1

    @pl.when((block * width <= last_query) & ((block + 1) * width > start))
    def _() -> None:
        query_slots = offset + piece * queries + lax.broadcasted_iota(jnp.int32, (groups, queries, 1), 1)
        query_slots = query_slots.reshape(groups * queries, 1)
        key_slots = block * width + lax.broadcasted_iota(jnp.int32, (1, width), 1)
        stacked = q[0, 0].reshape(groups * queries, dim)
        products = jnp.dot(stacked, keys[0, 0], preferred_element_type=jnp.float32, precision=_precision(stacked))
        inside = key_slots < capacity  # what a block has beyond the cache's end may be anything
        seen = (key_slots <= query_slots) & (key_slots >= start) & inside
        logits = jnp.where(seen, products * dim**-0.5, MASKED)
        new_peak = jnp.maximum(peak[:, :1], jnp.max(logits, axis=1, keepdims=True))
        shrink = jnp.exp(peak[:, :1] - new_peak)
        weights = jnp.where(seen, jnp.exp(logits - new_peak), 0)
        here = jnp.where(inside, values[0, 0], 0)  # 0 x NaN is NaN
        sums[...] = sums[...] * shrink + _over_slots(weights.astype(here.dtype), here)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        peak[...] = jnp.broadcast_to(new_peak, peak.shape)

    @pl.when(block == blocks - 1)
    def _() -> None:
        sum_of_weights = jnp.maximum(total[:, :1], jnp.finfo(jnp.float32).tiny)
        out[0, 0] = (sums[...] / sum_of_weights).astype(out.dtype).reshape(groups, queries, dim)


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> Float[Array, "B C N H"]:
    """`reference.chunk`, the logits never leaving the chip's memory; key blocks that no query sees are not fetched.

    Queries of padding, which see nothing, come out as zeros.
    """
    batch, length, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    # whole tiles of 16 rows; what is added sees the future and is cut off again
    queries = (
        min(_ceil(QUERIES * 4 // groups, 16), _ceil(length, 16)) if groups > 4 else min(QUERIES, _ceil(length, 16))
    )
    padded = _ceil(length, queries)
    stacked = jnp.pad(q, ((0, 0), (0, padded - length), (0, 0), (0, 0)))
    stacked = stacked.reshape(batch, padded, kv_heads, groups, dim).transpose(0, 2, 3, 1, 4)

    def local(scalars: Array, starts: Array, q: Array, keys: Array, values: Array) -> Array:
        batch, kv_heads = q.shape[:2]
        width = min(KEYS, _ceil(capacity, LANES))
        blocks = pl.cdiv(capacity, width)

        def needed(b: Any, k: Any, piece: Any, block: Any, scalars: Any) -> tuple[Any, ...]:
            """The block itself, or where it is not seen the nearest that is, which is there already."""
            last = jnp.minimum((scalars[0] + (piece + 1) * queries - 1) // width, blocks - 1)
            return b, k, 0, jnp.clip(block, jnp.minimum(scalars[1 + b] // width, last), last)

        here = pl.BlockSpec((1, 1, groups, queries, dim), lambda b, k, piece, block, scalars: (b, k, 0, piece, 0))
        pairs = batch * kv_heads * groups * padded * capacity // 2  # on average: how far a prompt has come is not known
        rows = groups * queries
        return pl.pallas_call(
            functools.partial(_chunk_kernel, capacity=capacity),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, kv_heads, padded // queries, blocks),
                in_specs=[here, pl.BlockSpec((1, 1, dim, width), needed), pl.BlockSpec((1, 1, dim, width), needed)],
                out_specs=here,
                scratch_shapes=[
                    pltpu.VMEM((rows, LANES), jnp.float32),
                    pltpu.VMEM((rows, LANES), jnp.float32),
                    pltpu.VMEM((rows, dim), jnp.float32),
                ],
            ),
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=4 * pairs * dim,
                bytes_accessed=batch * kv_heads * padded // queries * capacity * dim * keys.dtype.itemsize,
                transcendentals=pairs,
            ),
            name="prefill_chunk",
        )(jnp.concatenate([scalars, starts]), q, keys, values)

    call = sharding.split_kernel(local, batch, ("-", "B", "BK---", "BK--", "BK--"), "BK---")
    out = call(offset[None], starts, stacked, keys.swapaxes(2, 3), values.swapaxes(2, 3))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, padded, heads, dim)[:, :length]
