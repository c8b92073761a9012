"""States in the middle of an answer, and back at its beginning."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from recyc_jax.cache import KVCache
from recyc_jax.generation_loop import DecodeState
from recyc_jax.policies.base import Policy
from recyc_jax.prefilling import NOWHERE, Answer, Prefilled, with_tokens, without_tokens


def standing(end: DecodeState, policy: Policy, start: Prefilled, tokens: Array) -> Prefilled:
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
    return answered(start, end.cache, answer, tokens, end.begun)


def answered(start: Prefilled, cache: KVCache, answer: Answer, tokens: Array, begun: Array) -> Prefilled:
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
