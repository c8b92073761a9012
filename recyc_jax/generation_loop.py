"""The generation loop. Its carry (`DecodeState`) holds the KV cache and each layer's policy state: for recycled
attention the top-K slots. A period is `policy.period - 1` partial steps and one deciding step:

lax.while_loop, until all rows have ended:
    lax.while_loop over the partial steps of the period, a `lax.scan` of up to 16 of them at a time
    lax.cond: the deciding step if it is due, otherwise the unchanged state

The number of steps is known when the loop is compiled, or an array (`limit`). In the second case a scan may run over
the end: its further steps change nothing but the slot behind the last one, which the next step writes.

The choice between full and partial attention is the policy's (`RecycledAttention.deciding_step`): under a fixed stride
every deciding step is full; under the similarity schedule each row of each layer chooses, by a `lax.cond` in the layer
or, on a GPU, by kernels that skip rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
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
MOST_WITH_LIMIT = 8
"""The same where `limit` is an array, so that few steps run over it."""


class Stretch(NamedTuple):
    """A fixed run of the loop, for streams: `rounds` times a deciding step, if one is due, and up to `partial` partial
    steps. A host that runs it has nothing to wait for once its first deciding step is chosen, so that it prepares the
    next stretch meanwhile."""

    partial: int
    rounds: int = 1

    @classmethod
    def of(cls, policy: Policy) -> Stretch:
        """At most `MOST_PER_SCAN` steps, as few as can be of which are none."""
        period = policy.period
        if period is None:
            return cls(MOST_PER_SCAN)
        if period <= MOST_PER_SCAN:
            return cls(period - 1, MOST_PER_SCAN // period)
        return cls(min(range(MOST_PER_SCAN - 1, 3, -1), key=lambda steps: -(period - 1) % steps))

    def steps(self, policy: Policy, step: int) -> int:
        """The steps that it takes after step number `step`."""
        before, period = step, policy.period
        for _ in range(self.rounds):
            left = self.partial
            if period is not None:
                step += (step + 1) % period == 0
                left = min(left, period - 1 - step % period)
            step += left
        return step - before


@flax.struct.dataclass
class DecodeState:
    """The carry of the loop."""

    cache: KVCache
    policy_states: tuple[Any, ...]  # of each layer that a policy acts on; for recycled attention a `RecycledState`
    token: Leaf  # int32 [B]: chosen, not yet fed
    step: Leaf  # int32 []: decode steps taken since the prompt
    begun: Leaf  # int32 []: new tokens before column 0 of `output`
    done: Leaf  # bool [B]: the row has made an end-of-sequence token
    keys: Leaf | None  # PRNG keys [B], or None
    output: Any  # [B, M], one array or more: what is recorded of each new token
    lengths: Leaf  # int32 [B]: new tokens so far, the end-of-sequence token included
    full_steps: Leaf  # int32 [B, L]: full-attention decode steps that made one of those tokens, of the same layers
    sampling: Any = ()  # what `choose` carries from token to token, arrays with the rows first


Choose = Callable[[Array, DecodeState], tuple[Array, Any, Array, Any]]
"""(logits [B, V], state) -> the next token [B], what to record of it [B, ...], which rows have ended [B], `sampling`"""


def run(
    params: Params,
    config: LlamaConfig,
    prefilled: Prefilled,
    policy: Policy,
    attention: Implementation,
    choose: Choose,
    output: Any,
    keys: Array | None,
    limit: Array | None = None,
    bound: int | None = None,
) -> DecodeState:
    """The state after M tokens, the first one from prefill's logits and each further one from a decode step; or
    earlier, once all rows have ended. `choose` picks each token; `output` [B, M] is filled with what it records.
    `limit`, an int32 [] array of at most M, takes M's place. `bound` is the most steps from the prompt on, later calls
    included that go on from this state (None: M - 1)."""
    state = begin(prefilled, config, policy, attention, choose, output, keys, bound)
    last = None if limit is None else limit - 1
    return proceed(params, config, policy, attention, choose, prefilled.row_lengths, state, last, bound)


def begin(
    prefilled: Prefilled,
    config: LlamaConfig,
    policy: Policy,
    attention: Implementation,
    choose: Choose,
    output: Any,
    keys: Array | None,
    bound: int | None,
    sampling: Any = (),
) -> DecodeState:
    """The state with the first token chosen, from prefill's logits."""
    rows, columns = jax.tree.leaves(output)[0].shape[:2]
    zeros, step = jnp.zeros(rows, jnp.int32), jnp.zeros((), jnp.int32)
    caches = _caches(prefilled.cache, columns - 1 if bound is None else bound)
    policy_states = acting(policy, config).start(attention, prefilled.stats, caches)
    counts = jnp.zeros((rows, len(config.full_layers)), jnp.int32)
    state = DecodeState(
        prefilled.cache, policy_states, zeros, step, step, zeros > 0, keys, output, zeros, counts, sampling
    )
    return _with_next_token(state, choose, prefilled.logits)


