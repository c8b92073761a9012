"""The loop of lossless decoding (`policies/lossless.py`). Rows go on by different numbers of tokens, so each has a
length of its own in the cache; slots behind it hold what was rejected, and are written again.

lax.while_loop, until all rows have their tokens or have ended; each round is one of (lax.switch):
    where drafts do not pay: a few steps of full attention
    before drafts from an old kept set: one such step, which makes a new one
    drafts, verified:
        lax.while_loop of draft steps: partial attention to the kept set, as in `generation_loop.py`; until another draft
            would cost more time than it may give (`pacing.py`)
        one pass of full attention over the pending token and the drafts, which overwrites their keys and values; every
            `refresh_every` tokens it also scores the cache by its first query, which is never rejected, for the kept
            set of the next drafts
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

from recyc_jax import model, pacing
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import KVCache, LayerCache, Leaf, visible
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Heads, Params
from recyc_jax.pacing import Pace
from recyc_jax.policies.base import Caches, Step
from recyc_jax.policies.lossless import Lossless
from recyc_jax.policies.recycled_parts import Noted
from recyc_jax.prefilling import Prefilled
from recyc_jax.sampling import Chain, Ends, Greedy, Sample, independent

DRAFTED, KEPT, REDRAWN = 1, 2, 3
"""What a row's key is folded with for the draws of one token."""


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


