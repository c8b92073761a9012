"""`generate` and `decode`: new tokens after prompts, under a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from recyc_jax import implementations, lossless
from recyc_jax.config import LlamaConfig
from recyc_jax.decoding import Call, decode_tokens
from recyc_jax.generation_checks import check_sampling, check_state, sampling_arguments
from recyc_jax.generation_loop import Stretch
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.lossless import Lossless
from recyc_jax.policies.registry import as_policy
from recyc_jax.prefilling import Prefilled, columns, prefill
from recyc_jax.results import AnyGeneration
from recyc_jax.sampling import Greedy, as_chain
from recyc_jax.validation import whole_number


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: Any,
    *,
    policy: Policy | str = FullAttention(),
    max_new_tokens: int = 64,
    sampling: Any = Greedy(),
    eos_ids: Any = None,
    pad_id: int = 0,
    key: Any = None,
    prompt_lengths: Any = None,
    implementation: str | None = None,
    allow_beyond_context: bool = False,
    top_log_probabilities: int | None = None,
    stop: Sequence[Sequence[int]] = (),
) -> AnyGeneration:
    """New tokens after each prompt under a policy, or under the policy that a string names (`parse_policy`).

    `prompts` is a list of ragged token-id lists (padded to a bucket of lengths: two calls of one bucket compile
    once), what a transformers tokenizer returns for several texts, or an int array [B, T], right-padded, with
    `prompt_lengths` [B]; the array form also works inside `jax.jit`. In batches of one shape (rows, padded length,
    `max_new_tokens`), a row's tokens are the same bit for bit whatever its neighbours hold and however long they are,
    under every policy and in every dtype. Alone or in a batch of another shape they are the same up to rounding, since
    matrix products then sum in another order: float32 tokens differ only where two choices nearly tie, bfloat16 tokens
    often do within a few to some tens of steps.
    `sampling` is `Greedy()`, `Sample(...)`, a `chain` of processors and one of these, or a pure function (`sampling.py`).
    `eos_ids` is one id or several; None takes the config's, `()` none. `stop` are sequences of token ids that end a row
    too, the sequence included. `top_log_probabilities=n` also gives each token's log-probability, and the n most likely
    tokens of each place with theirs (0: none); they are the model's own, before `sampling`. `key` is one PRNG key or one
    per row. With `top_log_probabilities` the result is a `ScoredGeneration`, otherwise under a `Lossless` policy a
    `LosslessGeneration`.
    Raises ValueError naming the argument at fault, before the prompts are read; also for prompts that with their new
    tokens exceed the model's context, unless `allow_beyond_context`.
    """
    policy = as_policy(policy)
    check_sampling(config, policy, sampling, eos_ids, pad_id, key, implementation)
    state = prefill(
        params,
        config,
        prompts,
        policies=(policy,),
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        implementation=implementation,
        allow_beyond_context=allow_beyond_context,
    )
    out, _ = decode(
        params,
        config,
        state,
        policy=policy,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        implementation=implementation,
        top_log_probabilities=top_log_probabilities,
        stop=stop,
    )
    return out


def decode(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    *,
    policy: Policy | str,
    max_new_tokens: int | None = None,
    sampling: Any = Greedy(),
    eos_ids: Any = None,
    pad_id: int = 0,
    key: Any = None,
    implementation: str | None = None,
    rewind: bool = True,
    top_log_probabilities: int | None = None,
    stop: Sequence[Sequence[int]] = (),
) -> tuple[AnyGeneration, Prefilled]:
    """New tokens after prefilled prompts, and the state rewound to the prompts, from which to decode again.

    `state` is donated: use the returned one from here on. `max_new_tokens` defaults to what prefill left room for.
    With `rewind=False` the returned state stands at the end of the answer: `decode` goes on from there, under the same
    policy and with the same keys, with the tokens that one longer call would make (rows that have ended get `pad_id`),
    `extend` reads a further turn, and `rewind` goes back to the prompts. Raises ValueError where `max_new_tokens`
    exceeds the room, where the policy needs statistics that prefill was not asked to keep or is another one than the
    answer was begun under, and where sampling lacks a key."""
    return advance(
        params,
        config,
        state,
        policy=policy,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        implementation=implementation,
        rewind=rewind,
        top_log_probabilities=top_log_probabilities,
        stop=stop,
    )


def advance(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    *,
    policy: Policy | str,
    max_new_tokens: int | None,
    rewind: bool,
    sampling: Any = Greedy(),
    eos_ids: Any = None,
    pad_id: int = 0,
    key: Any = None,
    implementation: str | None = None,
    top_log_probabilities: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    stretch: Stretch | None = None,
    last: Array | None = None,
) -> tuple[AnyGeneration, Prefilled]:
    """The function behind `decode`. With a `stretch`, `max_new_tokens` are its steps, or fewer of them. Under a `Lossless`
    policy a stretch makes up to `max_new_tokens` in each row, none after the row's answer has `last` [B] tokens."""
    policy = _checked(config, state, policy, sampling, implementation)
    new_tokens = state.room if max_new_tokens is None else whole_number("max_new_tokens", max_new_tokens, 1)
    if last is None and new_tokens > state.room:
        raise ValueError(f"max_new_tokens={new_tokens} must lie in 1..{state.room}: prefill made room for {state.room}")
    if key is None and state.answer is not None:
        key = state.answer.keys
    keys, eos, pad = sampling_arguments(config, sampling, eos_ids, pad_id, key, state.logits.shape[0])
    width, room, origin = columns(new_tokens), state.room, state.origin
    at_prompt = room if state.answer is None else state.answer.room
    bound = None if rewind and state.answer is None else state.cache.capacity
    limit = jnp.asarray(new_tokens, jnp.int32) if last is None else last
    if new_tokens == 1 and state.answer is None:
        width, limit, stretch = 1, None, None  # no step: a small program, after which a stream needs one more
    top = None if top_log_probabilities is None else whole_number("top_log_probabilities", top_log_probabilities, 0)
    stops = tuple(tuple(whole_number("stop", token, 0) for token in one) for one in stop)
    if not all(stops):
        raise ValueError(f"stop={stop!r} must be sequences of token ids, none of them empty")
    call = Call(config, policy, width, eos, pad, implementation, bound, rewind, top, stops, stretch)
    out, state = decode_tokens(params, state.without_room(), call, keys, as_chain(sampling), limit)
    if width != new_tokens:
        names = [name for name in out._fields if getattr(out, name).shape[1:2] == (width,) and name != "full_steps"]
        out = out._replace(**{name: getattr(out, name)[:, :new_tokens] for name in names})
    if state.answer is None:
        return out, dataclasses.replace(state, room=at_prompt, origin=origin)
    answer = dataclasses.replace(state.answer, room=at_prompt)
    return out, dataclasses.replace(state, room=max(0, room - new_tokens), answer=answer, origin=origin)


def _checked(
    config: LlamaConfig, state: Prefilled, policy: Policy | str, sampling: Any, implementation: str | None
) -> Policy:
    """The policy, once it is known that it can go on from this state."""
    policy = as_policy(policy)
    check_state(state, policy, implementation)
    if isinstance(policy, Lossless):
        lossless.check(config, as_chain(sampling), implementations.resolve(implementation))
    return policy


def lower_decode(params: Params, config: LlamaConfig, state: Prefilled, *, policy: Policy | str) -> jax.stages.Lowered:
    """The program of `decode(params, config, state, policy=policy)`, traced but not compiled. Compiled, it is called with
    `(params, state, None, as_chain(Greedy()))`. Raises ValueError as `decode` does."""
    policy = _checked(config, state, policy, Greedy(), None)
    _, eos, pad = sampling_arguments(config, Greedy(), None, 0, None, None)
    return decode_tokens.lower(params, state, Call(config, policy, state.room, eos, pad), None, as_chain(Greedy()))
