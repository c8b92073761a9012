"""The `"pallas_gpu"` implementation: Triton kernels for decode, prefill and selection, plain JAX for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention.implementation import Implementation
from recyc_jax.attention.kept import KeptSlots, Reads
from recyc_jax.attention.remainder import Moments, Remainder
from recyc_jax.cache import LayerCache
from recyc_jax.config import LlamaConfig
from recyc_jax.kernels.gpu import decode_attention, decoder_layers, prefill_attention, top_slots, turn_attention


@flax.struct.dataclass
class KeptSlotsByKernel(KeptSlots):
    """A kept set that a kernel reads by index where its slots lie in the cache."""

    def attend(
        self, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads, rows: Bool[Array, " B"] | None = None
    ) -> Float[Array, "B N H"]:
        return decode_attention.kept(q, cached.keys, cached.values, self.slots, reads, rows)

    def moments(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        reads: Reads,
        with_key: bool = False,
        rows: Bool[Array, " B"] | None = None,
    ) -> Moments:
        return decode_attention.kept_moments(q, cached.keys, cached.values, self.slots, reads, with_key, rows)

    def attend_also(
        self, rest: Remainder, q: Float[Array, "B N H"], cached: LayerCache, reads: Reads
    ) -> Float[Array, "B N H"]:
        return decode_attention.kept(q, cached.keys, cached.values, self.slots, reads, rest=rest)


def _fits_prefill(q: Array) -> bool:
    """Whether the prefill kernel takes these queries: tensor cores multiply no float32, and tiles of wider heads do not
    fit in registers."""
    return q.dtype.itemsize == 2 and q.shape[-1] <= 128


def _are_few(q: Array) -> bool:
    """Whether prefill's kernel, with a program for each head and block of queries, would leave a GPU half empty."""
    batch, width, heads, _ = q.shape
    return batch * heads * -(-width // prefill_attention.TILE[0]) <= turn_attention.PROGRAMS // 2


def _scores_windows(q: Array) -> bool:
    """Whether the kernel that scores slots takes these queries."""
    return _fits_prefill(q) and q.shape[1] <= turn_attention.TILE


class GPU(Implementation):
    """As `Implementation`. On a CPU the kernels run only in Pallas' interpreter (`triton_call.INTERPRET`)."""

    skips_rows = True  # a `lax.cond` keeps a GPU waiting for some 16 us
    kept_set = KeptSlotsByKernel

    def chunk(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], offset: Int[Array, ""]
    ) -> Float[Array, "B C N H"]:
        if not _fits_prefill(q):
            return super().chunk(q, cached, starts, offset)
        kernel = turn_attention if _are_few(q) else prefill_attention
        return kernel.chunk(q, cached.keys, cached.values, starts, offset)

    def window_scores(
        self, q: Float[Array, "B W N H"], cached: LayerCache, starts: Int[Array, " B"], length: Int[Array, ""]
    ) -> Float[Array, "B K S"]:
        if not _scores_windows(q):
            return super().window_scores(q, cached, starts, length)
        return turn_attention.window_scores(q, cached.keys, cached.values, starts, length)

    def window_chunk(
        self,
        q: Float[Array, "B C N H"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        starts: Int[Array, " B"],
        offset: Int[Array, ""],
        window: int,
    ) -> Float[Array, "B C N H"]:
        if _fits_prefill(q):
            return prefill_attention.chunk(q, keys, values, starts, offset, window)
        return super().window_chunk(q, keys, values, starts, offset, window)

    def window_step(
        self,
        q: Float[Array, "B N H"],
        keys: Float[Array, "B K R H"],
        values: Float[Array, "B K R H"],
        visible: Bool[Array, "B R"],
    ) -> Float[Array, "B N H"]:
        return decode_attention.full(q, keys, values, visible)

    def full(self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"]) -> Float[Array, "B N H"]:
        return decode_attention.full(q, cached.keys, cached.values, visible)

    def full_with_log_probabilities(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        visible: Bool[Array, "B S"],
        rows: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
        return decode_attention.full_with_log_probabilities(q, cached.keys, cached.values, visible, rows)

    def full_with_moments(
        self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"], length: Int[Array, ""]
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"], Moments]:
        return decode_attention.full_with_moments(q, cached.keys, cached.values, visible)

    def part(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        visible: Bool[Array, "B S"],
        rows: Bool[Array, " B"] | None = None,
        with_logits: bool = False,
        with_key: bool = False,
    ) -> tuple[Moments, Float[Array, "B K G S"] | None]:
        return decode_attention.part(q, cached.keys, cached.values, visible, rows, with_logits, with_key)

    def chunk_part(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], offset: Int[Array, ""]
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"]]:
        if not _fits_prefill(q):
            return super().chunk_part(q, cached, starts, offset)
        kernel = turn_attention if _are_few(q) else prefill_attention
        return kernel.chunk_part(q, cached.keys, cached.values, starts, offset)

    def window_normaliser(
        self, q: Float[Array, "B W N H"], cached: LayerCache, starts: Int[Array, " B"], length: Int[Array, ""]
    ) -> Float[Array, "..."]:
        if not _scores_windows(q):
            return super().window_normaliser(q, cached, starts, length)
        return turn_attention.window_normaliser(q, cached.keys, cached.values, starts, length)

    def window_scores_by(
        self,
        q: Float[Array, "B W N H"],
        cached: LayerCache,
        starts: Int[Array, " B"],
        length: Int[Array, ""],
        normaliser: Float[Array, "..."],
    ) -> Float[Array, "B K S"]:
        if not _scores_windows(q):
            return super().window_scores_by(q, cached, starts, length, normaliser)
        return turn_attention.window_scores_by(q, cached.keys, starts, length, normaliser)

    def block_part(
        self,
        q: Float[Array, "B C N H"],
        cached: LayerCache,
        starts: Int[Array, " B"],
        begins: Int[Array, " B"],
        with_logits: bool,
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"], Float[Array, "B K G S"] | None]:
        if not _fits_prefill(q):
            return super().block_part(q, cached, starts, begins, with_logits)
        return turn_attention.block_part(q, cached.keys, cached.values, starts, begins, with_logits)

    def block(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], begins: Int[Array, " B"]
    ) -> Float[Array, "B C N H"]:
        if not _fits_prefill(q):
            return super().block(q, cached, starts, begins)
        return turn_attention.block(q, cached.keys, cached.values, starts, begins)

    def block_with_scores(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], begins: Int[Array, " B"]
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B K S"]]:
        if not _fits_prefill(q):
            return super().block_with_scores(q, cached, starts, begins)
        return turn_attention.block_with_scores(q, cached.keys, cached.values, starts, begins)

    def decoder_layers(self, config: LlamaConfig, rows: int, dtype: Any, width: int = 1) -> Callable[..., Any] | None:
        return decoder_layers.run if decoder_layers.applies(config, rows, dtype, width) else None

    def best_slots(self, scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
        return top_slots.top_slots(scores, budget, ordered)
