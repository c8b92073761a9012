"""The decode loop, where model, cache and policy meet, and what is run through it.

`generate` is `prefill` + `decode`. The loop goes period by period: a `lax.scan` of plain (partial) steps, then one deciding
step, full or partial by a `lax.cond` of the policy (or by each row's kernels), or full without asking where the policy
knows. The carry holds the KV cache and the policy's state (for recycled attention: every layer's recycled top-K slots).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from recyc_jax import cache, model, sharding
from recyc_jax import prompts as prompt_arrays
from recyc_jax.attention import api
from recyc_jax.cache import KVCache, Leaf
from recyc_jax.config import LlamaConfig, whole_number
from recyc_jax.model import Params, Project
from recyc_jax.policies.base import Caches, Policy, Step
from recyc_jax.policies.full import FullAttention
from recyc_jax.prefill import Prefilled, prefill
from recyc_jax.sampling import Greedy, Sample


@flax.struct.dataclass
class DecodeState:
    """The carry of the decode loop."""

    cache: KVCache
    recycled: tuple[Any, ...]  # the policy's state, a layer each
    token: Leaf  # int32 [B]: made, not yet fed
    step: Leaf  # int32 []: decode steps taken
    done: Leaf  # bool [B]: the row has made an end-of-sequence token
    keys: Leaf | None  # PRNG keys [B], or None
    output: Leaf  # [B, M]: what the run collects of each new token
    lengths: Leaf  # int32 [B]: new tokens so far, the end-of-sequence token included
    full_steps: Leaf  # int32 [B, L]: full-attention decode steps that made one of those tokens


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Array  # int32 [B, max_new_tokens]: pad_id after a row's end
    lengths: Array  # int32 [B]: new tokens of each row, its eos included
    full_steps: Array  # int32 [B, L]: full-attention decode steps within `lengths`; prefill not counted


Choose = Callable[[Array, DecodeState], tuple[Array, Array, Array]]
"""(logits [B, V], state) -> next token [B], what to record of it [B], which rows have ended [B]."""


# --- the decode loop -------------------------------------------------------------------------------------------------


def decode_step(
    params: Params,
    config: LlamaConfig,
    policy: Policy,
    attention: api.Implementation,
    choose: Choose,
    state: DecodeState,
    deciding: bool,
) -> DecodeState:
    """One step: feed the pending token, attend as the policy says, choose the next token."""
    kv_cache, number = state.cache, state.step + 1
    slot = kv_cache.length

    def attend(layer: int, project: Project, layer_state: Any) -> tuple[Array, Any]:
        kv, recycled = layer_state
        heads, kv = project(cached=kv, slot=slot)
        here = Step(
            q=heads.q[:, 0],
            plain_q=heads.plain_q[:, 0],
            cached=kv,
            starts=kv_cache.starts,
            length=slot + 1,
            number=number,
            done=state.done,
        )
        out, recycled, full = (policy.decide if deciding else policy.attend)(attention, here, recycled)
        return out[:, None], (kv, recycled, full)

    positions = (slot - kv_cache.starts)[:, None]
    layer_states = tuple(zip(kv_cache.layers, state.recycled, strict=True))
    hidden, after = model.hidden_states(
        params, config, state.token[:, None], positions, attend, layer_states, attention.projections
    )
    layers, recycled, fulls = zip(*after, strict=True)
    if deciding:
        visible = cache.filled(kv_cache.starts, slot + 1, kv_cache.capacity)
        recycled = policy.settle(recycled, Caches(attention, layers, visible, slot + 1, state.output.shape[1] - 1))
    fed = dataclasses.replace(
        state,
        cache=KVCache(layers, kv_cache.starts, slot + 1),
        recycled=recycled,
        step=number,
        full_steps=state.full_steps + (jnp.stack(fulls, axis=1) & ~state.done[:, None]).astype(jnp.int32),
    )
    return _record(fed, choose, model.logits(params, config, hidden[:, 0]))


def _record(state: DecodeState, choose: Choose, logits: Float[Array, "B V"]) -> DecodeState:
    """The state with the token that follows `logits` chosen and recorded in column `step`."""
    token, value, done = choose(logits, state)
    return dataclasses.replace(
        state,
        token=token,
        done=done,
        output=lax.dynamic_update_slice_in_dim(state.output, value[:, None], state.step, axis=1),
        lengths=state.lengths + (~state.done).astype(jnp.int32),
    )


def _run(
    params: Params,
    config: LlamaConfig,
    prefilled: Prefilled,
    policy: Policy,
    attention: api.Implementation,
    choose: Choose,
    output: Array,
    keys: Array | None,
) -> DecodeState:
    """The state after `output.shape[1]` tokens: the first from prefill's logits, each further one from a decode step."""
    kv_cache = prefilled.cache
    batch = output.shape[0]
    visible = cache.filled(kv_cache.starts, kv_cache.length, kv_cache.capacity)
    state = DecodeState(
        cache=kv_cache,
        recycled=policy.start(
            prefilled.observed, Caches(attention, kv_cache.layers, visible, kv_cache.length, output.shape[1] - 1)
        ),
        token=jnp.zeros(batch, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        done=jnp.zeros(batch, jnp.bool_),
        keys=keys,
        output=output,
        lengths=jnp.zeros(batch, jnp.int32),
        full_steps=jnp.zeros((batch, config.num_hidden_layers), jnp.int32),
    )
    state = _record(state, choose, prefilled.logits)
    step = functools.partial(decode_step, params, config, policy, attention, choose)

    def plain_steps(state: DecodeState, count: int) -> DecodeState:
        return lax.scan(lambda carry, _: (step(carry, deciding=False), None), state, length=count)[0]

    def period(state: DecodeState) -> DecodeState:
        if not policy.decides:
            return plain_steps(state, policy.period)
        return step(plain_steps(state, policy.period - 1), deciding=True)

    periods, rest = divmod(output.shape[1] - 1, policy.period)
    state = _repeat_while_active(period, periods, state)
    return _repeat_while_active(lambda state: plain_steps(state, rest), min(rest, 1), state)


def _repeat_while_active(body: Callable[[DecodeState], DecodeState], count: int, state: DecodeState) -> DecodeState:
    """`body` applied `count` times, or until every row has ended."""
    if count == 0:
        return state

    def active(carry: tuple[Array, DecodeState]) -> Array:
        return (carry[0] < count) & ~jnp.all(carry[1].done)

    return lax.while_loop(active, lambda carry: (carry[0] + 1, body(carry[1])), (jnp.zeros((), jnp.int32), state))[1]


# --- what is run through the loop ------------------------------------------------------------------------------------


def decode(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    *,
    policy: Policy,
    max_new_tokens: int | None = None,
    sampling: Greedy | Sample = Greedy(),
    eos_ids: Sequence[int] | int | None = None,
    pad_id: int = 0,
    key: Any = None,
    implementation: str | None = None,
) -> tuple[Generation, Prefilled]:
    """New tokens after prefilled prompts, and the state rewound to the prompts, to decode again.

    `state` is donated: go on with the returned one. `max_new_tokens` defaults to what prefill left room for. Raises
    ValueError where it exceeds that, where the policy needs scores that prefill was not asked to keep, and where
    sampling lacks a key.
    """
    _check_state(state, policy, implementation)
    room = state.room
    steps = room if max_new_tokens is None else whole_number("max_new_tokens", max_new_tokens, 1)
    if steps > room:
        raise ValueError(f"max_new_tokens={steps} must lie in 1..{room}: prefill made room for {room}")
    keys, eos, pad = _how_to_choose(config, sampling, eos_ids, pad_id, key, state.logits.shape[0])
    return _decode(params, state, keys, config, policy, steps, sampling, eos, pad, implementation)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8, 9), donate_argnums=(1,))
