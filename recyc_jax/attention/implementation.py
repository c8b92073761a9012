"""What an attention implementation offers to prefill, to policies and to the decode loop.

`Implementation` itself is the plain one, `"reference"`. The kernels' implementations (`kernels/gpu`, `kernels/tpu`)
override what they do better and inherit the rest; `implementations.py` finds them by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import cache
from recyc_jax.attention import reference, selection
from recyc_jax.attention.kept import KeptSlots
from recyc_jax.attention.remainder import Moments
from recyc_jax.cache import LayerCache
from recyc_jax.config import LlamaConfig


class Implementation:
    """Plain jax.numpy. Letters as in `reference.py`. Functions take one layer, `keep` all layers at once."""

    slots_last: bool = False
    """The cache is stored as [B, K, H, S] (`cache.py`)."""
    skips_rows: bool = False
    """Rows that are not asked for (`rows`) cost nothing, so that a policy need not avoid them by a `lax.cond`."""
    kept_set: Callable[..., Any] = KeptSlots
    """Makes a kept set of slots [B, K, R] in rank order."""

    # --- prefill

    def chunk(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], offset: Int[Array, ""]
    ) -> Float[Array, "B C N H"]:
        """Causal attention of C queries, the first in slot `offset`, over the cache that holds their keys."""
        return reference.chunk(q, cached.keys, cached.values, starts, offset)

    def chunk_with_mass(
        self,
        q: Float[Array, "B C N H"],
        cached: LayerCache,
        starts: Int[Array, " B"],
        offset: Int[Array, ""],
        first: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B K G S"]]:
        """`chunk`, and the probability that each slot receives, summed over the queries in slots from `first` on (None:
        from `starts` on)."""
        return reference.chunk_with_mass(q, cached.keys, cached.values, starts, offset, first)

    def window_scores(
        self, q: Float[Array, "B W N H"], cached: LayerCache, starts: Int[Array, " B"], length: Int[Array, ""]
    ) -> Float[Array, "B K S"]:
        """Each slot's score under the last W queries (`reference.window_scores`)."""
        return reference.window_scores(q, cached.keys, starts, length)

    # --- layers with a sliding window (`sliding_window.py`)

    def window_chunk(
        self,
        q: Float[Array, "B C N H"],
        keys: Float[Array, "B K S H"],
        values: Float[Array, "B K S H"],
        starts: Int[Array, " B"],
        offset: Int[Array, ""],
        window: int,
    ) -> Float[Array, "B C N H"]:
        """`chunk`, but each query sees the latest `window` slots alone."""
        return reference.chunk(q, keys, values, starts, offset, window)

    def window_step(
        self,
        q: Float[Array, "B N H"],
        keys: Float[Array, "B K R H"],
        values: Float[Array, "B K R H"],
        visible: Bool[Array, "B R"],
    ) -> Float[Array, "B N H"]:
        """One query per row over the visible ones of R places, in any order."""
        return reference.full(q, keys, values, visible)

    # --- a full step

    def full(self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"]) -> Float[Array, "B N H"]:
        """One query per row over every visible slot, which are one run of slots in each row."""
        return reference.full(q, cached.keys, cached.values, visible)

    def full_with_log_probabilities(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        visible: Bool[Array, "B S"],
        rows: Bool[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
        """`full`, and the log-probability of each visible slot under each query head, float32; other slots hold
        anything. Only the results of `rows` (None: all rows) are needed."""
        return reference.full_with_log_probabilities(q, cached.keys, cached.values, visible)

    def full_with_moments(
        self, q: Float[Array, "B N H"], cached: LayerCache, visible: Bool[Array, "B S"], length: Int[Array, ""]
    ) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"], Moments]:
        """`full_with_log_probabilities`, and the moments of attention to every visible slot, with keys. `length` slots
        are written, and the last one is visible in every row."""
        out, log_probabilities = self.full_with_log_probabilities(q, cached, visible)
        weights = jnp.where(visible[:, None, None], jnp.exp(log_probabilities), 0)
        newest_key = lax.dynamic_slice_in_dim(cached.keys, length - 1, 1, axis=2)
        logit = reference.masked_logits(q, newest_key, jnp.ones((q.shape[0], 1, 1), jnp.bool_))
        lse = logit - lax.dynamic_slice_in_dim(log_probabilities, length - 1, 1, axis=3)
        key, value = (reference.mean_under(weights, side) for side in (cached.keys, cached.values))
        return out, log_probabilities, Moments(lse[..., 0], value, key)

    # --- part of a full cache whose slots are split over devices (`split_slots.py`): `starts`, `offset` and their like are
    # counted from the part's first slot, and may lie before or behind it

    def part(
        self,
        q: Float[Array, "B N H"],
        cached: LayerCache,
        visible: Bool[Array, "B S"],
        rows: Bool[Array, " B"] | None = None,
        with_logits: bool = False,
        with_key: bool = False,
    ) -> tuple[Moments, Float[Array, "B K G S"] | None]:
        """`full` over the part's slots, as moments and logits (`reference.part`)."""
        return reference.part(q, cached.keys, cached.values, visible)

    def chunk_part(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], offset: Int[Array, ""]
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"]]:
        """`chunk` over the part's slots, and each query's logsumexp."""
        return reference.chunk_part(q, cached.keys, cached.values, starts, offset)

    def window_normaliser(
        self, q: Float[Array, "B W N H"], cached: LayerCache, starts: Int[Array, " B"], length: Int[Array, ""]
    ) -> Float[Array, "..."]:
        """The logsumexp of each of the last W queries over the part's slots, in any order."""
        return reference.window_normaliser(q, cached.keys, starts, length)

    def window_scores_by(
        self,
        q: Float[Array, "B W N H"],
        cached: LayerCache,
        starts: Int[Array, " B"],
        length: Int[Array, ""],
        normaliser: Float[Array, "..."],
    ) -> Float[Array, "B K S"]:
        """`window_scores` of the part's slots by the whole cache's normaliser."""
        return reference.window_scores(q, cached.keys, starts, length, normaliser)

    def block_part(
        self,
        q: Float[Array, "B C N H"],
        cached: LayerCache,
        starts: Int[Array, " B"],
        begins: Int[Array, " B"],
        with_logits: bool,
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"], Float[Array, "B K G S"] | None]:
        """`block` over the part's slots, each query's logsumexp, and if asked for the first query's logits."""

        def row(q: Array, keys: Array, values: Array, start: Array, begin: Array) -> tuple[Array, Array]:
            out, lse = reference.chunk_part(q[None], keys[None], values[None], start[None], begin)
            return out[0], lse[0]

        out, normaliser = jax.vmap(row)(q, cached.keys, cached.values, starts, begins)
        if not with_logits:
            return out, normaliser, None
        visible = cache.visible(starts, begins + 1, cached.capacity)
        return out, normaliser, reference.masked_logits(q[:, 0], cached.keys, visible[:, None])

    # --- a block of drafted tokens (`lossless.py`)

    def block(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], begins: Int[Array, " B"]
    ) -> Float[Array, "B C N H"]:
        """Causal attention of C queries, row b's first in slot `begins[b]`, over the cache that holds their keys."""
        return Implementation.block_part(self, q, cached, starts, begins, with_logits=False)[0].astype(q.dtype)

    def block_with_scores(
        self, q: Float[Array, "B C N H"], cached: LayerCache, starts: Int[Array, " B"], begins: Int[Array, " B"]
    ) -> tuple[Float[Array, "B C N H"], Float[Array, "B K S"]]:
        """`block`, and the score of each slot that the first query sees: its log-probability, the maximum over the group's
        heads."""
        logits: Any
        out, _, logits = Implementation.block_part(self, q, cached, starts, begins, with_logits=True)
        return out.astype(q.dtype), selection.group_maximum(reference.log_softmax(logits))

    # --- a decode step, full or partial

    def decoder_layers(self, config: LlamaConfig, rows: int, dtype: Any, width: int = 1) -> Callable[..., Any] | None:
        """What replaces the model's stack of decoder layers (`model.DecoderLayers`) in a decode step of `rows` rows of
        `width` tokens; None keeps the model's own."""
        return None

    # --- kept sets (`kept.py`)

    def keep(
        self, layers: Sequence[LayerCache], scores: Sequence[Float[Array, "B K S"]], budget: int, ordered: int
    ) -> list[Any]:
        """For each layer the kept set of its `budget` best slots by score, ties to the lower slot; slots of score -inf
        are not kept. At least the last `ordered` entries, and the last one, are in exact rank order. All layers are
        chosen at once: the selection of one layer is too little work for an accelerator, and takes as long to
        compile."""
        return [self.kept_set(slots) for slots in self.best_slots(jnp.stack(scores), budget, ordered)]

    def best_slots(self, scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
        """The slots that `keep` keeps of each layer, -1 for none. With `ordered` = 0 equal scores may be in the order of
        their slots, instead of in rank order."""
        return selection.top_slots(scores, budget)

    def first_slots(self, cached: LayerCache, starts: Int[Array, " B"], count: int) -> Any:
        """The kept set of each row's first `count` slots, whether written yet or not, the first ranked best."""
        entries = jnp.arange(max(1, min(count, cached.capacity)), dtype=jnp.int32)
        slots = jnp.where(entries < count, starts[:, None] + entries, -1)  # one entry at least, for the kernels
        return self.kept_set(jnp.broadcast_to(slots[:, None], (*cached.keys.shape[:2], entries.size)))
