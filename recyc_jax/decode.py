"""Prefill and the decode loop: the one place where model, cache and policy meet.

`generate` is `prefill` + `decode`. Prefill reads the prompt with full attention, chunk by chunk, and keeps
what policies observe of its last token. The decode loop goes period by period: a `lax.scan` of plain (partial) steps,
then one deciding step in which a `lax.cond` of the policy takes the full or the partial branch. The carry holds the
KV cache and the policy's state (for recycled attention: the recycled top-K slots of every layer).
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

from recyc_jax import cache, model
from recyc_jax import prompts as prompt_arrays
from recyc_jax.attention import api
from recyc_jax.cache import KVCache, LayerCache, Leaf
from recyc_jax.config import LlamaConfig, whole_number
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy, View
from recyc_jax.policies.full import FullAttention
from recyc_jax.sampling import Greedy, Sample

PREFILL_CHUNK = 1024
PREFILL_TOKENS = 8192  # B * chunk at most: bounds a chunk's activations whatever the batch


@flax.struct.dataclass
class Prefilled:
    """Prompts that have been read: what `decode` starts from, under any policy that was named to `prefill`."""

    cache: KVCache
    logits: Leaf  # float32 [B, V]: of each row's last prompt token
    scores: tuple[Leaf | None, ...]  # a layer: float32 [B, K, S], the last prompt token's; None where unobserved
    prompt_slots: int = flax.struct.field(pytree_node=False)  # slots that the prompts fill, padding included


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


# --- prefill ---------------------------------------------------------------------------------------------------------


def prefill(
    params: Params,
    config: LlamaConfig,
    prompts: Any,
    *,
    policies: Sequence[Policy] = (),
    max_new_tokens: int = 64,
    prompt_lengths: Any = None,
    implementation: str | None = None,
) -> Prefilled:
    """The prompts' KV caches, next-token logits and what `policies` observe.

    `prompts` is a list of ragged token-id lists or an int array [B, T], right-padded, with `prompt_lengths` [B]. The
    cache has room for `max_new_tokens`. Attention is causal and full over chunks of the prompt, so memory beyond the
    cache does not grow with T. Raises ValueError for empty prompts and ids outside the vocabulary.
    """
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    api.resolve(implementation)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) > 1:
        raise ValueError(f"params mix {' and '.join(sorted(dtypes))}: cast them to one dtype")
    tokens, lengths = prompt_arrays.as_arrays(prompts, prompt_lengths, config)
    observes = any(policy.observes_scores for policy in policies)
    return _prefill(params, tokens, lengths, config, max_new_tokens, observes, implementation)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    config: LlamaConfig,
    max_new_tokens: int,
    observes: bool,
    implementation: str | None,
) -> Prefilled:
    attention = api.resolve(implementation)
    batch, width = tokens.shape
    chunks = -(-width // max(1, min(PREFILL_CHUNK, PREFILL_TOKENS // batch)))
    chunk = -(-width // chunks)
    prompt_slots = chunks * chunk
    starts = prompt_slots - lengths
    # right-align: slot s of row b holds token s - starts[b]
    positions = jnp.maximum(jnp.arange(prompt_slots, dtype=jnp.int32) - starts[:, None], 0)
    tokens = jnp.take_along_axis(tokens, jnp.minimum(positions, width - 1), axis=1)
    empty = cache.empty(config, batch, prompt_slots + max_new_tokens - 1, _dtype(params), starts)

    def read_chunk(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        layers = carry[0]
        offset = index * chunk

        def attend(layer: int, q: Array, k: Array, v: Array, kv: LayerCache) -> tuple[Array, Any]:
            kv = kv.append(k, v, offset)
            return attention.chunk(q, kv.keys, kv.values, starts, offset), (kv, q[:, -1])

        here = lax.dynamic_slice_in_dim(tokens, offset, chunk, axis=1)
        at = lax.dynamic_slice_in_dim(positions, offset, chunk, axis=1)
        hidden, after = model.hidden_states(params, config, here, at, attend, layers)
        layers, queries = zip(*after, strict=True)
        return layers, queries, hidden[:, -1]

    dtype = empty.layers[0].keys.dtype
    queries = (jnp.zeros((batch, config.num_attention_heads, config.head_dim), dtype),) * config.num_hidden_layers
    carry = (empty.layers, queries, jnp.zeros((batch, config.hidden_size), dtype))
    # chunks that hold padding alone in every row are passed over
    layers, queries, hidden = lax.fori_loop(jnp.min(starts) // chunk, chunks, read_chunk, carry)
    kv_cache = KVCache(layers, starts, jnp.asarray(prompt_slots, jnp.int32))
    visible = cache.filled(starts, kv_cache.length, kv_cache.capacity)
    scores = tuple(
        attention.scores(q, kv.keys, visible) if observes else None for q, kv in zip(queries, layers, strict=True)
    )
    return Prefilled(kv_cache, model.logits(params, config, hidden), scores, prompt_slots)


def _dtype(params: Params) -> Any:
    return params["embedding"].dtype


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
    kv_cache, step = state.cache, state.step + 1
    slot = kv_cache.length

    def attend(layer: int, q: Array, k: Array, v: Array, layer_state: Any) -> tuple[Array, Any]:
        kv, recycled = layer_state
        kv = kv.append(k, v, slot)
        view = View(kv.keys, kv.values, kv_cache.starts, slot + 1)
        if deciding:
            out, recycled, full = policy.decide(attention, q[:, 0], view, recycled, step)
        else:
            out, recycled, full = policy.attend(attention, q[:, 0], view, recycled)
        return out[:, None], (kv, recycled, full)

    positions = (slot - kv_cache.starts)[:, None]
    layer_states = tuple(zip(kv_cache.layers, state.recycled, strict=True))
    hidden, after = model.hidden_states(params, config, state.token[:, None], positions, attend, layer_states)
    layers, recycled, fulls = zip(*after, strict=True)
    fed = dataclasses.replace(
        state,
        cache=KVCache(layers, kv_cache.starts, slot + 1),
        recycled=recycled,
        step=step,
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
        recycled=tuple(policy.start(scores, visible) for scores in prefilled.scores),
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
    if isinstance(state.logits, jax.Array) and not isinstance(state.logits, Tracer) and state.logits.is_deleted():
        raise ValueError("this state was donated to an earlier decode: go on with the one that it returned")
    _check_policy(policy, state)
    room = _room(state)
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
    scored, _ = _score(params, state, forced[:, context_length:], config, policy, implementation)
    return scored


@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=(1,))
def _score(
    params: Params,
    state: Prefilled,
    forced: Int[Array, "B new"],
    config: LlamaConfig,
    policy: Policy,
    implementation: str | None,
) -> tuple[Float[Array, "B new"], Prefilled]:
    def choose(logits: Array, at: DecodeState) -> tuple[Array, Array, Array]:
        token = lax.dynamic_index_in_dim(forced, at.step, axis=1, keepdims=False)
        chances = jax.nn.log_softmax(logits, axis=-1)
        return token, jnp.take_along_axis(chances, token[:, None], axis=1)[:, 0], at.done

    output = jnp.zeros(forced.shape, jnp.float32)
    end = _run(params, config, state, policy, api.resolve(implementation), choose, output, None)
    # the caches go back so that the donated ones can be written in place
    return end.output, _rewound(end.cache, state)


def _rewound(kv_cache: KVCache, start: Prefilled) -> Prefilled:
    """The state as prefill left it; what decoding wrote beyond the prompt is no longer visible."""
    return dataclasses.replace(start, cache=dataclasses.replace(kv_cache, length=start.cache.length))


def _room(state: Prefilled) -> int:
    """New tokens that the cache has slots for; the last one is never fed. Prompts fill all but `max_new_tokens - 1`."""
    return state.cache.capacity - state.prompt_slots + 1


def _check_policy(policy: Policy, state: Prefilled) -> None:
    if policy.observes_scores and state.scores[0] is None:
        raise ValueError(f"{policy} needs the prompt's scores: name it in prefill(policies=...)")


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