def begin(
    attention: Implementation, policy: Lossless, state: Prefilled, output: Any, of_chain: Any, recent: Array
) -> LosslessState:
    """The carry before the first token of a call, after prompts or in the middle of an answer."""
    before, cache, rows = state.answer, state.cache, state.cache.starts.shape[0]
    zeros = jnp.zeros(rows, jnp.int32)
    counts = dict(output=output, passes=zeros, drafted=zeros, accepted=zeros, made=zeros)
    if before is None:
        caches = Caches(cache.full_layers, cache.visible, cache.length, policy.most_steps)
        return LosslessState(
            layers=cache.layers,
            ends=jnp.broadcast_to(cache.length, (rows,)),
            policy_states=tuple(policy.start(attention, state.stats, caches)),
            pace=pacing.begin(rows),
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
        self.pacing = pacing.Pacing(params, config, attention, policy, self.starts)

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
        return self._chosen(carry, logits[:, None], (None, None), 0)

    def active(self, carry: LosslessState) -> Array:
        """Rows that need more tokens."""
        return ~carry.done & (carry.lengths < self.limit)

    # --- a round

    def round(self, carry: LosslessState) -> LosslessState:
        """Full steps, or drafts and the pass over them."""
        if not self.policy.adapt:
            return self._drafting(carry)
        left = jnp.where(self.active(carry), self.limit - carry.lengths, 0)
        kind, pace = self.pacing.next_kind(carry.pace, carry.ends, left)
        branches = [self._steps, lambda carry: self._after_pass(carry, 0, True), self._drafting]
        return lax.switch(kind, branches, dataclasses.replace(carry, pace=pace))

    def _steps(self, carry: LosslessState) -> LosslessState:
        """Full steps, one after another."""
        return lax.scan(lambda now, _: (self._after_pass(now, 0, False), None), carry, length=self.pacing.run)[0]

    def _drafting(self, carry: LosslessState) -> LosslessState:
        """Drafts, and the pass over them."""
        before, active = carry, self.active(carry)
        carry, drafted, count = self._drafted(carry)

        def passed(width: int, refreshes: bool) -> Any:
            def run(carry: LosslessState) -> LosslessState:
                tokens, scores = (None if one is None else one[:width] for one in drafted)
                return self._after_pass(carry, width, refreshes, (tokens, scores), count)

            return run

        widths = self.pacing.widths if self.policy.adapt else self.pacing.widths[-1:]
        every = (True,) if self.policy.refresh_every == 1 else (False, True)
        kinds = [passed(width, refreshes) for width in widths for refreshes in every]
        kind = self._is_due(carry).astype(jnp.int32) if len(every) > 1 else jnp.zeros((), jnp.int32)
        if len(widths) > 1:
            kind = kind + len(every) * (count > widths[0]).astype(jnp.int32)
        carry = lax.switch(kind, kinds, carry)
        tokens, kept = carry.lengths - before.lengths, carry.accepted - before.accepted
        pace = self.pacing.after(carry.pace, before.ends, count, active & self.active(carry), tokens, kept)
        return dataclasses.replace(carry, drafted=carry.drafted + jnp.where(active, count, 0), pace=pace)

    def _is_due(self, carry: LosslessState) -> Array:
        """Whether a row has read so many tokens since the kept sets were chosen that they are to be chosen anew."""
        age = carry.ends + 1 - carry.policy_states[0].since
        return jnp.any(self.active(carry) & (age >= self.policy.refresh_every))

    def _drafted(self, carry: LosslessState) -> tuple[LosslessState, tuple[Array, Any], Array]:
        """The drafts [N, B], for samples the scores [N, B, V] that they were drawn by, and how many of the N were made:
        the same for all rows. The next draft is made if it gives more tokens per time than those before it and the pass:
        it counts where the ones before it are kept, which is as likely as the drafter was sure of them, or for samples
        as of late."""
        rows, most = carry.token.shape[0], self.policy.draft_length
        active, policy, attention = self.active(carry), self.policy.drafter, self.attention
        costs = self.pacing.costs(carry.ends)
        is_greedy = isinstance(self.chained.sampler, Greedy)
        rows_active = jnp.maximum(jnp.sum(active, dtype=jnp.float32), 1)

        def step(now: tuple[Any, ...]) -> tuple[Any, ...]:
            number, layers, token, of_chain, drafts, all_scores, sure, gives, _ = now
            slots = carry.ends + number

            def read(layer: int, heads: Heads, cached: LayerCache, state: Any) -> tuple[Array, Any]:
                its = Step(
                    heads.q[:, 0], heads.q_before_rope[:, 0], cached, self.starts, slots + 1, number + 1, ~active
                )
                return policy.partial_step(attention, its, state).out[:, None], state

            hidden, layers, _ = self._decoded(layers, token[:, None], slots, read, carry.policy_states)
            logits = model.logits(self.params, self.config, hidden[:, 0])
            place = (carry.lengths + number)[:, None]
            scores = self._scores(logits, of_chain, place)
            if is_greedy:
                token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
                sure = sure * jnp.exp(jnp.max(scores, axis=-1) - jax.nn.logsumexp(scores, axis=-1))
            else:
                token = jax.vmap(jax.random.categorical)(self._keys(place[:, 0], DRAFTED), scores).astype(jnp.int32)
                sure = sure * carry.pace.rate
                all_scores = lax.dynamic_update_index_in_dim(all_scores, scores, number, 0)
            drafts = lax.dynamic_update_index_in_dim(drafts, token, number, 0)
            number, next_gives = number + 1, jnp.sum(jnp.where(active, sure, 0)) / rows_active
            gives = gives + next_gives
            goes_on = costs.is_worth_another(number, gives, next_gives)
            return number, layers, token, self.chained.update(of_chain, token), drafts, all_scores, sure, gives, goes_on

        def another(now: tuple[Any, ...]) -> Array:
            number, goes_on = now[0], now[-1]
            return (number < most) & goes_on if self.policy.adapt else number < most

        vocabulary = self.config.vocab_size
        begun = (
            jnp.zeros((), jnp.int32),
            carry.layers,
            carry.token,
            carry.of_chain,
            jnp.zeros((most, rows), jnp.int32),
            None if is_greedy else jnp.zeros((most, rows, vocabulary), jnp.float32),
            jnp.ones(rows, jnp.float32),
            jnp.ones((), jnp.float32),
            jnp.ones((), jnp.bool_),
        )
        count, layers, _, _, drafts, scores, *_ = lax.while_loop(another, step, begun)
        return dataclasses.replace(carry, layers=layers), (drafts, scores), count

    def _after_pass(
        self,
        carry: LosslessState,
        width: int,
        refreshes: bool,
        drafted: tuple[Array | None, Any] = (None, None),
        count: Array | None = None,
    ) -> LosslessState:
        """The carry after a pass of full attention over each row's pending token and `width` drafts, of which the first
        `count` were made; with the tokens that it chooses."""
        drafts, tokens = drafted[0], carry.token[:, None]
        if drafts is not None:
            tokens = jnp.concatenate([tokens, drafts.T], axis=1)
        logits, layers, policy_states = self._verified(carry, tokens, refreshes)
        active = self.active(carry)
        carry = dataclasses.replace(
            carry, layers=layers, policy_states=policy_states, passes=carry.passes + active.astype(jnp.int32)
        )
        before = carry.lengths
        carry = self._chosen(carry, logits, drafted, 0 if count is None else count)
        return dataclasses.replace(carry, ends=carry.ends + carry.lengths - before)

    def _verified(
        self, carry: LosslessState, tokens: Array, refreshes: bool
    ) -> tuple[Array, tuple[LayerCache, ...], tuple[Any, ...]]:
        """Full attention's logits [B, T, V] after each of the tokens, the caches with its keys and values, and the kept
        sets, if it `refreshes` those by the first token's query."""

        def read(layer: int, heads: Heads, cached: LayerCache, state: Any) -> tuple[Array, Any]:
            if refreshes:
                return self.attention.block_with_scores(heads.q, cached, self.starts, carry.ends)
            if heads.q.shape[1] == 1:
                seen = visible(self.starts, carry.ends + 1, cached.capacity)
                return self.attention.full(heads.q[:, 0], cached, seen)[:, None], None
            return self.attention.block(heads.q, cached, self.starts, carry.ends), None

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
        self, carry: LosslessState, logits: Array, drafted: tuple[Array | None, Any], count: Any
    ) -> LosslessState:
        """The carry with the tokens that the logits [B, T, V] give: of `drafted` (the first `count` of T - 1) those that
        are kept, and one more, as far as rows need them."""
        (rows, width), (drafts, scores) = logits.shape[:2], drafted
        alive, made, tokens, taken = self.active(carry), carry.made, [], []
        # without processors, whose states change from token to token, all most likely tokens are found at once
        is_plain = isinstance(self.chained.sampler, Greedy) and not self.chained.processors
        likely = jnp.argmax(logits, axis=-1).astype(jnp.int32) if is_plain else None
        for place in range(width):
            its = None
            if drafts is not None and place + 1 < width:
                its = drafts[place], None if scores is None else scores[place], place < count
            if likely is None:
                token, is_kept = self._choice(carry, logits[:, place], its)
            else:
                token = likely[:, place]
                is_kept = jnp.zeros_like(alive) if its is None else (its[0] == token) & its[2]
            recent = jnp.concatenate([carry.recent, token[:, None]], axis=1)[:, 1:]
            tokens.append(token)
            taken.append(alive)
            carry = self._with_token(carry, token, recent, alive, is_kept)
            alive = alive & is_kept & self.active(carry)
        taken, tokens = jnp.stack(taken, axis=1), jnp.stack(tokens, axis=1)
        columns = jax.tree.leaves(carry.output)[0].shape[1]
        at = jnp.where(taken, made[:, None] + jnp.arange(width), columns)  # beyond the last column nothing is written
        row = jnp.arange(rows, dtype=jnp.int32)[:, None]
        recorded = jax.vmap(self.record, in_axes=1, out_axes=1)(logits, tokens)
        output = jax.tree.map(lambda kept, new: kept.at[row, at].set(new, mode="drop"), carry.output, recorded)
        return dataclasses.replace(carry, output=output)

    def _choice(
        self, carry: LosslessState, logits: Array, draft: tuple[Array, Any, Array] | None
    ) -> tuple[Array, Array]:
        """The next token of each row by its logits [B, V], and whether it is the draft; `draft`: tokens [B], for samples
        the scores [B, V] that they were drawn by, and whether they were made."""
        place = carry.lengths[:, None]
        scores = self._scores(logits, carry.of_chain, place)
        is_kept = jnp.zeros(logits.shape[0], jnp.bool_)
        if isinstance(self.chained.sampler, Greedy):
            token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            return token, is_kept if draft is None else (draft[0] == token) & draft[2]
        wanted = jax.nn.softmax(scores, axis=-1)
        left = wanted
        if draft is not None:
            drafted = jax.nn.softmax(draft[1], axis=-1)
            p, q = (jnp.take_along_axis(one, draft[0][:, None], axis=1)[:, 0] for one in (wanted, drafted))
            uniform = jax.vmap(jax.random.uniform)(self._keys(place[:, 0], KEPT))
            is_kept = (uniform * q < p) & draft[2]
            left = jnp.where(draft[2], jnp.maximum(wanted - drafted, 0), wanted)
        redrawn = jax.vmap(jax.random.categorical)(self._keys(place[:, 0], REDRAWN), jnp.log(left))
        token = redrawn.astype(jnp.int32)
        return (token if draft is None else jnp.where(is_kept, draft[0], token)), is_kept

    def _with_token(
        self, carry: LosslessState, token: Array, recent: Array, alive: Array, is_kept: Array
    ) -> LosslessState:
        """The carry with a token [B] more in the rows `alive`; it is not recorded yet."""

        def pick(new: Array, old: Array) -> Array:
            return jnp.where(alive.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        one = alive.astype(jnp.int32)
        return dataclasses.replace(
            carry,
            token=pick(token, carry.token),
            made=carry.made + one,
            lengths=carry.lengths + one,
            done=carry.done | (alive & self.ends.after(token, recent)),
            accepted=carry.accepted + (alive & is_kept).astype(jnp.int32),
            of_chain=jax.tree.map(pick, self.chained.update(carry.of_chain, token), carry.of_chain),
            recent=pick(recent, carry.recent),
        )


def cache_of(carry: LosslessState, state: Prefilled) -> KVCache:
    """The cache as states hold it: what rows have beyond the prompts is known by their answers."""
    return dataclasses.replace(state.cache, layers=carry.layers)
