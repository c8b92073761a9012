"""Recycled attention over a whole sequence on NVIDIA GPUs: `whole_sequence.recycled` in kernels, forward and backward.

Letters are those of `recyc_jax/attention/whole_sequence.py` and `tiling.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from recyc_jax.attention import selection, whole_sequence
from recyc_jax.attention.whole_sequence import Dense, Recycle
from recyc_jax.kernels.gpu import prefill_attention, top_slots
from recyc_jax.kernels.gpu.whole_sequence import backward, forward, gathering, selection_gradients, tiling
from recyc_jax.kernels.gpu.whole_sequence.backward import Cotangents
from recyc_jax.kernels.gpu.whole_sequence.tiling import NOWHERE, Form

AT_ONCE = 1 << 30
"""Bytes of scores, and of entries' gradients, that are in memory at once. Bounds the memory for long sequences."""


def recycled(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    recycle: Recycle,
    dense: Dense,
) -> Float[Array, "B T N H"]:
    """The output of `whole_sequence.recycled`, from kernels whose results are bitwise reproducible. The kernels are for
    16-bit dtypes and head dims of at most 128: tensor cores do not multiply float32, and the tiles of larger head dims
    do not fit. The kernels sum the products of a logit in another order, so they may rank near-ties differently."""
    first = recycle.prefix - 1
    before = dense(q[:, :first], k[:, :first], v[:, :first], None) if first else q[:, :0]
    padding = max(tiling.LEAST, pl.next_power_of_2(q.shape[-1])) - q.shape[-1]
    padded_q, padded_k, padded_v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))) for x in (q, k, v))
    after: Any = _segments(padded_q, padded_k, padded_v, first, recycle, q.shape[-1])
    return jnp.concatenate([before, after[..., : q.shape[-1]]], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _segments(
    q: Array, k: Array, v: Array, first: int, recycle: Recycle, dim: int
) -> Float[Array, "B T_minus_first N H"]:
    """The outputs of token `first` and of the tokens after it. Head dims are padded to a power of two; the first `dim`
    lanes hold data."""
    return _forward(q, k, v, first, recycle, dim)[0]


def _forward(q: Array, k: Array, v: Array, first: int, recycle: Recycle, dim: int) -> tuple[Array, Any]:
    """The outputs of `_segments`, and the residuals for `_backward`."""
    width = q.shape[1]
    form = _form(width, first, recycle)
    keys, values = _by_head(k), _by_head(v)
    selecting = q[:, first :: form.stride]
    # no gradient flows through the selection: `_backward` has only the gradients of attention
    out, normaliser = prefill_attention.strided(selecting, keys, values, first, form.stride, dim)
    slots, leaves = _select(selecting, keys, normaliser, form, recycle, dim)
    slots, leaves = checkpoint_name((slots, leaves), whole_sequence.SELECTION)
    out, normaliser = forward.segments(q, keys, values, slots, leaves, out, normaliser, form, dim)
    out, normaliser = (checkpoint_name(x, whole_sequence.OUTPUT) for x in (out, normaliser))
    return out[:, : width - first], (q, k, v, slots, leaves, out, normaliser)


def _backward(first: int, recycle: Recycle, dim: int, residuals: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v."""
    q, k, v, slots, leaves, out, normaliser = residuals
    width = q.shape[1]
    form = _form(width, first, recycle)
    keys, values = _by_head(k), _by_head(v)
    selecting = q[:, first :: form.stride]
    cotangent = jnp.pad(cotangent, ((0, 0), (0, out.shape[1] - cotangent.shape[1]), (0, 0), (0, 0)))
    sums = jnp.einsum("bunh,bunh->bun", cotangent, out, preferred_element_type=jnp.float32)
    cotangents = Cotangents(cotangent, normaliser, sums)
    selecting_cotangents = Cotangents(*(x[:, : -1 : form.stride] for x in cotangents))

    selecting_gradients = selection_gradients.query_gradients(selecting, keys, values, selecting_cotangents, form, dim)
    new_gradients = backward.new_key_gradients(q, keys, values, cotangents, form, dim)
    kv_gradients = selection_gradients.key_gradients(
        selecting, keys, values, selecting_cotangents, new_gradients, form, dim
    )
    size = 2 * q.dtype.itemsize * q.shape[3] * slots[0].size
    parts, count = _parts(slots.shape[0], size, 1)
    slots = _pad_segments(slots, parts * count, NOWHERE)
    leaves = None if leaves is None else _pad_segments(leaves, parts * count, 0)

    def add_part(number: Array, carry: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        query_gradients, kv_gradients = carry
        part = number.astype(jnp.int32) * count, count, form, dim
        query_gradients, entry_gradients = backward.segment_gradients(
            q, keys, values, slots, leaves, cotangents, selecting_gradients, query_gradients, *part
        )
        part_slots = lax.dynamic_slice_in_dim(slots, part[0], count)
        return query_gradients, gathering.gathered(kv_gradients, entry_gradients, part_slots, part[0], form)

    query_gradients, kv_gradients = lax.fori_loop(0, parts, add_part, (jnp.zeros_like(out), kv_gradients))
    query_gradients = jnp.pad(query_gradients[:, : width - first], ((0, 0), (first, 0), (0, 0), (0, 0)))
    key_gradients, value_gradients = (x[:, :, :width].swapaxes(1, 2).astype(k.dtype) for x in kv_gradients)
    return query_gradients, key_gradients, value_gradients


_segments.defvjp(_forward, _backward)


def _form(width: int, first: int, recycle: Recycle) -> Form:
    return Form(first, min(recycle.stride, width - first), min(recycle.budget, width), recycle.evict)


def _by_head(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    return x.swapaxes(1, 2)


def _select(
    selecting: Float[Array, "B C N H"],
    keys: Float[Array, "B K T H"],
    normaliser: Float[Array, "B C N"],
    form: Form,
    recycle: Recycle,
    dim: int,
) -> tuple[Int[Array, "C B K P"], Int[Array, "C B K P"] | None]:
    """The slots that each segment selects, in ascending order, then `NOWHERE`; and, with eviction, the last of the
    segment's tokens that sees each slot. P is R rounded up to whole tiles."""
    selecting, keys, normaliser = lax.stop_gradient((selecting, keys, normaliser))
    batch, count = selecting.shape[:2]
    kv_heads, width = keys.shape[1:3]
    parts, at_once = _parts(count, 4 * batch * kv_heads * width, forward.SCORES.rows)
    ordered = min(form.stride - 1, form.ranks) if form.evict else 0

    def select_part(begin: Array) -> Int[Array, "c B K R"]:
        scores = forward.scores(selecting, keys, normaliser, begin, at_once, form, dim)[..., :width]
        token = form.first + form.stride * (begin + jnp.arange(at_once, dtype=jnp.int32))
        visible = jnp.arange(width, dtype=jnp.int32) <= token[:, None]
        pooled = selection.pool(scores.reshape(at_once, -1, width), visible, recycle.pool, recycle.lookahead)
        return top_slots.top_slots_on_device(pooled.reshape(scores.shape), form.ranks, ordered)

    slots = (
        lax.map(select_part, at_once * jnp.arange(parts, dtype=jnp.int32))
        if parts > 1
        else select_part(jnp.int32(0))[None]
    )
    slots = slots.reshape(parts * at_once, *slots.shape[2:])[:count]
    slots = jnp.where(slots < 0, NOWHERE, slots)
    leaves = None
    if form.evict:
        # the tokens before the (R - r)-th see the entry of rank r; only the last `ordered` entries are in rank order
        rank = jnp.arange(form.ranks, dtype=jnp.int32)
        last = jnp.where(rank < form.ranks - ordered, form.stride, form.ranks - 1 - rank)
        slots, leaves = lax.sort((slots, jnp.broadcast_to(last, slots.shape)), num_keys=1)
    tile = tiling.side(form.ranks, backward.KEYS.entries)
    padding = [(0, 0, 0)] * 3 + [(0, -form.ranks % tile, 0)]
    slots = lax.pad(slots, jnp.int32(NOWHERE), padding)
    return slots, None if leaves is None else lax.pad(leaves, jnp.int32(0), padding)


def _parts(count: int, size: int, multiple: int) -> tuple[int, int]:
    """The number of parts into which `count` segments of `size` bytes each are cut, and the number of segments of a
    part, in whole tiles of at most `multiple` segments."""
    most = max(multiple, AT_ONCE // size // multiple * multiple)
    tile = tiling.side(count, multiple) if multiple > 1 else 1
    at_once = pl.cdiv(pl.cdiv(count, pl.cdiv(count, most)), tile) * tile
    return pl.cdiv(count, at_once), at_once


def _pad_segments(x: Int[Array, "C B K P"], count: int, fill: int) -> Int[Array, "c B K P"]:
    """x with `fill` for the segments after its own, up to `count` segments."""
    return lax.pad(x, jnp.int32(fill), [(0, count - x.shape[0], 0)] + 3 * [(0, 0, 0)])
