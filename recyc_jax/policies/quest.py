"""Quest (Tang et al., https://arxiv.org/abs/2406.10774): at every step, the pages whose keys could match the query best.

A page is 16 consecutive tokens, of which the smallest and the largest number in each coordinate of the keys are kept. A
query's product with any key of the page is at most the sum over coordinates of the larger of its products with these
two, and the pages with the highest such bounds are read.

Deviations from the publication: each key/value head reads one set of pages, chosen by the largest bound over its query
heads (as the recycled-attention paper does for all methods; the publication's models have no groups); the page of the
new token is always read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from recyc_jax.attention import reference
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache, Leaf
from recyc_jax.policies.base import Attended, Caches, Policy, PromptStats, Step
from recyc_jax.validation import whole_number


@flax.struct.dataclass
class Pages:
    """The bounds of one layer's keys. Page p of a row holds its tokens from `p * page` on; P pages, H head dim."""

    low: Leaf  # [B, K, P, H]: the smallest number of each coordinate; infinity in a page without tokens
    high: Leaf  # [B, K, P, H]: the largest; minus infinity in a page without tokens


@dataclasses.dataclass(frozen=True)
class Quest(Policy):
    """Attention to the `budget // page` pages of `page` tokens with the highest bounds on this step's attention logits,
    the new token's page among them; in the first `dense_layers` layers to every token, as published.

    A step also reads two keys per page to compute the bounds: as many bytes as `tokens / page` cached tokens, each of
    which is a key and a value. Steps of the dense layers count as full steps."""

    method: ClassVar[str] = "quest"

    budget: int
    page: int = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        for name, least in (("page", 1), ("budget", 1), ("dense_layers", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        if self.budget < self.page:
            raise ValueError(f"budget={self.budget} must be at least page={self.page}: whole pages are read")

    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[Any, ...]:
        starts = jnp.argmax(caches.visible, axis=1).astype(jnp.int32)
        return tuple(
            None if layer < self.dense_layers else self._bounds(cached, starts, caches)
            for layer, cached in enumerate(caches.layers)
        )

    def _bounds(self, cached: LayerCache, starts: Array, caches: Caches) -> Pages:
        """The bounds of the keys written so far. A row's pages begin at its first token, wherever that lies in the
        cache, so that its result does not depend on the padding."""
        pages = -(-cached.capacity // self.page)
        token = jnp.arange(pages * self.page, dtype=jnp.int32)
        slots = jnp.minimum(starts[:, None] + token, cached.capacity - 1)
        keys = jnp.take_along_axis(cached.keys, slots[:, None, :, None], axis=2)
        keys = keys.reshape(*keys.shape[:2], pages, self.page, keys.shape[3])
        written = (token < caches.length - starts[:, None]).reshape(-1, 1, pages, self.page, 1)
        return Pages(
            jnp.min(jnp.where(written, keys, jnp.inf), axis=3), jnp.max(jnp.where(written, keys, -jnp.inf), axis=3)
        )

    def partial_step(self, attention: Implementation, step: Step, state: Pages | None) -> Attended:
        """Rank the pages by their bounds, then attend to the best ones."""
        if state is None:
            out = attention.full(step.q, step.cached, step.visible)
            return Attended(out, None, full=jnp.ones_like(step.done))
        newest = (step.length - 1 - step.starts) // self.page
        state = self._with_newest_key(step, state, newest)
        bounds = _highest_logits(step.q, state)
        number = jnp.arange(bounds.shape[2], dtype=jnp.int32)
        bounds = jnp.where(number == newest[:, None, None], jnp.inf, bounds)
        best, pages = lax.top_k(bounds, min(self.budget // self.page, bounds.shape[2]))
        slots = step.starts[:, None, None, None] + pages[..., None] * self.page + jnp.arange(self.page)
        slots = jnp.where((slots < step.length) & (best[..., None] > -jnp.inf), slots, -1).astype(jnp.int32)
        slots = slots.reshape(*slots.shape[:2], -1)
        out, _ = reference.selected(step.q, step.cached.keys, step.cached.values, slots)
        return Attended(out, state, full=jnp.zeros_like(step.done))

    def _with_newest_key(self, step: Step, state: Pages, page: Array) -> Pages:
        key = lax.dynamic_index_in_dim(step.cached.keys, step.length - 1, axis=2)
        here = jnp.arange(state.low.shape[2], dtype=jnp.int32)[:, None] == page[:, None, None, None]
        return Pages(
            jnp.where(here, jnp.minimum(state.low, key), state.low),
            jnp.where(here, jnp.maximum(state.high, key), state.high),
        )


def _highest_logits(q: Float[Array, "B N H"], state: Pages) -> Float[Array, "B K P"]:
    """An upper bound on the unscaled attention logits of each page's keys, the largest over the group's query heads;
    minus infinity for a page without tokens."""
    batch, kv_heads, _, dim = state.low.shape
    grouped = q.reshape(batch, kv_heads, -1, dim)
    has_tokens = state.low[..., 0] < jnp.inf
    low, high = (jnp.where(has_tokens[..., None], side, 0) for side in (state.low, state.high))
    above = jnp.einsum("bkgh,bkph->bkgp", jnp.maximum(grouped, 0), high, preferred_element_type=jnp.float32)
    below = jnp.einsum("bkgh,bkph->bkgp", jnp.minimum(grouped, 0), low, preferred_element_type=jnp.float32)
    return jnp.where(has_tokens, jnp.max(above + below, axis=2), -jnp.inf)
