"""Prefill: prompts are read with full attention, chunk by chunk, and what policies observe of them is kept."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from recyc_jax import cache, model, sharding
from recyc_jax import prompts as prompt_arrays
from recyc_jax.attention import api
from recyc_jax.cache import KVCache, LayerCache, Leaf
from recyc_jax.config import LlamaConfig, whole_number
from recyc_jax.model import Params, Project
from recyc_jax.policies.base import Observed, Observes, Policy

PREFILL_CHUNK = 1024
PREFILL_TOKENS = 16384  # B * chunk at most: bounds a chunk's activations whatever the batch
CHUNK_MULTIPLE = 64  # longer chunks are multiples of this: matrix units want whole tiles


@flax.struct.dataclass
class Prefilled:
    """Prompts that have been read: what `decode` starts from, under any policy that was named to `prefill`."""

    cache: KVCache
    logits: Leaf  # float32 [B, V]: of each row's last prompt token
    observed: tuple[Observed, ...]  # what the named policies observe, a layer each
    prompt_slots: int = flax.struct.field(pytree_node=False)  # slots that the prompts fill, padding included
    room: int = flax.struct.field(pytree_node=False)  # new tokens that were asked for; the last one is never fed


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
    tokens, lengths = (sharding.spread(*one, tokens.shape[0]) for one in ((tokens, "B-"), (lengths, "B")))
    observes = functools.reduce(operator.or_, (policy.observes for policy in policies), Observes())
    return _prefill(params, tokens, lengths, config, max_new_tokens, observes, implementation)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _prefill(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    config: LlamaConfig,
    max_new_tokens: int,
    observes: Observes,
    implementation: str | None,
) -> Prefilled:
    attention = api.resolve(implementation)
    batch, width = tokens.shape
    chunk, chunks = _chunks(batch, width)
    prompt_slots = chunks * chunk
    starts = prompt_slots - lengths
    # right-align: slot s of row b holds token s - starts[b]
    positions = jnp.maximum(jnp.arange(prompt_slots, dtype=jnp.int32) - starts[:, None], 0)
    tokens = jnp.take_along_axis(tokens, jnp.minimum(positions, width - 1), axis=1)
    slots = prompt_slots + max_new_tokens - 1
    empty = cache.empty(config, batch, slots, _dtype(params), starts, attention.SLOTS_LAST)
    kept_queries = max(observes.windows, default=1)

    def read_chunk(index: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        states, _ = carry
        offset = index * chunk

        def attend(layer: int, project: Project, state: _Reading) -> tuple[Array, _Reading]:
            heads, kv = project(cached=state.kv, slot=offset)
            latest = jnp.concatenate([state.latest, heads.q], axis=1)[:, -kept_queries:]
            mass = state.mass
            if mass is None:
                out = attention.chunk(heads.q, kv.keys, kv.values, starts, offset)
            else:
                out, received = attention.chunk_with_mass(heads.q, kv.keys, kv.values, starts, offset)
                mass = mass + received
            return out, _Reading(kv, latest, heads.plain_q[:, -1], mass)

        here = lax.dynamic_slice_in_dim(tokens, offset, chunk, axis=1)
        at = lax.dynamic_slice_in_dim(positions, offset, chunk, axis=1)
        hidden, states = model.hidden_states(params, config, here, at, attend, states)
        return states, hidden[:, -1]

    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    dtype = _dtype(params)
    states = tuple(
        _Reading(
            kv,
            jnp.zeros((batch, kept_queries, heads, dim), dtype),
            jnp.zeros((batch, heads, dim), dtype),
            jnp.zeros((batch, kv_heads, heads // kv_heads, empty.capacity), jnp.float32) if observes.mass else None,
        )
        for kv in empty.layers
    )
    carry = (states, jnp.zeros((batch, config.hidden_size), dtype))
    # chunks that hold padding alone in every row are passed over
    states, hidden = lax.fori_loop(jnp.min(starts) // chunk, chunks, read_chunk, carry)
    kv_cache = KVCache(tuple(state.kv for state in states), starts, jnp.asarray(prompt_slots, jnp.int32))

    def observed(state: _Reading) -> Observed:
        scores = {
            window: attention.window_scores(state.latest[:, -window:], state.kv.keys, starts, kv_cache.length)
            for window in sorted(observes.windows)
        }
        query = (state.latest[:, -1], state.plain_q) if observes.query else (None, None)
        return Observed(scores, *query, state.mass)

    logits = model.logits(params, config, hidden)
    return Prefilled(kv_cache, logits, tuple(map(observed, states)), prompt_slots, max_new_tokens)


def _chunks(batch: int, width: int) -> tuple[int, int]:
    """The tokens of a chunk, and the number of chunks that hold `width` tokens."""
    chunks = -(-width // max(1, min(PREFILL_CHUNK, PREFILL_TOKENS // batch)))
    chunk = -(-width // chunks)
    if chunk > CHUNK_MULTIPLE:
        chunk = -(-chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return chunk, -(-width // chunk)


@flax.struct.dataclass
class _Reading:
    """One layer while prompts are read."""

    kv: LayerCache
    latest: Leaf  # [B, W, N, H]: the queries of the last W tokens read, after RoPE
    plain_q: Leaf  # [B, N, H]: that of the last token, before RoPE
    mass: Leaf | None  # float32 [B, K, G, S]


def _dtype(params: Params) -> Any:
    return params["embedding"].dtype
