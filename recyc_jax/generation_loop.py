"""The generation loop. Its carry (`DecodeState`) holds the KV cache and each layer's policy state: for recycled
attention the top-K slots. A period is `policy.period - 1` partial steps and one deciding step:

lax.while_loop, until all rows have ended:
    lax.while_loop over the partial steps of the period, a `lax.scan` of up to 16 of them at a time
    lax.cond: the deciding step if it is due, otherwise the unchanged state

The choice between full and partial attention is the policy's (`RecycledAttention.deciding_step`): under a fixed stride
every deciding step is full; under the similarity schedule each row of each layer chooses, by a `lax.cond` in the layer
or, on a GPU, by kernels that skip rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from recyc_jax import model
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import KVCache, LayerCache, Leaf
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Heads, Params
from recyc_jax.policies.base import Caches, Policy, Step
from recyc_jax.policies.full import FullAttention
from recyc_jax.prefilling import Prefilled

MOST_PER_SCAN = 16
"""The loop looks after at most this many partial steps whether all rows have ended."""


@flax.struct.dataclass
class DecodeState:
    """The carry of the loop."""

    cache: KVCache
    policy_states: tuple[Any, ...]  # of each layer that a policy acts on; for recycled attention a `RecycledState`
    token: Leaf  # int32 [B]: chosen, not yet fed
    step: Leaf  # int32 []: decode steps taken
    done: Leaf  # bool [B]: the row has made an end-of-sequence token
    keys: Leaf | None  # PRNG keys [B], or None
    output: Leaf  # [B, M]: what is recorded of each new token
    lengths: Leaf  # int32 [B]: new tokens so far, the end-of-sequence token included
    full_steps: Leaf  # int32 [B, L]: full-attention decode steps that made one of those tokens, of the same layers


Choose = Callable[[Array, DecodeState], tuple[Array, Array, Array]]
"""(logits [B, V], state) -> the next token [B], what to record of it [B], which rows have ended [B]"""


def run(
    params: Params,
    config: LlamaConfig,
    prefilled: Prefilled,
    policy: Policy,
    attention: Implementation,
    choose: Choose,
    output: Array,
    keys: Array | None,
) -> DecodeState:
    """The state after M tokens, the first one from prefill's logits and each further one from a decode step; or
    earlier, once all rows have ended. `choose` picks each token; `output` [B, M] is filled with what it records."""
    rows, steps = output.shape[0], output.shape[1] - 1
    zeros, step = jnp.zeros(rows, jnp.int32), jnp.zeros((), jnp.int32)
    if not config.full_layers:
        policy = FullAttention()  # no layer for a policy to act on: every one has a sliding window
    policy_states = policy.start(attention, prefilled.stats, _caches(prefilled.cache, steps))
    counts = jnp.zeros((rows, len(config.full_layers)), jnp.int32)
    state = DecodeState(prefilled.cache, policy_states, zeros, step, zeros > 0, keys, output, zeros, counts)
    state = _with_next_token(state, choose, prefilled.logits)
    if steps == 0:
        return state
    period = policy.period or steps + 1  # a policy that never decides takes partial steps alone
    take_step = functools.partial(decode_step, params, config, policy, attention, choose, prefilled.row_lengths)
    # one compiled scan fits everywhere: its length divides the partial steps of a period and those after the last period
    per_scan = _largest_common_divisor(min(period - 1, steps), steps % period)

    def unfinished(state: DecodeState) -> Array:
        return (state.step < steps) & ~jnp.all(state.done)

    def decides(state: DecodeState) -> Array:
        return unfinished(state) & ((state.step + 1) % period == 0)

    def partial_steps(state: DecodeState) -> DecodeState:
        return lax.scan(lambda carry, _: (take_step(carry, deciding=False), None), state, length=per_scan)[0]

    def one_period(state: DecodeState) -> DecodeState:
        if period > 1:
            state = lax.while_loop(lambda s: unfinished(s) & ((s.step + 1) % period != 0), partial_steps, state)
        if policy.period is None:
            return state
        return lax.cond(decides(state), functools.partial(take_step, deciding=True), lambda state: state, state)

    return lax.while_loop(unfinished, one_period, state)


def decode_step(
    params: Params,
    config: LlamaConfig,
    policy: Policy,
    attention: Implementation,
    choose: Choose,
    row_lengths: Array,
    state: DecodeState,
    deciding: bool,
) -> DecodeState:
    """One step: feed the pending token, attend as the policy says, choose the next token. Layers with a sliding window
    attend to their window, whatever the policy (`cached_attention.py`)."""
    slot, starts, number = state.cache.length, state.cache.starts, state.step + 1

    def read(layer: int, heads: Heads, cached: LayerCache, policy_state: Any) -> tuple[Array, Any]:
        step = Step(heads.q[:, 0], heads.q_before_rope[:, 0], cached, starts, slot + 1, number, state.done)
        attend = policy.deciding_step if deciding else policy.partial_step
        out, policy_state, full, noted = attend(attention, step, policy_state)
        return out[:, None], (policy_state, full, noted)

    carried = dict(zip(config.full_layers, state.policy_states, strict=True))
    layers = tuple((cached, carried.get(layer)) for layer, cached in enumerate(state.cache.layers))
    positions, attend = (slot - starts)[:, None], CachedAttention(slot, starts, attention, read)
    decoder_layers = attention.decoder_layers(config, state.token.shape[0], params["embedding"].dtype)
    hidden, layers = model.hidden_states(
        params, config, state.token[:, None], positions, attend, layers, row_lengths, decoder_layers
    )
    cached, results = zip(*layers, strict=True)
    results = [results[layer] for layer in config.full_layers]
    policy_states, full, noted = (tuple(field) for field in zip(*results, strict=True)) if results else ((), (), ())
    cache = KVCache(cached, starts, slot + 1)
    if deciding:
        policy_states = policy.refresh(attention, policy_states, noted, _caches(cache, state.output.shape[1] - 1))
    counts = state.full_steps
    if full:
        counts = counts + (jnp.stack(full, axis=1) & ~state.done[:, None]).astype(jnp.int32)
    after = dataclasses.replace(state, cache=cache, policy_states=policy_states, step=number, full_steps=counts)
    return _with_next_token(after, choose, model.logits(params, config, hidden[:, 0]))


def _with_next_token(state: DecodeState, choose: Choose, logits: Array) -> DecodeState:
    """The state with the token that follows `logits` chosen, and recorded in column `step`."""
    token, value, done = choose(logits, state)
    output = lax.dynamic_update_slice_in_dim(state.output, value[:, None], state.step, axis=1)
    lengths = state.lengths + (~state.done).astype(jnp.int32)
    return dataclasses.replace(state, token=token, done=done, output=output, lengths=lengths)


def _caches(cache: KVCache, steps: int) -> Caches:
    return Caches(cache.full_layers, cache.visible, cache.length, steps)


def _largest_common_divisor(*numbers: int) -> int:
    """The largest number up to `MOST_PER_SCAN` that divides all of them."""
    return next(n for n in range(MOST_PER_SCAN, 0, -1) if all(number % n == 0 for number in numbers))
