"""Ways to choose and represent tokens, compared on top of look-ahead and memory (docs/results/lookahead.md). Of these,
`tail=first` won: it is the remainder of `recyc_jax/policies/lookahead.py`, in plain JAX and without a subtraction."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from recyc_jax.attention import reference, selection
from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Policy, PromptNeeds, Step
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_parts import RecycledState
from recyc_jax.policies.registry import Options


@flax.struct.dataclass
class Tail:
    """What the tokens outside of the kept set add to attention, under the query of the last full step."""

    q: Any  # float32 [B, K, G, H]: that query
    lse: Any  # [B, K, G]: log of the sum of their exponentiated logits
    key: Any  # [B, K, G, H]: their mean key, weighted by attention
    value: Any  # [B, K, G, H]: their mean value, likewise
    share: Any  # [B, K, G]: their probability


@flax.struct.dataclass
class Kept:
    """`RecycledState` with what these rules keep besides."""

    base: Any  # RecycledState
    prompt: Any  # float32 [B, K, S]: the scores under the prompt's window, or None
    reserved: Any  # bool [B, K, S]: slots that are always kept, or None
    queries: Any  # [B, W, N, H]: the queries of the last W tokens, or None
    tail: Any  # Tail, or None


class FullStep(NamedTuple):
    """What `refresh` needs of a full step."""

    scores: Any  # [B, K, S]
    q: Any  # [B, N, H]
    log_probabilities: Any  # [B, K, G, S]
    lse: Any  # [B, K, G]


@dataclasses.dataclass(frozen=True)
class Combined(Policy):
    """Look-ahead with remembered scores, and one or more of these options."""

    rule: RecycledAttention
    anchor: float | None = None  # nats below which the prompt window's scores never fall
    slope: float = 0.0  # nats that look-ahead loses per token
    vote: int = 1  # queries that a refresh asks
    by_sum: bool = False  # memory adds probabilities instead of taking the maximum
    by_head: bool = False  # look-ahead or not, by which would have covered more
    shared: int = 0  # budgets over heads by one ranking, up to this multiple of the budget
    reserve: float = 0.0  # share of the budget for what the prompt's window attended to
    reach: int = 48  # look-ahead of the reserved slots
    tail: str = ""  # first, zero or share: how the tokens outside of the kept set are estimated

    @property
    def period(self) -> int | None:
        return self.rule.period

    @property
    def needs(self) -> PromptNeeds:
        return self.rule.needs | PromptNeeds(query=True)

    def start(self, attention: Implementation, prompt: Any, caches: Caches) -> Any:
        scores = [layer.scores[self.rule.window] for layer in prompt]
        states, noted = [], []
        starts = jnp.argmax(caches.visible, axis=1).astype(jnp.int32)
        for layer, one, cached in zip(prompt, scores, caches.layers, strict=True):
            batch = one.shape[0]
            queries = None
            if self.vote > 1:
                queries = jnp.broadcast_to(layer.q[:, None], (batch, self.vote, *layer.q.shape[1:]))
            reserved = None
            if self.reserve:
                pooled = selection.pool(one, caches.visible, self.rule.pool, self.reach)
                best = lax.top_k(pooled, int(self.reserve * self.rule.budget))[0][..., -1:]
                reserved = pooled >= best
            anchor = None if self.anchor is None else one
            states.append(Kept(RecycledState(None, None, None), anchor, reserved, queries, None))
            step = Step(layer.q, None, cached, starts, caches.length, jnp.int32(0), starts < 0)
            noted.append(
                self._full(attention, step)[1]._replace(scores=one) if self.tail else FullStep(one, *[None] * 3)
            )
        return self._chosen(attention, noted, states, caches)

    def _full(self, attention: Implementation, step: Step) -> Any:
        out, log_probabilities = attention.full_with_log_probabilities(step.q, step.cached, step.visible)
        log_probabilities = jnp.where(step.visible[:, None, None], log_probabilities, -jnp.inf)
        newest = lax.dynamic_index_in_dim(log_probabilities, step.length - 1, axis=3, keepdims=False)
        lse = _newest_logit(step) - newest
        return out, FullStep(selection.group_maximum(log_probabilities), step.q, log_probabilities, lse)

    def partial_step(self, attention: Implementation, step: Step, state: Kept) -> Attended:
        after = dataclasses.replace(state, queries=self._asked(step, state))
        kept, reads = self.rule.reads(attention, step, state.base)
        nothing = jnp.zeros_like(step.done)
        if state.tail is None:
            return Attended(kept.attend(step.q, step.cached, reads), after, full=nothing)
        out, _, of_new = kept.attend_with_log_probabilities(step.q, step.cached, reads)
        tail = state.tail
        lse = _newest_logit(step) - of_new[..., -1]
        q = step.q.reshape(tail.q.shape).astype(jnp.float32)
        if self.tail == "share":
            share = tail.share
        else:
            of_tail = tail.lse
            if self.tail == "first":
                of_tail = of_tail + jnp.sum((q - tail.q) * tail.key, axis=-1) * q.shape[-1] ** -0.5
            share = jax.nn.sigmoid(of_tail - lse)
        mixed = out.reshape(q.shape) * (1 - share[..., None]) + tail.value * share[..., None]
        return Attended(mixed.astype(out.dtype).reshape(out.shape), after, full=nothing)

    def _asked(self, step: Step, state: Kept) -> Any:
        if state.queries is None:
            return None
        return jnp.concatenate([state.queries[:, 1:], step.q[:, None]], axis=1)

    def deciding_step(self, attention: Implementation, step: Step, state: Kept) -> Attended:
        out, noted = self._full(attention, step)
        queries = self._asked(step, state)
        if queries is not None:
            noted = noted._replace(scores=attention.window_scores(queries, step.cached, step.starts, step.length))
        if not self.tail:
            noted = FullStep(noted.scores, None, None, None)
        state = dataclasses.replace(state, queries=queries)
        return Attended(out, state, full=jnp.ones_like(step.done), noted=noted)

    def refresh(self, attention: Implementation, states: Any, noted: Any, caches: Caches) -> Any:
        return self._chosen(attention, noted, states, caches)

    def _chosen(self, attention: Implementation, noted: Any, states: Any, caches: Caches) -> Any:
        rule = self.rule
        ahead = rule.period - 1 if rule.lookahead == "auto" else rule.lookahead
        remembered, pooled_scores = [], []
        for one, state in zip(noted, states, strict=True):
            before, now = state.base.scores, one.scores
            chosen_by = now
            if before is not None:
                if self.by_sum:
                    chosen_by = jnp.logaddexp(now, before - rule.decay)
                elif rule.decay is not None:
                    chosen_by = jnp.maximum(now, before - rule.decay)
            if state.prompt is not None:
                chosen_by = jnp.maximum(chosen_by, state.prompt - self.anchor)
            remembered.append(chosen_by if rule.decay is not None else None)
            pooled = self._pooled(chosen_by, caches, ahead)
            if self.by_head and before is not None:
                narrow = selection.pool(chosen_by, caches.visible, rule.pool, 0)
                covered = []
                for way in (self._pooled(before, caches, ahead), selection.pool(before, caches.visible, rule.pool, 0)):
                    threshold = lax.top_k(way, rule.budget)[0][..., -1:]
                    mass = jnp.where((way >= threshold) & caches.visible[:, None], jnp.exp(now), 0)
                    covered.append(jnp.sum(mass, axis=-1, keepdims=True))
                pooled = jnp.where(covered[0] >= covered[1], pooled, narrow)
            if state.reserved is not None:
                pooled = jnp.where(state.reserved & caches.visible[:, None], pooled + 1000, pooled)
            pooled_scores.append(pooled)
        if self.shared:
            kept = self._shared(attention, pooled_scores)
        else:
            kept = attention.keep(caches.layers, pooled_scores, rule.budget, min(rule.max_interval, caches.steps))
        since = jnp.broadcast_to(caches.length, caches.visible.shape[:1])
        return tuple(
            dataclasses.replace(
                state,
                base=RecycledState(one, since, None, past),
                tail=self._tail(full, one, cached) if self.tail else None,
            )
            for one, state, past, full, cached in zip(kept, states, remembered, noted, caches.layers, strict=True)
        )

    def _tail(self, full: FullStep, kept: Any, cached: Any) -> Tail:
        batch, kv_heads, capacity = full.scores.shape
        slots = kept.slots
        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[None, :, None]
        is_kept = jnp.zeros((batch, kv_heads, capacity + 1), bool)
        is_kept = is_kept.at[rows, heads, jnp.where(slots >= 0, slots, capacity)].set(True)[..., :-1]
        weights = jnp.where(is_kept[:, :, None], 0, jnp.exp(full.log_probabilities))
        share = jnp.maximum(jnp.sum(weights, axis=-1), 1e-9)
        weights = (weights / share[..., None]).astype(cached.keys.dtype)
        key, value = (
            jnp.einsum("bkgs,bksh->bkgh", weights, side, preferred_element_type=jnp.float32)
            for side in (cached.keys, cached.values)
        )
        q = full.q.reshape(key.shape).astype(jnp.float32)
        return Tail(q, full.lse + jnp.log(share), key, value, share)

    def _pooled(self, scores: Any, caches: Caches, ahead: int) -> Any:
        if not self.slope:
            return selection.pool(scores, caches.visible, self.rule.pool, ahead)
        centred = selection.pool(scores, caches.visible, self.rule.pool, 0)
        pooled, reach = centred, 1
        while reach <= ahead:  # by doubling
            moved = jnp.pad(pooled, ((0, 0), (0, 0), (reach, 0)), constant_values=-jnp.inf)[..., : pooled.shape[-1]]
            pooled, reach = jnp.maximum(pooled, moved - self.slope * reach), 2 * reach
        return jnp.where(caches.visible[:, None], pooled, -jnp.inf)

    def _shared(self, attention: Implementation, pooled: Any) -> Any:
        """Budgets by one ranking of all heads and layers of a row, from a quarter of the budget on."""
        budget, layers = self.rule.budget, len(pooled)
        most, least = min(self.shared * budget, pooled[0].shape[-1]), budget // 4
        best, slots = lax.top_k(jnp.stack(pooled), most)  # [L, B, K, most]
        rows = best.transpose(1, 0, 2, 3).reshape(best.shape[1], -1)
        threshold = lax.top_k(rows, layers * best.shape[2] * budget)[0][:, -1]
        rank = jnp.arange(most)
        keep = ((best >= threshold[None, :, None, None]) | (rank < least)) & (best > -jnp.inf)
        slots = jnp.where(keep, slots, -1).astype(jnp.int32)
        return [attention.kept_set(one) for one in slots]


def _newest_logit(step: Step) -> Any:
    """The logit [B, K, G] of the newest token."""
    key = lax.dynamic_index_in_dim(step.cached.keys, step.length - 1, axis=2)
    return reference.masked_logits(step.q, key, jnp.ones((key.shape[0], 1, 1), bool))[..., 0]


def combined(options: Options) -> Combined:
    """The policy of `idea_combined:...`."""
    rule = RecycledAttention(
        options.budget(),
        options.schedule(),
        options.integer("pool", 7),
        options.lookahead(),
        window=options.integer("window", 32),
        decay=options.optional_number("decay"),
    )
    tail = options.text_of("tail")
    if tail not in (None, "first", "zero", "share"):
        raise ValueError(f"tail={tail} is unknown; there is first, zero, share")
    return Combined(
        rule,
        options.optional_number("anchor"),
        options.number("slope", 0.0),
        options.integer("vote", 1),
        options.truth("sum", False),
        options.truth("head", False),
        options.integer("shared", 0),
        options.number("reserve", 0.0),
        options.integer("reach", 48),
        tail or "",
    )
