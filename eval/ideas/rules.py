"""Rules that lost: a decode step costs the same under each as under `RecycledAttention`. Their scores are in
docs/results/quality.md; the rule that won is part of that policy. Their policy strings start with `idea_`."""

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
from recyc_jax.policies.lookahead import Lookahead
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_parts import Noted, RecycledState, where_rows
from recyc_jax.policies.registry import MakePolicy, Options
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity


@dataclasses.dataclass(frozen=True)
class EarlyStride(FixedStride):
    """Full steps at steps 1, 2, 4 and 8, and at every `stride`-th step."""

    @property
    def period(self) -> int:
        return 1

    def due(self, step: Step, remembered: Any) -> Any:
        number = step.number
        early = (number == 1) | (number == 2) | (number == 4) | (number == 8)
        return jnp.broadcast_to(early | (number % self.stride == 0), step.done.shape)


@dataclasses.dataclass(frozen=True)
class LayerBudgets(RecycledAttention):
    """Budgets that decrease linearly from the first layer to the last (or increase, if `slope` is negative); their mean
    is `budget`."""

    slope: float = 0.5

    def chosen(self, attention: Implementation, scores: Any, states: Any, caches: Caches) -> Any:
        last = max(1, len(scores) - 1)
        shares = (1 + self.slope * (1 - 2 * layer / last) for layer in range(len(scores)))
        budgets = [max(1, round(self.budget * share)) for share in shares]
        return super().chosen(LayerByLayer(attention, budgets), scores, states, caches)


class LayerByLayer(Implementation):
    """An implementation that keeps a separate budget for each layer."""

    def __init__(self, attention: Implementation, budgets: list[int]) -> None:
        self.attention, self.budgets = attention, budgets

    def keep(self, layers: Any, scores: Any, budget: int, ordered: int) -> list[Any]:
        return [
            kept
            for cached, layer_scores, own in zip(layers, scores, self.budgets, strict=True)
            for kept in self.attention.keep([cached], [layer_scores], own, ordered)
        ]


@dataclasses.dataclass(frozen=True)
class GroupMean(RecycledAttention):
    """At full steps, scores are the mean of the probabilities over a group's query heads instead of the maximum."""

    def full_step(self, attention: Implementation, step: Step, state: Any, rows: Any = None) -> Attended:
        return super().full_step(MeanOverGroups(attention), step, state, rows)


class MeanOverGroups(Implementation):
    """An implementation that returns one log-probability per group: that of the mean probability."""

    def __init__(self, attention: Implementation) -> None:
        self.attention = attention

    def full_with_log_probabilities(self, *arguments: Any) -> tuple[Any, Any]:
        out, log_probabilities = self.attention.full_with_log_probabilities(*arguments)
        mean = jnp.mean(jnp.exp(log_probabilities), axis=2, keepdims=True)
        return out, jnp.log(jnp.maximum(mean, 1e-37))


def _early(options: Options) -> RecycledAttention:
    schedule, lookahead = EarlyStride(options.schedule().period), options.lookahead()
    if lookahead == "auto":
        lookahead = schedule.stride - 1
    return RecycledAttention(options.budget(), schedule, options.integer("pool", 7), lookahead)


def _layers(options: Options) -> RecycledAttention:
    slope = float(options.text_of("slope") or 0.5)
    rest = options.budget(), options.schedule(), options.integer("pool", 7), options.lookahead()
    return LayerBudgets(*rest, slope=slope)


def _mean(options: Options) -> RecycledAttention:
    return GroupMean(options.budget(), options.schedule(), options.integer("pool", 7), options.lookahead())


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
    """Look-ahead with remembered scores, and options."""

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


@flax.struct.dataclass
class Watched:
    base: Any  # RecycledState
    wait: Any  # int32 [B]: steps from the last refresh to the next


