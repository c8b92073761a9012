"""`generate` and `decode`: new tokens after prompts, under a policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Key

from recyc_jax import generation_loop, implementations, lossless
from recyc_jax.cache import KVCache
from recyc_jax.config import LlamaConfig
from recyc_jax.generation_checks import check_sampling, check_state, sampling_arguments
from recyc_jax.generation_loop import DecodeState, Stretch
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.lossless import Lossless
from recyc_jax.policies.registry import as_policy
from recyc_jax.prefilling import NOWHERE, Answer, Prefilled, columns, prefill, with_tokens, without_tokens
from recyc_jax.sampling import Chain, Ends, Greedy, as_chain
from recyc_jax.validation import whole_number


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Array  # int32 [B, max_new_tokens]: pad_id after a row's end
    lengths: Array  # int32 [B]: new tokens of each row, its eos included
    full_steps: Array  # int32 [B, L]: full-attention decode steps within `lengths`; prefill not counted. L counts
    # the layers with full attention, not those with a sliding window


class LosslessGeneration(NamedTuple):
    """What `generate` returns under a `Lossless` policy: a `Generation`, whose `full_steps` are passes of full attention
    over blocks, and how many of the drafts were kept."""

    tokens: Array
    lengths: Array
    full_steps: Array
    drafted: Array  # int32 [B]
    accepted: Array  # int32 [B]


class ScoredGeneration(NamedTuple):
    """What `generate` returns with `top_log_probabilities`: a `Generation`, and the log-probabilities under the model
    itself."""

    tokens: Array
    lengths: Array
    full_steps: Array
    log_probabilities: Array  # float32 [B, max_new_tokens]: of each token
    top_tokens: Array  # int32 [B, max_new_tokens, n]: the n most likely ones in each place
    top_log_probabilities: Array  # float32 [B, max_new_tokens, n]


AnyGeneration: TypeAlias = Generation | LosslessGeneration | ScoredGeneration


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
    arguments = (
        keys,
        config,
        policy,
        width,
        as_chain(sampling),
        eos,
        pad,
        implementation,
        limit,
        bound,
        rewind,
        top,
        stops,
        stretch,
    )
    out, state = decode_tokens(params, state.without_room(), *arguments)
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
    return decode_tokens.lower(params, state, None, config, policy, state.room, as_chain(Greedy()), eos, pad, None)


@functools.partial(
    jax.jit,
    static_argnames=(
        *("config", "policy", "new_tokens", "eos_ids", "pad_id", "implementation"),
        *("bound", "rewind", "top", "stops", "stretch"),
    ),
    donate_argnames="state",
)
def decode_tokens(
    params: Params,
    state: Prefilled,
    keys: Key[Array, " B"] | None,
    config: LlamaConfig,
    policy: Policy,
    new_tokens: int,
    sampling: Any,
    eos_ids: tuple[int, ...],
    pad_id: int,
    implementation: str | None,
    limit: Int[Array, ""] | Int[Array, " B"] | None = None,
    bound: int | None = None,
    rewind: bool = True,
    top: int | None = None,
    stops: tuple[tuple[int, ...], ...] = (),
    stretch: Stretch | None = None,
) -> tuple[AnyGeneration, Prefilled]:
    """The program behind `decode`: `new_tokens` tokens a row, or `limit` of these; from prefill's logits on, they take
    one decode step fewer."""

    chained, rows, ends = as_chain(sampling), state.logits.shape[0], Ends(eos_ids, stops)

    def choose(logits: Array, carry: DecodeState) -> tuple[Array, Any, Array, Any]:
        of_chain, recent = carry.sampling
        token = jnp.where(carry.done, pad_id, chained.choose(logits, carry.keys, carry.step, of_chain))
        recent = jnp.concatenate([recent, token[:, None]], axis=1)[:, 1:]
        done = carry.done | ends.after(token, recent)
        return token, _recorded(logits, token, top), done, (chained.update(of_chain, token), recent)

    output = _columns(rows, new_tokens, pad_id, top)
    if isinstance(policy, Lossless):
        count = jnp.asarray(new_tokens, jnp.int32) if limit is None else limit
        drawn = chained, keys, ends
        return _lossless(params, config, state, policy, implementation, *drawn, output, count, rewind, top, stretch)
    attention, before = implementations.resolve(implementation), state.answer
    loop = config, policy, attention, choose
    if before is None:
        recent = jnp.full((rows, ends.width), -1, jnp.int32)
        begun = (chained.start(state.seen, eos_ids), recent)
        now = generation_loop.begin(state, *loop, output, keys, bound, begun)
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
        last = before.step + (new_tokens if limit is None else limit)
    end = generation_loop.proceed(params, *loop, state.row_lengths, now, last, bound, stretch)
    lengths, full_steps = end.lengths, end.full_steps
    if before is not None:
        lengths, full_steps = lengths - before.lengths, full_steps - before.full_steps
    tokens, *of_tokens = end.output
    out = Generation(tokens, lengths, full_steps)
    if top is not None:
        out = ScoredGeneration(*out, *of_tokens)
    return out, rewound_to(end.cache, state) if rewind else _standing(end, policy, state, tokens)


def _lossless(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    policy: Lossless,
    implementation: str | None,
    chained: Chain,
    keys: Any,
    ends: Ends,
    output: Any,
    count: Array,
    rewind: bool,
    top: int | None,
    stretch: Stretch | None,
) -> tuple[AnyGeneration, Prefilled]:
    """`decode_tokens` by drafts. With a `stretch`, `count` [B] is that of the tokens that each row's answer has at most,
    not of this call's."""
    attention, before, rows = implementations.resolve(implementation), state.answer, state.logits.shape[0]
    recent = jnp.full((rows, ends.width), -1, jnp.int32)
    of_chain = chained.start(state.seen, ends.eos_ids) if before is None else ()
    carry = lossless.begin(attention, policy, state, output, of_chain, recent)
    limit = jnp.broadcast_to(count, (rows,)) if stretch is not None or before is None else before.lengths + count
    loop = lossless.Loop(
        params,
        config,
        attention,
        policy,
        state,
        chained,
        keys,
        ends,
        functools.partial(_recorded, top=top),
        limit,
    )
    carry = loop.first(carry, state.logits) if before is None else carry
    columns = jax.tree.leaves(output)[0].shape[1]
    if columns > 1:
        carry = loop.run(carry, None if stretch is None else stretch.rounds)
    layers = len(config.full_layers)
    full_steps = jnp.broadcast_to(carry.passes[:, None], (rows, layers))
    tokens, *of_tokens = carry.output
    out: AnyGeneration = LosslessGeneration(tokens, carry.made, full_steps, carry.drafted, carry.accepted)
    if top is not None:
        out = ScoredGeneration(tokens, carry.made, full_steps, *of_tokens)
    cache = lossless.cache_of(carry, state)
    if rewind:
        return out, rewound_to(cache, state)
    all_steps = full_steps if before is None else before.full_steps + full_steps
    prompt_length = state.cache.length if before is None else before.prompt_length
    answer = Answer(
        policy=policy,
        policy_states=(*carry.policy_states, carry.pace),
        token=carry.token,
        step=carry.lengths - 1,
        done=carry.done,
        keys=keys,
        lengths=carry.lengths,
        full_steps=all_steps,
        sampling=(carry.of_chain, carry.recent),
        prompt_length=prompt_length,
        rings=(),
        room=0,
    )
    begun = jnp.zeros((rows, 1), jnp.int32) if before is None else before.lengths[:, None]
    return out, _answered(state, cache, answer, tokens, begun)


