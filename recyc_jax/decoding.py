"""The program behind `decode`: new tokens after a state, by plain steps or by drafts."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from recyc_jax import answers, generation_loop, implementations, lossless, results
from recyc_jax.config import LlamaConfig
from recyc_jax.generation_loop import DecodeState, Stretch
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.lossless import Lossless
from recyc_jax.prefilling import Answer, Prefilled
from recyc_jax.results import AnyGeneration, Generation, LosslessGeneration, ScoredGeneration
from recyc_jax.sampling import Ends, Greedy, as_chain


@dataclasses.dataclass(frozen=True)
class Call:
    """What a program of `decode_tokens` is compiled for."""

    config: LlamaConfig
    policy: Policy
    columns: int  # of the output: the tokens that a row gets at most
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    implementation: str | None = None
    bound: int | None = None  # the most steps from the prompt on, later calls included; None: those of this call
    rewind: bool = True  # whether the state that is returned stands at the prompt's end, or at the answer's
    top: int | None = None  # record each token's log-probability, and so many of the most likely tokens
    stops: tuple[tuple[int, ...], ...] = ()
    stretch: Stretch | None = None  # a part of an answer, as streams decode it


@functools.partial(jax.jit, static_argnames="call", donate_argnames="state")
def decode_tokens(
    params: Params,
    state: Prefilled,
    call: Call,
    keys: Key[Array, " B"] | None = None,
    sampling: Any = Greedy(),
    limit: Int[Array, ""] | Int[Array, " B"] | None = None,
) -> tuple[AnyGeneration, Prefilled]:
    """`call.columns` tokens a row, or `limit` of these; from prefill's logits on, they take one decode step fewer."""
    drawn = keys, as_chain(sampling), limit
    if isinstance(call.policy, Lossless):
        return _by_drafts(params, state, call, call.policy, *drawn)
    return _by_steps(params, state, call, *drawn)


def _by_steps(
    params: Params, state: Prefilled, call: Call, keys: Any, chain: Any, limit: Array | None
) -> tuple[AnyGeneration, Prefilled]:
    rows, ends, before = state.logits.shape[0], Ends(call.eos_ids, call.stops), state.answer

    def choose(logits: Array, carry: DecodeState) -> tuple[Array, Any, Array, Any]:
        of_chain, recent = carry.sampling
        token = jnp.where(carry.done, call.pad_id, chain.choose(logits, carry.keys, carry.step, of_chain))
        recent = jnp.concatenate([recent, token[:, None]], axis=1)[:, 1:]
        done = carry.done | ends.after(token, recent)
        return token, results.recorded(logits, token, call.top), done, (chain.update(of_chain, token), recent)

    output = results.columns(rows, call.columns, call.pad_id, call.top)
    loop = call.config, call.policy, implementations.resolve(call.implementation), choose
    if before is None:
        begun = chain.start(state.seen, call.eos_ids), ends.none_yet(rows)
        now = generation_loop.begin(state, *loop, output, keys, call.bound, begun)
        last = None if limit is None else limit - 1
    else:
        # the pending token is that of step number `before.step`, and the next one is the first of this call
        now = DecodeState(
            cache=state.cache,
            policy_states=before.policy_states,
            token=before.token,
            step=before.step,
            begun=before.step + 1,
            done=before.done,
            keys=keys,
            output=output,
            lengths=before.lengths,
            full_steps=before.full_steps,
            sampling=before.sampling,
        )
        last = before.step + (call.columns if limit is None else limit)
    end = generation_loop.proceed(params, *loop, state.row_lengths, now, last, call.bound, call.stretch)
    lengths, full_steps = end.lengths, end.full_steps
    if before is not None:
        lengths, full_steps = lengths - before.lengths, full_steps - before.full_steps
    tokens, *of_tokens = end.output
    out = Generation(tokens, lengths, full_steps)
    if call.top is not None:
        out = ScoredGeneration(*out, *of_tokens)
    if call.rewind:
        return out, answers.rewound_to(end.cache, state)
    return out, answers.standing(end, call.policy, state, tokens)


def _by_drafts(
    params: Params, state: Prefilled, call: Call, policy: Lossless, keys: Any, chain: Any, limit: Array | None
) -> tuple[AnyGeneration, Prefilled]:
    """With a stretch, `limit` [B] is that of the tokens that each row's answer has at most, not of this call's."""
    rows, ends, before = state.logits.shape[0], Ends(call.eos_ids, call.stops), state.answer
    attention = implementations.resolve(call.implementation)
    of_chain = chain.start(state.seen, call.eos_ids) if before is None else ()
    output = results.columns(rows, call.columns, call.pad_id, call.top)
    carry = lossless.begin(attention, policy, state, output, of_chain, ends.none_yet(rows))
    count = jnp.asarray(call.columns, jnp.int32) if limit is None else limit
    of_rows = jnp.broadcast_to(count if call.stretch is not None or before is None else before.lengths + count, (rows,))
    record = functools.partial(results.recorded, top=call.top)
    loop = lossless.Loop(params, call.config, attention, policy, state, chain, keys, ends, record, of_rows)
    carry = loop.first(carry, state.logits) if before is None else carry
    if call.columns > 1:
        carry = loop.run(carry, None if call.stretch is None else call.stretch.rounds)
    full_steps = jnp.broadcast_to(carry.passes[:, None], (rows, len(call.config.full_layers)))
    tokens, *of_tokens = carry.output
    out: AnyGeneration = LosslessGeneration(tokens, carry.made, full_steps, carry.drafted, carry.accepted)
    if call.top is not None:
        out = ScoredGeneration(tokens, carry.made, full_steps, *of_tokens)
    cache = lossless.cache_of(carry, state)
    if call.rewind:
        return out, answers.rewound_to(cache, state)
    answer = Answer(
        policy=policy,
        policy_states=(*carry.policy_states, carry.pace),
        token=carry.token,
        step=carry.lengths - 1,
        done=carry.done,
        keys=keys,
        lengths=carry.lengths,
        full_steps=full_steps if before is None else before.full_steps + full_steps,
        sampling=(carry.of_chain, carry.recent),
        prompt_length=state.cache.length if before is None else before.prompt_length,
        rings=(),
        room=0,
    )
    begun = jnp.zeros((rows, 1), jnp.int32) if before is None else before.lengths[:, None]
    return out, answers.answered(state, cache, answer, tokens, begun)