def _decode(
    params: Params,
    state: Prefilled,
    keys: Key[Array, " B"] | None,
    config: LlamaConfig,
    policy: Policy,
    steps: int,
    sampling: Greedy | Sample,
    eos_ids: tuple[int, ...],
    pad_id: int,
    implementation: str | None,
) -> tuple[Generation, Prefilled]:
    def choose(logits: Array, at: DecodeState) -> tuple[Array, Array, Array]:
        token = jnp.where(at.done, pad_id, sampling(logits, at.keys, at.step))
        done = at.done
        for eos in eos_ids:
            done = done | (token == eos)
        return token, token, done

    output = jnp.full((state.logits.shape[0], steps), pad_id, jnp.int32)
    end = _run(params, config, state, policy, api.resolve(implementation), choose, output, keys)
    return Generation(end.output, end.lengths, end.full_steps), _rewound(end.cache, state)


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: Any,
    *,
    policy: Policy = FullAttention(),
    max_new_tokens: int = 64,
    sampling: Greedy | Sample = Greedy(),
    eos_ids: Sequence[int] | int | None = None,
    pad_id: int = 0,
    key: Any = None,
    prompt_lengths: Any = None,
    implementation: str | None = None,
) -> Generation:
    """New tokens after each prompt under a policy.

    `prompts` is a list of ragged token-id lists (padded to a bucket of lengths: two calls of one bucket compile
    once) or an int array [B, T], right-padded, with `prompt_lengths` [B]; the array form also works inside `jax.jit`. A
    row's tokens do not depend on its neighbours. `eos_ids=None` takes the config's, `()` none; `key` is one PRNG key or
    one a row.
    """
    _how_to_choose(config, sampling, eos_ids, pad_id, key, len(prompts))  # before the prompts are read
    state = prefill(
        params,
        config,
        prompts,
        policies=(policy,),
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        implementation=implementation,
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
    )
    return out


class Scores(NamedTuple):
    """What `score_after` returns."""

    log_probabilities: Array  # float32 [B, M]
    full_steps: Array  # int32 [B, L]: full-attention decode steps, M - 1 steps being taken
    states: tuple[Any, ...]  # the policy's after the last step, a layer each: for diagnostics


