"""The loop of lossless decoding (`policies/lossless.py`). Rows go on by different numbers of tokens, so each has a
length of its own in the cache; slots behind it hold what was rejected, and are written again.

lax.while_loop, until all rows have their tokens or have ended:
    lax.switch over the lengths of a draft (none, half, whole), by the share of drafts that were kept lately:
        lax.scan of draft steps: partial attention to the kept set, as in `generation_loop.py`
        one pass of full attention over the pending token and the drafts, which overwrites their keys and values and
            scores the cache by its first query, which is never rejected: the kept set of the next draft
        row by row, the drafts that full attention would have chosen, and the token after them

Greedy: a draft is kept where it is the most likely token of the pass. Samples (Leviathan et al., 2022): a draft of
probability q is kept with probability min(1, p / q), otherwise a token is drawn from max(p - q, 0); p and q are those after
processors and restrictions, so the text is distributed as full attention's."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from recyc_jax import model
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import KVCache, LayerCache, Leaf, visible
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Heads, Params
from recyc_jax.policies.base import Caches, Step
from recyc_jax.policies.lossless import Lossless
from recyc_jax.policies.recycled_parts import Noted
from recyc_jax.prefilling import Prefilled
from recyc_jax.sampling import Chain, Greedy, Sample, independent

DRAFTED, KEPT, REDRAWN = 1, 2, 3
"""What a row's key is folded with for the draws of one token."""
MEMORY = 0.8
"""What a round keeps of the share of drafts that were kept before it."""
PROBE = 64
"""Rounds without drafts after which a short one is tried."""
BENEFIT = 0.85
"""The share of drafts that such a trial assumes to be kept: a bad one ends it, a good one makes others follow."""
PASS_COST = 1.1
"""What a pass over a block costs, in full steps."""
OVERHEAD = 2**27
"""Bytes that could be read in the time that a layer takes beside reading: 33 us on an H200, as measured for 8B and 0.5B
shapes (docs/results/lossless.md)."""


@flax.struct.dataclass
class Pace:
    """By what the length of the next draft is chosen."""

    rate: Leaf  # float32 []: the share of drafts that are kept where the ones before them were
    waited: Leaf  # int32 []: rounds since the last draft
    stale: Leaf  # bool []: the kept sets are not of the last round


@flax.struct.dataclass
class LosslessState:
    """The carry of the loop."""

    layers: tuple[LayerCache, ...]
    ends: Leaf  # int32 [B]: slots that hold verified tokens
    policy_states: tuple[Any, ...]
    pace: Pace
    token: Leaf  # int32 [B]: chosen, not yet fed
    made: Leaf  # int32 [B]: tokens of this call
    lengths: Leaf  # int32 [B]: tokens of the answer
    done: Leaf  # bool [B]
    output: Any  # [B, M], one array or more
    passes: Leaf  # int32 [B]: passes of full attention
    drafted: Leaf  # int32 [B]
    accepted: Leaf  # int32 [B]
    of_chain: Any  # the processors' states
    recent: Leaf  # int32 [B, n]: the last tokens, for stop sequences


@dataclasses.dataclass(frozen=True)
class Ends:
    """What ends a row."""

    eos_ids: tuple[int, ...]
    stops: tuple[tuple[int, ...], ...]

    def after(self, token: Array, recent: Array) -> Array:
        """Whether a row ends with this token; `recent` includes it."""
        done = jnp.zeros(token.shape, jnp.bool_)
        for eos in self.eos_ids:
            done = done | (token == eos)
        for one in self.stops:
            done = done | jnp.all(recent[:, recent.shape[1] - len(one) :] == jnp.asarray(one, jnp.int32), axis=1)
        return done


def check(config: LlamaConfig, chained: Chain, attention: Implementation) -> None:
    """Raise ValueError for models, samplers and implementations that cannot be drafted for."""
    if attention.slots_last:
        raise ValueError(
            "draft=... is not there for a TPU's kernels, whose kept sets know one length for all rows: pass"
            " implementation='reference'"
        )
    if len(config.full_layers) < config.num_hidden_layers:
        raise ValueError("draft=... needs a model without sliding windows: rejected drafts would overwrite their rings")
    if not isinstance(chained.sampler, Greedy | Sample):
        raise ValueError(
            "draft=... needs Greedy() or Sample(...): a function of one's own does not tell its distribution"
        )


