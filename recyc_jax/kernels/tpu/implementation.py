"""The `"pallas_tpu"` implementation: a cache with the slots last, kept sets as copies, kernels for decode and
prefill."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache
from recyc_jax.kernels.tpu import decode_attention, prefill_attention
from recyc_jax.kernels.tpu.compaction import compact
from recyc_jax.kernels.tpu.copied_set import CopiedSet, copy_first_slots, keep_copies


class TPU(Implementation):
    """As `Implementation`. On a CPU the kernels run only in JAX's interpreter of TPU kernels."""

    slots_last = True

    def chunk(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], offset: Int[Array, ""]
    ) -> Float[Array, "B C N H"]:
        return prefill_attention.chunk(q, cached.keys, cached.values, starts, offset)

    def full(self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"]) -> Float[Array, "B N H"]:
        return decode_attention.full(q, cached.keys, cached.values, visible)

    def full_with_log_probabilities(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        visible: Bool[Array, "B S"],
        rows: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
        return decode_attention.full_with_log_probabilities(q, cached.keys, cached.values, visible)

    def keep(
        self, layers: Sequence[LayerCache], scores: Sequence[Float[Array, "B K S"]], budget: int, ordered: int
    ) -> list[CopiedSet]:
        return keep_copies(layers, scores, budget, compact)

    def first_slots(self, cached: LayerCache, starts: Int[Array, " B"], count: int) -> CopiedSet:
        return copy_first_slots(cached, starts, count)
