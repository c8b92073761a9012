"""`generate` and `decode`: new tokens after prompts, under a policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Key

from recyc_jax import generation_loop, implementations
from recyc_jax.cache import KVCache
from recyc_jax.config import LlamaConfig
from recyc_jax.generation_loop import DecodeState
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.registry import as_policy
from recyc_jax.prefilling import Prefilled, prefill
from recyc_jax.sampling import Greedy, Sample, independent
from recyc_jax.validation import whole_number


class Generation(NamedTuple):
    """What `generate` returns."""

    tokens: Array  # int32 [B, max_new_tokens]: pad_id after a row's end
    lengths: Array  # int32 [B]: new tokens of each row, its eos included
    full_steps: Array  # int32 [B, L]: full-attention decode steps within `lengths`; prefill not counted. L counts
    # the layers with full attention, not those with a sliding window


def generate(
    params: Params,
    config: LlamaConfig,
    prompts: Any,
    *,
    policy: Policy | str = FullAttention(),
    max_new_tokens: int = 64,
    sampling: Greedy | Sample = Greedy(),
    eos_ids: Any = None,
    pad_id: int = 0,
    key: Any = None,
    prompt_lengths: Any = None,
    implementation: str | None = None,
    allow_beyond_context: bool = False,
) -> Generation:
    """New tokens after each prompt under a policy, or under the policy that a string names (`parse_policy`).

    `prompts` is a list of ragged token-id lists (padded to a bucket of lengths: two calls of one bucket compile
    once), what a transformers tokenizer returns for several texts, or an int array [B, T], right-padded, with
    `prompt_lengths` [B]; the array form also works inside `jax.jit`. In batches of one shape (rows, padded length,
    `max_new_tokens`), a row's tokens are the same bit for bit whatever its neighbours hold and however long they are,
    under every policy and in every dtype. Alone or in a batch of another shape they are the same up to rounding, since
    matrix products then sum in another order: float32 tokens differ only where two choices nearly tie, bfloat16 tokens
    often do within a few to some tens of steps.
    `eos_ids` is one id or several; None takes the config's, `()` none. `key` is one PRNG key or one per row. Raises
    ValueError naming the argument at fault, before the prompts are read; also for prompts that with their new tokens
    exceed the model's context, unless `allow_beyond_context`.
    """
    policy = as_policy(policy)
    _sampling_arguments(config, sampling, eos_ids, pad_id, key, None)  # only its checks, before the prompts are read
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
    )
    return out


def decode(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    *,
    policy: Policy | str,
    max_new_tokens: int | None = None,
    sampling: Greedy | Sample = Greedy(),
    eos_ids: Any = None,
    pad_id: int = 0,
    key: Any = None,
    implementation: str | None = None,
) -> tuple[Generation, Prefilled]:
    """New tokens after prefilled prompts, and the state rewound to the prompts, from which to decode again.

    `state` is donated: use the returned one from here on. `max_new_tokens` defaults to what prefill left room for.
    Raises ValueError where it exceeds that, where the policy needs statistics that prefill was not asked to keep, and
    where sampling lacks a key."""
    policy = as_policy(policy)
    check_state(state, policy, implementation)
    new_tokens = state.room if max_new_tokens is None else whole_number("max_new_tokens", max_new_tokens, 1)
    if new_tokens > state.room:
        raise ValueError(f"max_new_tokens={new_tokens} must lie in 1..{state.room}: prefill made room for {state.room}")
    keys, eos, pad = _sampling_arguments(config, sampling, eos_ids, pad_id, key, state.logits.shape[0])
    return decode_tokens(params, state, keys, config, policy, new_tokens, sampling, eos, pad, implementation)


def lower_decode(params: Params, config: LlamaConfig, state: Prefilled, *, policy: Policy | str) -> jax.stages.Lowered:
    """The program of `decode(params, config, state, policy=policy)`, traced but not compiled. Compiled, it is called with
    `(params, state, None)`. Raises ValueError as `decode` does."""
    policy = as_policy(policy)
    check_state(state, policy, None)
    _, eos, pad = _sampling_arguments(config, Greedy(), None, 0, None, None)
    return decode_tokens.lower(params, state, None, config, policy, state.room, Greedy(), eos, pad, None)


@functools.partial(
    jax.jit,
    static_argnames=("config", "policy", "new_tokens", "sampling", "eos_ids", "pad_id", "implementation"),
    donate_argnames="state",
)
def decode_tokens(
    params: Params,
    state: Prefilled,
    keys: Key[Array, " B"] | None,
    config: LlamaConfig,
    policy: Policy,
    new_tokens: int,
    sampling: Greedy | Sample,
    eos_ids: tuple[int, ...],
    pad_id: int,
    implementation: str | None,
) -> tuple[Generation, Prefilled]:
    """The program behind `decode`: `new_tokens` tokens, which take one decode step fewer."""

    def choose(logits: Array, carry: DecodeState) -> tuple[Array, Array, Array]:
        token = jnp.where(carry.done, pad_id, sampling(logits, carry.keys, carry.step))
        done = carry.done
        for eos in eos_ids:
            done = done | (token == eos)
        return token, token, done

    output = jnp.full((state.logits.shape[0], new_tokens), pad_id, jnp.int32)
    attention = implementations.resolve(implementation)
    end = generation_loop.run(params, config, state, policy, attention, choose, output, keys)
    return Generation(end.output, end.lengths, end.full_steps), rewound(end.cache, state)


def rewound(kv_cache: KVCache, start: Prefilled) -> Prefilled:
    """The state as prefill left it: what decoding wrote beyond the prompt is no longer visible. The caches are handed
    back because the donated ones were written in place. Rings, in which new tokens overwrote the prompt's, are those of
    the start, so XLA keeps a copy of them."""
    layers = tuple(
        now if now.window is None else before for now, before in zip(kv_cache.layers, start.cache.layers, strict=True)
    )
    return dataclasses.replace(start, cache=dataclasses.replace(kv_cache, layers=layers, length=start.cache.length))


# --- checks of what the caller passes --------------------------------------------------------------------------------


def check_state(state: Prefilled, policy: Policy, implementation: str | None) -> None:
    """Raise ValueError for a state that was donated, is stored in another implementation's layout, or lacks what the
    policy needs of the prompt."""
    if isinstance(state.logits, jax.Array) and not isinstance(state.logits, Tracer) and state.logits.is_deleted():
        raise ValueError("this state was donated to an earlier decode: use the state that it returned")
    if state.cache.layers[0].slots_last != implementations.resolve(implementation).slots_last:
        raise ValueError(
            f"implementation={implementation!r} stores its cache in another layout than this state's: prefill with it"
        )
    if not state.stats:  # every layer has a sliding window
        return
    needs, stats = policy.needs, state.stats[0]
    missing = {
        "scores": not needs.windows <= stats.scores.keys(),
        "last query": needs.query and stats.q is None,
        "accumulated attention": needs.mass and stats.mass is None,
    }
    for what in (name for name, lacks in missing.items() if lacks):
        raise ValueError(f"{policy} needs the prompt's {what}: name it in prefill(policies=...)")


def _sampling_arguments(
    config: LlamaConfig, sampling: Greedy | Sample, eos_ids: Any, pad_id: Any, key: Any, batch: int | None
) -> tuple[Key[Array, " B"] | None, tuple[int, ...], int]:
    """The rows' keys, the end-of-sequence ids and the pad id. Raises ValueError naming the argument at fault. `batch`
    is None where it is not known yet: then no keys are made."""
    keys = None if isinstance(sampling, Greedy) else _row_keys(key, batch)
    if eos_ids is None:
        eos_ids = config.eos_token_ids
    elif isinstance(eos_ids, np.ndarray | jax.Array):
        eos_ids = np.ravel(eos_ids)
    elif not isinstance(eos_ids, Iterable) or isinstance(eos_ids, str):
        eos_ids = (eos_ids,)
    ids = sorted({whole_number("eos_ids", token, 0) for token in eos_ids})
    return keys, tuple(ids), whole_number("pad_id", pad_id, 0)


def _row_keys(key: Any, batch: int | None) -> Key[Array, " B"] | None:
    """One PRNG key per row: those given, or folded from the one given."""
    if not isinstance(key, jax.Array):
        raise ValueError(f"sampling needs a key: pass key=jax.random.key(seed), not {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except TypeError as error:
            raise ValueError(f"key holds no PRNG key: pass jax.random.key(seed) ({error})") from None
    key = independent(key)
    if batch is None:
        return None
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one per row ({batch}), not {list(key.shape)}")
    if key.shape:
        return key
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