def _columns(rows: int, new_tokens: int, pad_id: int, top: int | None) -> tuple[Array, ...]:
    """Empty columns for what `_recorded` records."""
    tokens = jnp.full((rows, new_tokens), pad_id, jnp.int32)
    if top is None:
        return (tokens,)
    zeros = jnp.zeros((rows, new_tokens, top), jnp.float32)
    return tokens, jnp.zeros((rows, new_tokens), jnp.float32), zeros.astype(jnp.int32), zeros


def _recorded(logits: Array, token: Array, top: int | None) -> tuple[Array, ...]:
    """The token, and its log-probability and the `top` most likely ones if asked for."""
    if top is None:
        return (token,)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    its = jnp.take_along_axis(log_probabilities, token[:, None], axis=1)[:, 0]
    best, ids = lax.top_k(log_probabilities, top)
    return token, its, ids.astype(jnp.int32), best


def _standing(end: DecodeState, policy: Policy, start: Prefilled, tokens: Array) -> Prefilled:
    """The state at the end of what has been decoded since `start`: `tokens` [B, M]."""
    before = start.answer
    if before is None:
        rings = tuple(layer for layer in start.cache.layers if layer.window is not None)
        prompt_length = start.cache.length
    else:
        rings, prompt_length = before.rings, before.prompt_length
    answer = Answer(
        policy=policy,
        policy_states=end.policy_states,
        token=end.token,
        step=end.step,
        done=end.done,
        keys=end.keys,
        lengths=end.lengths,
        full_steps=end.full_steps,
        sampling=end.sampling,
        prompt_length=prompt_length,
        rings=rings,
        room=0,
    )
    return _answered(start, end.cache, answer, tokens, end.begun)


def _answered(start: Prefilled, cache: KVCache, answer: Answer, tokens: Array, begun: Array) -> Prefilled:
    """The state in the middle of an answer, which had `begun` tokens ([] or [B, 1]) before `tokens` [B, M]."""
    number = begun + jnp.arange(tokens.shape[1], dtype=jnp.int32)  # of each token in its answer
    places = answer.prompt_length - start.cache.starts[:, None] + number
    places = with_tokens(start.first_places, tokens, jnp.where(number < answer.lengths[:, None], places, NOWHERE))
    return dataclasses.replace(start, cache=cache, first_places=places, answer=answer)


def rewound(state: Prefilled) -> Prefilled:
    """The state as it was when its prompts, or its last turn, had been read: from where `decode` begins a new answer.
    `state` is not copied, and not to be used from here on."""
    if state.answer is None:
        return state
    return dataclasses.replace(rewound_to(state.cache, state), room=state.answer.room)


def rewound_to(kv_cache: KVCache, start: Prefilled) -> Prefilled:
    """The state as prefill left it: what decoding wrote beyond the prompt is no longer visible. The caches are handed
    back because the donated ones were written in place. Rings, in which new tokens overwrote the prompt's, are those of
    the prompt's end, so XLA keeps a copy of them."""
    if start.answer is None:
        length, before = start.cache.length, [layer for layer in start.cache.layers if layer.window is not None]
    else:
        length, before = start.answer.prompt_length, start.answer.rings
    rings, places = iter(before), start.first_places
    if start.answer is not None:
        places = without_tokens(places, length - kv_cache.starts)
    layers = tuple(layer if layer.window is None else next(rings) for layer in kv_cache.layers)
    cache = dataclasses.replace(kv_cache, layers=layers, length=length)
    return dataclasses.replace(start, cache=cache, first_places=places, answer=None)