def proceed(
    params: Params,
    config: LlamaConfig,
    policy: Policy,
    attention: Implementation,
    choose: Choose,
    row_lengths: Array,
    state: DecodeState,
    last: Array | None,
    bound: int | None,
    stretch: Stretch | None = None,
) -> DecodeState:
    """The state after decode step number `last`, counted from the prompt, or earlier, once all rows have ended; None: as
    many steps as `output` has columns after the first. With a `stretch`, `last` is a step that it reaches."""
    columns = jax.tree.leaves(state.output)[0].shape[1]
    steps, policy = columns - 1 if last is None else last, acting(policy, config)
    if columns == 1 and last is None:
        return state
    most_steps, period = columns - 1 if bound is None else bound, policy.period
    take_step = functools.partial(
        decode_step, params, config, policy, attention, choose, row_lengths, most_steps, bound is not None
    )
    if last is None:
        # one compiled scan fits everywhere: its length divides the partial steps of a period and those after the last
        most = period or columns  # a policy that never decides takes partial steps alone
        per_scan = _largest_common_divisor(min(most - 1, columns - 1), (columns - 1) % most)
    else:
        per_scan = _steps_at_once(policy) if stretch is None else stretch.partial

    def unfinished(state: DecodeState) -> Array:
        return (state.step < steps) & ~jnp.all(state.done)

    def is_next(state: DecodeState, deciding: bool) -> Array:
        """Whether the next step is a deciding one, or is none."""
        if period is None:
            return jnp.asarray(not deciding)
        is_deciding = (state.step + 1) % period == 0
        return is_deciding if deciding else ~is_deciding

    def one_partial_step(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        after = take_step(state, deciding=False)
        if last is not None:
            after = _chosen(is_next(state, deciding=False) & (state.step < steps), after, state)
        return after, None

    def partial_steps(state: DecodeState) -> DecodeState:
        return lax.scan(one_partial_step, state, length=per_scan)[0]

    def decided(state: DecodeState) -> DecodeState:
        if period is None:
            return state
        decides = unfinished(state) & is_next(state, deciding=True)
        return lax.cond(decides, functools.partial(take_step, deciding=True), lambda state: state, state)

    def one_period(state: DecodeState) -> DecodeState:
        if period != 1:
            state = lax.while_loop(lambda s: unfinished(s) & is_next(s, deciding=False), partial_steps, state)
        return decided(state)

    def one_round(state: DecodeState, _: None) -> tuple[DecodeState, None]:
        return partial_steps(decided(state)), None

    if stretch is not None:
        return lax.scan(one_round, state, length=stretch.rounds)[0]
    return lax.while_loop(unfinished, one_period, state)


def _steps_at_once(policy: Policy) -> int:
    """The partial steps that the loop takes in one go where `limit` is an array."""
    return 4 if policy.period is None else _largest_common_divisor(policy.period - 1, most=MOST_WITH_LIMIT)


def acting(policy: Policy, config: LlamaConfig) -> Policy:
    """The policy that acts: full attention where there is no layer for one, since each has a sliding window."""
    return policy if config.full_layers else FullAttention()


def _chosen(is_taken: Array, after: DecodeState, before: DecodeState) -> DecodeState:
    """`after` if the step counts, `before` otherwise, in whose cache only the slot behind the last one differs. What a
    step leaves as it is, such as a kept set, costs nothing here."""

    def pick(new: Any, old: Any) -> Any:
        return old if new is old else jnp.where(is_taken, new, old)

    names = [field.name for field in dataclasses.fields(after) if field.name != "cache"]
    kept = {name: jax.tree.map(pick, getattr(after, name), getattr(before, name)) for name in names}
    length = jnp.where(is_taken, after.cache.length, before.cache.length)
    return dataclasses.replace(after, cache=dataclasses.replace(after.cache, length=length), **kept)


def decode_step(
    params: Params,
    config: LlamaConfig,
    policy: Policy,
    attention: Implementation,
    choose: Choose,
    row_lengths: Array,
    bound: int,
    goes_on: bool,
    state: DecodeState,
    deciding: bool,
) -> DecodeState:
    """One step: feed the pending token, attend as the policy says, choose the next token. Layers with a sliding window
    attend to their window, whatever the policy (`cached_attention.py`); `goes_on`: a further turn may follow."""
    slot, starts, number = state.cache.length, state.cache.starts, state.step + 1

    def read(layer: int, heads: Heads, cached: LayerCache, policy_state: Any) -> tuple[Array, Any]:
        step = Step(heads.q[:, 0], heads.q_before_rope[:, 0], cached, starts, slot + 1, number, state.done)
        attend = policy.deciding_step if deciding else policy.partial_step
        out, policy_state, full, noted = attend(attention, step, policy_state)
        return out[:, None], (policy_state, full, noted)

    carried = dict(zip(config.full_layers, state.policy_states, strict=True))
    layers = tuple((cached, carried.get(layer)) for layer, cached in enumerate(state.cache.layers))
    is_real = state.lengths > state.step if goes_on else None  # rows that end still feed the token they end with
    positions, attend = (slot - starts)[:, None], CachedAttention(slot, starts, attention, read, goes_on=is_real)
    decoder_layers = attention.decoder_layers(config, state.token.shape[0], params["embedding"].dtype)
    hidden, layers = model.hidden_states(
        params, config, state.token[:, None], positions, attend, layers, row_lengths, decoder_layers
    )
    cached, results = zip(*layers, strict=True)
    results = [results[layer] for layer in config.full_layers]
    policy_states, full, noted = (tuple(field) for field in zip(*results, strict=True)) if results else ((), (), ())
    cache = KVCache(cached, starts, slot + 1)
    if deciding:
        policy_states = policy.refresh(attention, policy_states, noted, _caches(cache, bound))
    counts = state.full_steps
    if full:
        counts = counts + (jnp.stack(full, axis=1) & ~state.done[:, None]).astype(jnp.int32)
    after = dataclasses.replace(state, cache=cache, policy_states=policy_states, step=number, full_steps=counts)
    return _with_next_token(after, choose, model.logits(params, config, hidden[:, 0]))


def _with_next_token(state: DecodeState, choose: Choose, logits: Array) -> DecodeState:
    """The state with the token that follows `logits` chosen, and recorded in its column."""
    token, value, done, sampling = choose(logits, state)
    output = jax.tree.map(
        lambda columns, new: lax.dynamic_update_slice_in_dim(columns, new[:, None], state.step - state.begun, axis=1),
        state.output,
        value,
    )
    lengths = state.lengths + (~state.done).astype(jnp.int32)
    return dataclasses.replace(state, token=token, done=done, output=output, lengths=lengths, sampling=sampling)


def _caches(cache: KVCache, steps: int) -> Caches:
    return Caches(cache.full_layers, cache.visible, cache.length, steps)


def _largest_common_divisor(*numbers: int, most: int = MOST_PER_SCAN) -> int:
    """The largest number up to `most` that divides all of them."""
    return next(n for n in range(most, 0, -1) if all(number % n == 0 for number in numbers))
