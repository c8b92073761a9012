"""Recycled attention over a whole sequence on NVIDIA GPUs: `training.recycled` by kernels, forward and backward.

Letters are those of `training.py` and `training_tiles_gpu.py`.
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

from recyc_jax.attention import prefill_gpu, select, select_gpu, training
from recyc_jax.attention import training_backward_gpu as backward
from recyc_jax.attention import training_forward_gpu as forward
from recyc_jax.attention import training_selecting_gpu as selecting_back
from recyc_jax.attention import training_tiles_gpu as tiled
from recyc_jax.attention.training import Dense, Recycle
from recyc_jax.attention.training_backward_gpu import Cotangents
from recyc_jax.attention.training_tiles_gpu import NOWHERE, Form

AT_ONCE = 1 << 30
"""Bytes of scores, and of entries' gradients, that are in memory at once: bounds what long sequences take."""


def recycled(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    recycle: Recycle,
    dense: Dense,
) -> Float[Array, "B T N H"]:
    """As `training.recycled`; what the kernels make is the same bits every time. Made for 16-bit dtypes and head dims of at
    most 128: tensor cores multiply no float32, and larger tiles don't fit. Logits are summed up in another order, so
    near-ties may be ranked otherwise."""
    first = recycle.prefix - 1
    before = dense(q[:, :first], k[:, :first], v[:, :first], None) if first else q[:, :0]
    lanes = max(tiled.LEAST, pl.next_power_of_2(q.shape[-1])) - q.shape[-1]
    q_wide, k_wide, v_wide = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, lanes))) for x in (q, k, v))
    after: Any = _segments(q_wide, k_wide, v_wide, first, recycle, q.shape[-1])
    return jnp.concatenate([before, after[..., : q.shape[-1]]], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _segments(
    q: Array, k: Array, v: Array, first: int, recycle: Recycle, dim: int
) -> Float[Array, "B T_minus_first N H"]:
    """The outputs of tokens `first` and later; head dims are padded to a power of two, of which `dim` mean something."""
    return _forward(q, k, v, first, recycle, dim)[0]


def _forward(q: Array, k: Array, v: Array, first: int, recycle: Recycle, dim: int) -> tuple[Array, Any]:
    width = q.shape[1]
    form = _form(width, first, recycle)
    keys, values = _by_head(k), _by_head(v)
    selecting = q[:, first :: form.stride]
    # what the selection reads sends no gradient back through it
    out, normaliser = prefill_gpu.strided(selecting, keys, values, first, form.stride, dim)
    slots, leaves = _select(selecting, keys, normaliser, form, recycle, dim)
    slots, leaves = checkpoint_name((slots, leaves), training.SELECTION)
    out, normaliser = forward.segments(q, keys, values, slots, leaves, out, normaliser, form, dim)
    out, normaliser = (checkpoint_name(x, training.OUTPUT) for x in (out, normaliser))
    return out[:, : width - first], (q, k, v, slots, leaves, out, normaliser)


def _backward(first: int, recycle: Recycle, dim: int, kept: Any, gradient: Array) -> tuple[Array, Array, Array]:
    q, k, v, slots, leaves, out, normaliser = kept
    width = q.shape[1]
    form = _form(width, first, recycle)
    keys, values = _by_head(k), _by_head(v)
    selecting = q[:, first :: form.stride]
    gradient = jnp.pad(gradient, ((0, 0), (0, out.shape[1] - gradient.shape[1]), (0, 0), (0, 0)))
    sums = jnp.einsum("bunh,bunh->bun", gradient, out, preferred_element_type=jnp.float32)
    back = Cotangents(gradient, normaliser, sums)
    of_first = Cotangents(*(x[:, : -1 : form.stride] for x in back))

    of_selecting = selecting_back.query_gradients(selecting, keys, values, of_first, form, dim)
    new = backward.new_key_gradients(q, keys, values, back, form, dim)
    both = selecting_back.key_gradients(selecting, keys, values, of_first, new, form, dim)
    size = 2 * q.dtype.itemsize * q.shape[3] * slots[0].size
    parts, count = _parts(slots.shape[0], size, 1)
    slots = _lengthened(slots, parts * count, NOWHERE)
    leaves = None if leaves is None else _lengthened(leaves, parts * count, 0)

    def add(number: Array, made: tuple[Array, tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        of_queries, both = made
        part = number * count, count, form, dim
        of_queries, listed = backward.segment_gradients(
            q, keys, values, slots, leaves, back, of_selecting, of_queries, *part
        )
        in_part = lax.dynamic_slice_in_dim(slots, part[0], count)
        return of_queries, backward.gathered(both, listed, in_part, part[0], form)

    of_queries, both = lax.fori_loop(0, parts, add, (jnp.zeros_like(out), both))
    of_queries = jnp.pad(of_queries[:, : width - first], ((0, 0), (first, 0), (0, 0), (0, 0)))
    of_keys, of_values = (x[:, :, :width].swapaxes(1, 2).astype(k.dtype) for x in both)
    return of_queries, of_keys, of_values


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
    """The slots that each segment attends to, in their order, `NOWHERE` behind them; and, where ranked keys leave, the last
    of the segment's tokens that sees each. P is a whole number of tiles."""
    selecting, keys, normaliser = lax.stop_gradient((selecting, keys, normaliser))
    batch, count = selecting.shape[:2]
    kv_heads, width = keys.shape[1:3]
    parts, at_once = _parts(count, 4 * batch * kv_heads * width, forward.SCORES.rows)
    ordered = min(form.stride - 1, form.ranks) if form.evict else 0

    def choose(begin: Array) -> Int[Array, "c B K R"]:
        scores = forward.scores(selecting, keys, normaliser, begin, at_once, form, dim)[..., :width]
        token = form.first + form.stride * (begin + jnp.arange(at_once, dtype=jnp.int32))
        visible = jnp.arange(width, dtype=jnp.int32) <= token[:, None]
        pooled = select.pool(scores.reshape(at_once, -1, width), visible, recycle.pool, recycle.lookahead)
        return select_gpu.top_slots_here(pooled.reshape(scores.shape), form.ranks, ordered)

    slots = lax.map(choose, at_once * jnp.arange(parts, dtype=jnp.int32)) if parts > 1 else choose(jnp.int32(0))[None]
    slots = slots.reshape(parts * at_once, *slots.shape[2:])[:count]
    slots = jnp.where(slots < 0, NOWHERE, slots)
    leaves = None
    if form.evict:
        # the entry of rank r is seen by tokens before the (R - r)th; only the last ones are in order of rank
        rank = jnp.arange(form.ranks, dtype=jnp.int32)
        last = jnp.where(rank < form.ranks - ordered, form.stride, form.ranks - 1 - rank)
        slots, leaves = lax.sort((slots, jnp.broadcast_to(last, slots.shape)), num_keys=1)
    tile = tiled.side(form.ranks, backward.KEYS.entries)
    fill = [(0, 0, 0)] * 3 + [(0, -form.ranks % tile, 0)]
    slots = lax.pad(slots, jnp.int32(NOWHERE), fill)
    return slots, None if leaves is None else lax.pad(leaves, jnp.int32(0), fill)


def _parts(count: int, size: int, multiple: int) -> tuple[int, int]:
    """Into how many parts of how many segments to cut `count`, of `size` bytes each; the latter a multiple."""
    most = max(multiple, AT_ONCE // size // multiple * multiple)
    tile = tiled.side(count, multiple) if multiple > 1 else 1
    at_once = pl.cdiv(pl.cdiv(count, pl.cdiv(count, most)), tile) * tile
    return pl.cdiv(count, at_once), at_once


def _lengthened(x: Int[Array, "C B K P"], count: int, fill: int) -> Int[Array, "c B K P"]:
    return lax.pad(x, jnp.int32(fill), [(0, count - x.shape[0], 0)] + 3 * [(0, 0, 0)])