def score(
    params: Params,
    config: LlamaConfig,
    tokens: Any,
    *,
    policy: Policy,
    context_length: int,
    implementation: str | None = None,
) -> Float[Array, "B new"]:
    """Log-probabilities of tokens `context_length`..T-1 of [B, T], float32 [B, T - context_length].

    The first `context_length` tokens are prefilled (column 0 is prefill's prediction), the rest fed one at a time under
    the policy. Decode step s feeds token `context_length - 1 + s`, so a fixed schedule is full at tokens
    `context_length - 1 + k * stride`.
    """
    if not isinstance(tokens, jax.Array):
        tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not 1 <= context_length < tokens.shape[1]:
        raise ValueError(f"context_length={context_length} must lie in 1..T-1 of tokens [B, T], here {tokens.shape}")
    forced, _ = prompt_arrays.as_arrays(tokens, None, config)
    state = prefill(
        params,
        config,
        tokens[:, :context_length],
        policies=(policy,),
        max_new_tokens=tokens.shape[1] - context_length,
        implementation=implementation,
    )
    scores, _ = score_after(
        params, config, state, forced[:, context_length:], policy=policy, implementation=implementation
    )
    return scores.log_probabilities


def score_after(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    tokens: Any,
    *,
    policy: Policy,
    implementation: str | None = None,
) -> tuple[Scores, Prefilled]:
    """Log-probabilities of `tokens` [B, M] after prefilled prompts, and the state rewound to the prompts: `score` for
    several policies that share one prefill.

    `state` is donated, as in `decode`. Raises ValueError where prefill left no room for M tokens.
    """
    _check_state(state, policy, implementation)
    forced, _ = prompt_arrays.as_arrays(tokens, None, config)
    forced = sharding.spread(forced, "B-", forced.shape[0])
    if forced.shape[0] != state.logits.shape[0] or forced.shape[1] > state.room:
        raise ValueError(
            f"tokens of shape {list(forced.shape)} do not fit {state.logits.shape[0]} prompts with room for {state.room}"
        )
    return _score(params, state, forced, config, policy, implementation)


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=(1,))
def _score(
    params: Params,
    state: Prefilled,
    forced: Int[Array, "B new"],
    config: LlamaConfig,
    policy: Policy,
    implementation: str | None,
) -> tuple[Scores, Prefilled]:
    def choose(logits: Array, at: DecodeState) -> tuple[Array, Array, Array]:
        token = lax.dynamic_index_in_dim(forced, at.step, axis=1, keepdims=False)
        chances = jax.nn.log_softmax(logits, axis=-1)
        return token, jnp.take_along_axis(chances, token[:, None], axis=1)[:, 0], at.done

    output = jnp.zeros(forced.shape, jnp.float32)
    end = _run(params, config, state, policy, api.resolve(implementation), choose, output, None)
    # the caches go back so that the donated ones can be written in place
    return Scores(end.output, end.full_steps, end.recycled), _rewound(end.cache, state)


def _rewound(kv_cache: KVCache, start: Prefilled) -> Prefilled:
    """The state as prefill left it; what decoding wrote beyond the prompt is no longer visible."""
    return dataclasses.replace(start, cache=dataclasses.replace(kv_cache, length=start.cache.length))


def _check_state(state: Prefilled, policy: Policy, implementation: str | None) -> None:
    if isinstance(state.logits, jax.Array) and not isinstance(state.logits, Tracer) and state.logits.is_deleted():
        raise ValueError("this state was donated to an earlier decode: go on with the one that it returned")
    if state.cache.layers[0].slots_last != api.resolve(implementation).SLOTS_LAST:
        raise ValueError(
            f"implementation={implementation!r} stores its cache another way than this state's: prefill with it"
        )
    wanted, kept = policy.observes, state.observed[0]
    missing = {
        "scores": not wanted.windows <= kept.scores.keys(),
        "last query": wanted.query and kept.q is None,
        "accumulated attention": wanted.mass and kept.mass is None,
    }
    for what in (name for name, lacks in missing.items() if lacks):
        raise ValueError(f"{policy} needs the prompt's {what}: name it in prefill(policies=...)")


def _how_to_choose(
    config: LlamaConfig, sampling: Greedy | Sample, eos_ids: Any, pad_id: Any, key: Any, batch: int
) -> tuple[Key[Array, " B"] | None, tuple[int, ...], int]:
    """The rows' keys, the end-of-sequence ids and the pad id. Raises ValueError naming the argument at fault."""
    keys = None if isinstance(sampling, Greedy) else _row_keys(key, batch)
    if eos_ids is None:
        eos_ids = config.eos_token_ids
    elif not isinstance(eos_ids, Sequence):
        eos_ids = (eos_ids,)
    return keys, tuple(whole_number("eos_ids", token, 0) for token in eos_ids), whole_number("pad_id", pad_id, 0)


def _row_keys(key: Any, batch: int) -> Key[Array, " B"]:
    """One PRNG key a row: those given, or folded from the one given."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"sampling needs a key: pass key=jax.random.key(seed), not {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one a row ({batch}), not {list(key.shape)}")
    if key.shape:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