def lengths_of_drafts(policy: Lossless) -> tuple[int, ...]:
    """The set that the length of a draft is chosen from, besides none."""
    return tuple(sorted({max(1, policy.draft_length // 2), policy.draft_length}))


def begin(
    attention: Implementation, policy: Lossless, state: Prefilled, output: Any, of_chain: Any, recent: Array
) -> LosslessState:
    """The carry before the first token of a call, after prompts or in the middle of an answer."""
    before, cache, rows = state.answer, state.cache, state.cache.starts.shape[0]
    zeros = jnp.zeros(rows, jnp.int32)
    counts = dict(output=output, passes=zeros, drafted=zeros, accepted=zeros, made=zeros)
    if before is None:
        caches = Caches(cache.full_layers, cache.visible, cache.length, policy.most_steps)
        pace = Pace(jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.bool_))
        return LosslessState(
            layers=cache.layers,
            ends=jnp.broadcast_to(cache.length, (rows,)),
            policy_states=tuple(policy.start(attention, state.stats, caches)),
            pace=pace,
            token=zeros,
            lengths=zeros,
            done=zeros > 0,
            of_chain=of_chain,
            recent=recent,
            **counts,
        )
    *policy_states, pace = before.policy_states
    return LosslessState(
        layers=cache.layers,
        ends=before.prompt_length + before.step,
        policy_states=tuple(policy_states),
        pace=pace,
        token=before.token,
        lengths=before.lengths,
        done=before.done,
        of_chain=before.sampling[0],
        recent=before.sampling[1],
        **counts,
    )


class Loop:
    """The parts of the loop, which share what does not change in it."""

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        attention: Implementation,
        policy: Lossless,
        state: Prefilled,
        chained: Chain,
        keys: Any,
        ends: Ends,
        record: Any,
        limit: Int[Array, " B"],
    ) -> None:
        self.params, self.config, self.attention, self.policy = params, config, attention, policy
        self.starts, self.row_lengths = state.cache.starts, state.row_lengths
        self.chained, self.keys, self.ends, self.record, self.limit = chained, keys, ends, record, limit

    def run(self, carry: LosslessState, rounds: int | None) -> LosslessState:
        """The carry once every row has `limit` tokens in its answer or has ended; or after so many rounds."""

        def unfinished(carry: LosslessState) -> Array:
            return jnp.any(self.active(carry))

        def one(carry: LosslessState, _: None) -> tuple[LosslessState, None]:
            return lax.cond(unfinished(carry), self.round, lambda carry: carry, carry), None

        if rounds is not None:
            return lax.scan(one, carry, length=rounds)[0]
        return lax.while_loop(unfinished, self.round, carry)

    def first(self, carry: LosslessState, logits: Array) -> LosslessState:
        """The carry with the first token chosen, from prefill's logits."""
        carry, _ = self._chosen(carry, logits, self.active(carry), None)
        return carry

    def active(self, carry: LosslessState) -> Array:
        """Rows that need more tokens."""
        return ~carry.done & (carry.lengths < self.limit)

    # --- a round

    def round(self, carry: LosslessState) -> LosslessState:
        """Draft, verify, choose."""
        lengths = lengths_of_drafts(self.policy)
        kind, pace = self._next_kind(carry.pace, carry.ends, lengths)
        branches = [lambda carry: self._round_of(carry, 0, False), lambda carry: self._round_of(carry, 0, True)]
        branches += [lambda carry, length=length: self._round_of(carry, length, True) for length in lengths]
        return lax.switch(kind, branches, dataclasses.replace(carry, pace=pace))

    def _next_kind(self, pace: Pace, ends: Array, lengths: tuple[int, ...]) -> tuple[Array, Pace]:
        """The branch of the next round: the length of a draft with the most tokens per time, none where drafts do not pay;
        before drafts from an old kept set, one full step that makes a new one."""
        if not self.policy.adapt:
            return jnp.asarray(len(lengths) + 1, jnp.int32), pace
        rate = jnp.clip(pace.rate, 0.0, 0.999)
        share = self._draft_cost(ends)
        gains = [jnp.ones((), jnp.float32)]
        for length in lengths:
            gains.append((1 - rate ** (length + 1)) / (1 - rate) / (PASS_COST + length * share))
        best = jnp.argmax(jnp.stack(gains)).astype(jnp.int32)
        probes = (best == 0) & (pace.waited >= PROBE)
        best = jnp.where(probes, 1, best)
        kind = jnp.where(best == 0, 0, jnp.where(pace.stale, 1, best + 1))
        waited = jnp.where(best == 0, pace.waited + 1, jnp.where(kind == 1, pace.waited, 0))
        rate = jnp.where(probes & (kind != 1), jnp.maximum(pace.rate, BENEFIT), pace.rate)
        return kind, Pace(rate, waited, kind == 0)

    def _draft_cost(self, ends: Array) -> Array:
        """What a draft step costs, in full steps: by the bytes that each reads, and what layers take beside that."""
        weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))
        c = self.config
        token = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.params["embedding"].dtype.itemsize
        held = (ends - self.starts).astype(jnp.float32)
        few = jnp.sum(jnp.minimum(held, self.policy.budget))
        fixed = float(weights + c.num_hidden_layers * OVERHEAD)  # more than 32 bits hold
        return (fixed + token * few) / (fixed + token * jnp.sum(held))

    def _round_of(self, carry: LosslessState, length: int, refreshes: bool) -> LosslessState:
        carry, drafts, scores = self._drafted(carry, length)
        tokens = jnp.concatenate([carry.token[:, None], drafts], axis=1)
        logits, layers, policy_states = self._verified(carry, tokens, refreshes)
        carry = dataclasses.replace(carry, layers=layers, policy_states=policy_states)
        active = alive = self.active(carry)
        before, kept = carry.lengths, carry.accepted
        for place in range(length + 1):
            draft = None if place == length else (drafts[:, place], None if scores is None else scores[place])
            carry, alive = self._chosen(carry, logits[:, place], alive, draft)
        pace, kept = carry.pace, carry.accepted - kept
        if length:
            ended = jnp.sum(jnp.where(active & (kept < length) & ~carry.done, 1, 0))
            tried = jnp.sum(kept) + ended
            rate = jnp.where(tried > 0, jnp.sum(kept) / jnp.maximum(tried, 1), pace.rate).astype(jnp.float32)
            pace = dataclasses.replace(pace, rate=MEMORY * pace.rate + (1 - MEMORY) * rate)
        return dataclasses.replace(
            carry,
            ends=carry.ends + carry.lengths - before,
            pace=pace,
            passes=carry.passes + active.astype(jnp.int32),
            drafted=carry.drafted + jnp.where(active, length, 0),
        )

    def _drafted(self, carry: LosslessState, length: int) -> tuple[LosslessState, Array, Any]:
        """`length` drafts [B, length] of each row, and for samples the scores [length, B, V] that they were drawn by."""
        rows = carry.token.shape[0]
        if not length:
            return carry, jnp.zeros((rows, 0), jnp.int32), None
        done, policy, attention = ~self.active(carry), self.policy.drafter, self.attention

        def step(now: tuple[Any, Array, Any], number: Array) -> tuple[tuple[Any, Array, Any], Any]:
            layers, token, of_chain = now
            slots = carry.ends + number

            def read(layer: int, heads: Heads, cached: LayerCache, state: Any) -> tuple[Array, Any]:
                its = Step(heads.q[:, 0], heads.q_before_rope[:, 0], cached, self.starts, slots + 1, number + 1, done)
                return policy.partial_step(attention, its, state).out[:, None], state

            hidden, layers, _ = self._decoded(layers, token[:, None], slots, read, carry.policy_states)
            logits = model.logits(self.params, self.config, hidden[:, 0])
            place = (carry.lengths + number)[:, None]
            scores = self._scores(logits, of_chain, place)
            if isinstance(self.chained.sampler, Greedy):
                token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
                return (layers, token, self.chained.update(of_chain, token)), (token, None)
            token = jax.vmap(jax.random.categorical)(self._keys(place[:, 0], DRAFTED), scores).astype(jnp.int32)
            return (layers, token, self.chained.update(of_chain, token)), (token, scores)

        begun = carry.layers, carry.token, carry.of_chain
        (layers, _, _), (drafts, scores) = lax.scan(step, begun, jnp.arange(length, dtype=jnp.int32))
        return dataclasses.replace(carry, layers=layers), drafts.T, scores

    def _verified(
        self, carry: LosslessState, tokens: Array, refreshes: bool
    ) -> tuple[Array, tuple[LayerCache, ...], tuple[Any, ...]]:
        """Full attention's logits [B, T, V] after each of the tokens, the caches with its keys and values, and the kept
        sets by the first token's query."""

        def read(layer: int, heads: Heads, cached: LayerCache, state: Any) -> tuple[Array, Any]:
            if heads.q.shape[1] == 1 and not refreshes:
                seen = visible(self.starts, carry.ends + 1, cached.capacity)
                return self.attention.full(heads.q[:, 0], cached, seen)[:, None], None
            return self.attention.block(heads.q, cached, self.starts, carry.ends)

        states = carry.policy_states
        hidden, layers, scores = self._decoded(carry.layers, tokens, carry.ends, read, states)
        if refreshes:
            length = carry.ends + 1
            seen = visible(self.starts, length, layers[0].capacity)
            caches = Caches(layers, seen, length, self.policy.most_steps)
            noted = [Noted(one, None) for one in scores]
            states = tuple(self.policy.drafter.refresh(self.attention, states, noted, caches))
        return model.logits(self.params, self.config, hidden), layers, states

    def _decoded(
        self, layers: tuple[LayerCache, ...], tokens: Array, slots: Array, read: Any, states: tuple[Any, ...]
    ) -> tuple[Array, tuple[LayerCache, ...], tuple[Any, ...]]:
        """Hidden states of the tokens [B, T], row b's first in slot `slots[b]`; the caches, and what `read` hands on."""
        width = tokens.shape[1]
        positions = (slots - self.starts)[:, None] + jnp.arange(width, dtype=jnp.int32)
        attend = CachedAttention(slots, self.starts, self.attention, read)
        dtype = self.params["embedding"].dtype
        stack = self.attention.decoder_layers(self.config, tokens.shape[0], dtype, width)
        pairs = tuple(zip(layers, states, strict=True))
        hidden, pairs = model.hidden_states(
            self.params, self.config, tokens, positions, attend, pairs, self.row_lengths, stack
        )
        layers, handed = zip(*pairs, strict=True)
        return hidden, layers, handed

    # --- choosing

    def _keys(self, place: Array, use: int) -> Array:
        """A key for each row's token number `place` [B], and a use."""
        return jax.vmap(lambda key, at: jax.random.fold_in(jax.random.fold_in(key, at), use))(
            independent(self.keys), place
        )

    def _scores(self, logits: Array, of_chain: Any, place: Array) -> Array:
        """What tokens are chosen by: for samples the logits of their distribution. `place` [B, 1] numbers the token."""
        scores = self.chained.processed(logits, place, of_chain)
        sampler = self.chained.sampler
        return sampler.restricted(scores) if isinstance(sampler, Sample) else scores

    def _chosen(
        self, carry: LosslessState, logits: Array, alive: Array, draft: tuple[Array, Any] | None
    ) -> tuple[LosslessState, Array]:
        """The carry with the next token of the rows `alive`, and the rows whose next draft is still in question: those that
        have kept this one and need more."""
        place = carry.lengths[:, None]
        scores = self._scores(logits, carry.of_chain, place)
        is_kept = jnp.zeros_like(alive)
        if isinstance(self.chained.sampler, Greedy):
            token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            if draft is not None:
                is_kept = draft[0] == token
        else:
            wanted = jax.nn.softmax(scores, axis=-1)
            left = wanted
            if draft is not None:
                drafted = jax.nn.softmax(draft[1], axis=-1)
                p, q = (jnp.take_along_axis(one, draft[0][:, None], axis=1)[:, 0] for one in (wanted, drafted))
                uniform = jax.vmap(jax.random.uniform)(self._keys(place[:, 0], KEPT))
                is_kept = uniform * q < p
                left = jnp.maximum(wanted - drafted, 0)
            redrawn = jax.vmap(jax.random.categorical)(self._keys(place[:, 0], REDRAWN), jnp.log(left))
            token = redrawn.astype(jnp.int32)
            if draft is not None:
                token = jnp.where(is_kept, draft[0], token)
        row = jnp.arange(token.shape[0], dtype=jnp.int32)
        columns = jax.tree.leaves(carry.output)[0].shape[1]
        at = jnp.where(alive, carry.made, columns)  # beyond the last column nothing is written
        output = jax.tree.map(
            lambda kept, new: kept.at[row, at].set(new, mode="drop"), carry.output, self.record(logits, token)
        )

        def pick(new: Array, old: Array) -> Array:
            return jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        recent = pick(jnp.concatenate([carry.recent, token[:, None]], axis=1)[:, 1:], carry.recent)
        one = alive.astype(jnp.int32)
        after = dataclasses.replace(
            carry,
            token=pick(token, carry.token),
            made=carry.made + one,
            lengths=carry.lengths + one,
            done=carry.done | (alive & self.ends.after(token, recent)),
            output=output,
            accepted=carry.accepted + (alive & is_kept).astype(jnp.int32),
            of_chain=jax.tree.map(pick, self.chained.update(carry.of_chain, token), carry.of_chain),
            recent=recent,
        )
        return after, alive & is_kept & self.active(after)


def cache_of(carry: LosslessState, state: Prefilled) -> KVCache:
    """The cache as states hold it: what rows have beyond the prompts is known by their answers."""
    return dataclasses.replace(state.cache, layers=carry.layers)