@dataclasses.dataclass(frozen=True)
class ByCoverage(Policy):
    """Look-ahead with remembered scores, refreshed when the kept set covers less: each layer of each row doubles its
    interval at a full step whose attention the kept set covered to at least `goal`, and halves it below; intervals
    lie between `stride` and `longest`."""

    rule: RecycledAttention
    goal: float = 0.9
    longest: int = 80

    @property
    def period(self) -> int | None:
        return self.rule.period

    @property
    def needs(self) -> PromptNeeds:
        return self.rule.needs

    def start(self, attention: Implementation, prompt: Any, caches: Caches) -> Any:
        states = self.rule.start(attention, prompt, caches)
        wait = jnp.full(caches.visible.shape[0], self.rule.period, jnp.int32)
        return tuple(Watched(state, wait) for state in states)

    def partial_step(self, attention: Implementation, step: Step, state: Watched) -> Attended:
        seen = self.rule.partial_step(attention, step, state.base)
        return seen._replace(state=Watched(seen.state, state.wait))

    def deciding_step(self, attention: Implementation, step: Step, state: Watched) -> Attended:
        due = (step.length - state.base.since >= state.wait) & ~step.done
        full = self.rule.full_step(attention, step, state.base)
        partial = self.rule.partial_step(attention, step, state.base)
        slots = state.base.kept.slots
        new = jnp.arange(step.cached.capacity)[None] >= state.base.since[:, None]
        scores = jnp.where(step.visible[:, None], full.noted.scores, -jnp.inf)
        total = jnp.sum(jnp.exp(scores), axis=-1)
        held = jnp.take_along_axis(scores, jnp.maximum(slots, 0), axis=2)
        held = jnp.sum(jnp.where(slots >= 0, jnp.exp(held), 0), axis=-1)
        held = held + jnp.sum(jnp.where(new[:, None], jnp.exp(scores), 0), axis=-1)
        covered = jnp.mean(jnp.minimum(held / total, 1), axis=1)  # over the layer's heads
        wait = jnp.where(covered >= self.goal, 2 * state.wait, state.wait // 2)
        wait = jnp.where(due, jnp.clip(wait, self.rule.period, self.longest), state.wait)
        attended = where_rows(due, full._replace(noted=None), partial._replace(noted=None))
        noted = Noted(jnp.where(due[:, None, None], full.noted.scores, -jnp.inf), due)
        return attended._replace(state=Watched(attended.state, wait), noted=noted)

    def refresh(self, attention: Implementation, states: Any, noted: Any, caches: Caches) -> Any:
        fresh = self.rule.chosen(attention, [one.scores for one in noted], [one.base for one in states], caches)
        return tuple(
            Watched(where_rows(one.rows, new, old.base), old.wait)
            for one, new, old in zip(noted, fresh, states, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class ByShare(Policy):
    """`Lookahead` that takes a full step, in each layer and row, where the token that stands for the rest takes more
    than `goal` of the softmax (the mean over heads); decided every `check_every` steps, and `rule.stride` steps after
    the last at the latest."""

    rule: Lookahead
    check_every: int
    goal: float

    @property
    def period(self) -> int:
        return self.check_every

    @property
    def needs(self) -> PromptNeeds:
        return self.rule.needs

    def start(self, attention: Implementation, prompt: Any, caches: Caches) -> Any:
        return self.rule.start(attention, prompt, caches)

    def partial_step(self, attention: Implementation, step: Step, state: Any) -> Attended:
        return self.rule.partial_step(attention, step, state)

    def deciding_step(self, attention: Implementation, step: Step, state: Any) -> Attended:
        kept, reads = self.rule.reads(attention, step, state)
        share = state.remainder.share(step.q, kept.moments(step.q, step.cached, reads))
        late = step.length - state.recycled.since > self.rule.stride - self.check_every
        due = ((jnp.mean(share, axis=(1, 2)) > self.goal) | late) & ~step.done
        full, partial = self.rule.deciding_step(attention, step, state), self.rule.partial_step(attention, step, state)
        return where_rows(due, full._replace(noted=None), partial._replace(noted=None))._replace(
            noted=(full.noted, due)
        )

    def refresh(self, attention: Implementation, states: Any, noted: Any, caches: Caches) -> Any:
        fresh = self.rule.refresh(attention, states, [full for full, _ in noted], caches)
        return tuple(where_rows(due, new, old) for (_, due), new, old in zip(noted, fresh, states, strict=True))


def _share(options: Options) -> ByShare:
    longest = options.integer("longest", 100)
    rule = Lookahead(options.budget(), longest, options.lookahead(24))
    return ByShare(rule, options.integer("check_every"), float(options.text_of("goal") or 0.3))


def _rule(options: Options) -> RecycledAttention:
    return RecycledAttention(
        options.budget(),
        options.schedule(),
        options.integer("pool", 7),
        options.lookahead(),
        window=options.integer("window", 32),
        decay=options.optional_number("decay"),
    )


def _combined(options: Options) -> Combined:
    rule = _rule(options)
    return Combined(
        rule,
        options.optional_number("anchor"),
        float(options.text_of("slope") or 0),
        options.integer("vote", 1),
        options.truth("sum", False),
        options.truth("head", False),
        options.integer("shared", 0),
        float(options.text_of("reserve") or 0),
        options.integer("reach", 48),
        options.text_of("tail") or "",
    )


def _coverage(options: Options) -> ByCoverage:
    rule = _rule(options)
    rule = dataclasses.replace(rule, schedule=QuerySimilarity(rule.schedule.period, 1.0))
    return ByCoverage(rule, float(options.text_of("goal") or 0.9), options.integer("longest", 80))


IDEAS: dict[str, MakePolicy] = {
    "idea_early": _early,
    "idea_layers": _layers,
    "idea_mean": _mean,
    "idea_combined": _combined,
    "idea_coverage": _coverage,
    "idea_share": _share,
}
