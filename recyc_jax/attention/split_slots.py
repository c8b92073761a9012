"""Attention over a full cache whose slots are split over the devices of the mesh's `sequence` axis.

Each device runs an implementation on its part of the slots, and the parts' softmaxes are put together by their
logsumexps (split-K, as the programs of one GPU do it). What moves is one output for each query and part: no key and no
value. A choice of slots is exact: each device finds the best of its own, and the best of these are chosen. Partial steps
read kept slots where they lie, too."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import sharding
from recyc_jax.attention import reference, selection
from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import KeptSlots, Reads
from recyc_jax.attention.remainder import Moments
from recyc_jax.cache import LayerCache
from recyc_jax.config import LlamaConfig


class SplitSlots(Implementation):
    """The implementation `inner`, each device with its part of the slots."""

    def __init__(self, inner: Implementation):
        if inner.slots_last:
            raise ValueError(
                "kernels for TPU read whole rows: without a sequence axis, or with implementation='reference'"
            )
        self.inner, self.skips_rows = inner, inner.skips_rows
        self.kept_set = functools.partial(SplitKeptSlots, of=inner.kept_set)

    # --- prefill

    def chunk(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], offset: Int[Array, ""]
    ) -> Float[Array, "B C N H"]:
        def on_device(q: Array, cached: LayerCache, starts: Array, offset: Array) -> Array:
            begin = sharding.first_slot(cached.capacity)
            return _together(*self.inner.chunk_part(q, cached, starts - begin, offset - begin))[0].astype(q.dtype)

        inputs = "B-N-", cached.letters, "B", ""
        return sharding.split_kernel(on_device, q.shape[0], inputs, "B-N-")(q, cached, starts, offset)

    def chunk_with_mass(
        self,
        q: Float[Array, "B C N H"],
        cached: LayerCache,
        starts: Int[Array, " B"],
        offset: Int[Array, ""],
        first: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B K G S"]]:
        def on_device(q: Array, cached: LayerCache, *places: Array) -> tuple[Array, Array]:
            starts, first, offset = (place - sharding.first_slot(cached.capacity) for place in places)
            out, normaliser = _together(*self.inner.chunk_part(q, cached, starts, offset))
            mass = reference.received_mass(q, cached.keys, starts, offset, first, normaliser)
            return out.astype(q.dtype), mass

        inputs, outputs = ("B-N-", cached.letters, "B", "B", ""), ("B-N-", "BKGS")
        local = sharding.split_kernel(on_device, q.shape[0], inputs, outputs)
        return local(q, cached, starts, starts if first is None else first, offset)

    def window_scores(
        self, q: Float[Array, "B W N H"], cached: LayerCache, starts: Int[Array, " B"], length: Int[Array, ""]
    ) -> Float[Array, "B K S"]:
        def on_device(q: Array, cached: LayerCache, *places: Array) -> Array:
            starts, length = (place - sharding.first_slot(cached.capacity) for place in places)
            parts = lax.all_gather(self.inner.window_normaliser(q, cached, starts, length), sharding.SEQUENCE)
            scores = self.inner.window_scores_by(q, cached, starts, length, jax.nn.logsumexp(parts, axis=0))
            return sharding.over_heads(lax.pmax, scores, (sharding.GROUP,))

        inputs = "B-N-", cached.letters, "B", ""
        return sharding.split_kernel(on_device, q.shape[0], inputs, "BKS")(q, cached, starts, length)

    # --- layers with a sliding window, which are not split

    def window_chunk(self, *args: Any) -> Array:
        return self.inner.window_chunk(*args)

    def window_step(self, *args: Any) -> Array:
        return self.inner.window_step(*args)

    # --- a full step

    def full(self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"]) -> Float[Array, "B N H"]:
        return self._full(q, cached, visible)[0]

    def full_with_log_probabilities(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        visible: Bool[Array, "B S"],
        rows: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
        return self._full(q, cached, visible, rows, with_logits=True)[:2]

    def full_with_moments(
        self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"], length: Int[Array, ""]
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"], Moments]:
        return self._full(q, cached, visible, with_logits=True, with_key=True)

    def _full(
        self, q: Array, cached: LayerCache, visible: Array, rows: Any = None, with_logits: bool = False, **options: bool
    ) -> tuple[Any, ...]:
        """The output, the log-probabilities (anything without `with_logits`) and the moments."""

        def on_device(q: Array, cached: LayerCache, visible: Array, rows: Any) -> tuple[Any, ...]:
            part, logits = self.inner.part(q, cached, visible, rows, with_logits, **options)
            whole = _whole(part)
            log_probabilities = None if logits is None else logits - whole.lse[..., None]
            return whole.value.reshape(q.shape).astype(q.dtype), log_probabilities, whole

        inputs, outputs = ("BN-", cached.letters, "BS", "B"), ("BN-", "BKGS", "BKG")
        return sharding.split_kernel(on_device, q.shape[0], inputs, outputs)(q, cached, visible, rows)

    # --- a block of drafted tokens

    def block(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], begins: Int[Array, " B"]
    ) -> Float[Array, "B C N H"]:
        return self._block(q, cached, starts, begins, with_scores=False)[0]

    def block_with_scores(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], begins: Int[Array, " B"]
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B K S"]]:
        return self._block(q, cached, starts, begins, with_scores=True)

    def _block(
        self, q: Array, cached: LayerCache, starts: Array, begins: Array, with_scores: bool
    ) -> tuple[Array, Any]:
        def on_device(q: Array, cached: LayerCache, *places: Array) -> tuple[Array, Any]:
            starts, begins = (place - sharding.first_slot(cached.capacity) for place in places)
            out, normaliser, logits = self.inner.block_part(q, cached, starts, begins, with_scores)
            out, normaliser = _together(out, normaliser)
            if logits is None:
                return out.astype(q.dtype), None
            scores = logits - normaliser[:, 0].reshape(logits.shape[:3])[..., None]
            scores = sharding.over_heads(lax.pmax, selection.group_maximum(scores), (sharding.GROUP,))
            return out.astype(q.dtype), scores

        inputs, outputs = ("B-N-", cached.letters, "B", "B"), ("B-N-", "BKS")
        return sharding.split_kernel(on_device, q.shape[0], inputs, outputs)(q, cached, starts, begins)

    # --- a decode step

    def decoder_layers(self, config: LlamaConfig, rows: int, dtype: Any, width: int = 1) -> Callable[..., Any] | None:
        return self.inner.decoder_layers(config, rows, dtype, width)

    # --- kept sets

    def best_slots(self, scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
        count = min(budget, scores.shape[-1])

        def on_device(scores: Array) -> Array:
            # equal scores stay in the order of slots: devices are in that order, and each lists them so
            slots = self.inner.best_slots(scores, count, 0)
            its_scores = jnp.take_along_axis(scores, jnp.maximum(slots, 0), axis=-1)
            its_scores = jnp.where(slots < 0, -jnp.inf, its_scores)
            slots = jnp.where(slots < 0, -1, slots + sharding.first_slot(scores.shape[-1]))
            gathered = functools.partial(lax.all_gather, axis_name=sharding.SEQUENCE, axis=3, tiled=True)
            best = self.inner.best_slots(gathered(its_scores), count, ordered)
            return jnp.where(best < 0, -1, jnp.take_along_axis(gathered(slots), jnp.maximum(best, 0), axis=-1))

        return sharding.split_kernel(on_device, scores.shape[1], ("-BKS",), "-BK-")(scores)


@flax.struct.dataclass
class SplitKeptSlots(KeptSlots):
    """A kept set stored as slots of the whole cache; each device reads those of its own part."""

    of: Callable[..., Any] = flax.struct.field(pytree_node=False, default=KeptSlots)
    """Makes the kept set of a part."""

    def attend(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads, rows: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B N H"]:
        return self.moments(q, cached, reads, rows=rows).value.reshape(q.shape).astype(q.dtype)

    def attend_with_log_probabilities(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"], Float[Array, "B K G W"]]:
        def on_device(q: Array, cached: LayerCache, slots: Array) -> tuple[Array, Array]:
            slots = _own(slots, cached)
            keys, values, is_listed = reference.listed(cached.keys, cached.values, slots)
            logits = reference.masked_logits(q, keys, is_listed)
            lse = jax.nn.logsumexp(logits, axis=-1)
            value, normaliser = _together(reference.mean_under(jnp.exp(logits - lse[..., None]), values), lse)
            log_probabilities = jnp.where(is_listed[:, :, None], logits - normaliser[..., None], -jnp.inf)
            return value.reshape(q.shape).astype(q.dtype), lax.pmax(log_probabilities, sharding.SEQUENCE)

        inputs, outputs = ("BN-", cached.letters, "BK-"), ("BN-", "BKG-")
        local = sharding.split_kernel(on_device, q.shape[0], inputs, outputs)
        out, log_probabilities = local(q, cached, self._read_slots(reads))
        return out, log_probabilities[..., : self.size], log_probabilities[..., self.size :]

    def moments(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        reads: Reads,
        with_key: bool = False,
        rows: Bool[Array, " B"] | None = None,
    ) -> Moments:
        remaining, first = reads.remaining(self.size)
        remains = jnp.arange(self.size, dtype=jnp.int32) < remaining[:, None, None]
        length = jnp.broadcast_to(reads.length, first.shape)

        def on_device(q: Array, cached: LayerCache, slots: Array, first: Array, length: Array, rows: Any) -> Moments:
            capacity = cached.capacity
            begin = sharding.first_slot(capacity)
            first, length = (jnp.clip(slot - begin, 0, capacity) for slot in (first, length))
            its_reads = Reads(first, length, min(reads.most, capacity))
            return _whole(self.of(_own(slots, cached)).moments(q, cached, its_reads, with_key, rows))

        inputs = "BN-", cached.letters, "BK-", "B", "B", "B"
        local = sharding.split_kernel(on_device, q.shape[0], inputs, "BKG")
        return local(q, cached, jnp.where(remains, self.slots, -1), first, length, rows)


def _own(slots: Int[Array, "B K R"], cached: LayerCache) -> Int[Array, "B K R"]:
    """The listed slots counted from the device's first one; -1 for those of other devices, and for none."""
    own = slots - sharding.first_slot(cached.capacity)
    return jnp.where((slots >= 0) & (own >= 0) & (own < cached.capacity), own, -1)


def _together(
    out: Float[Array, "... X"], lse: Float[Array, "..."]
) -> tuple[Float[Array, "... X"], Float[Array, "..."]]:
    """Means under the softmax of all devices' slots, and its logsumexp, from those of each device's own: one collective."""
    parts = lax.all_gather(jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1), sharding.SEQUENCE)
    outs, each = parts[..., :-1], parts[..., -1]
    whole = jax.nn.logsumexp(each, axis=0)
    return jnp.sum(outs * jnp.exp(each - whole)[..., None], axis=0), whole


def _whole(part: Moments) -> Moments:
    """The moments of all devices' slots from each device's."""
    if part.key is None:
        value, lse = _together(part.value, part.lse)
        return dataclasses.replace(part, lse=lse, value=value)
    both, lse = _together(jnp.concatenate([part.value, part.key], axis=-1), part.lse)
    value, key = jnp.split(both, 2, axis=-1)
    return Moments(lse, value, key)
