"""Prefill: prompts are read with full attention, chunk by chunk, and what policies need to know of them is kept."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from recyc_jax import cache, implementations, model, sharding, state_files
from recyc_jax import prompts as prompt_arrays
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import KVCache, LayerCache, Leaf
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Heads, Params
from recyc_jax.policies.base import Policy, PromptNeeds, PromptStats
from recyc_jax.policies.registry import as_policy
from recyc_jax.state_files import Origin
from recyc_jax.validation import whole_number

PREFILL_CHUNK = 1024
PREFILL_TOKENS = 16384  # B * chunk at most: bounds the activations of a chunk whatever the batch
COLUMNS = 64  # numbers of new tokens are rounded up to multiples of this, so that few programs are compiled
CHUNK_MULTIPLE = 64  # longer chunks are multiples of this: matrix units want whole tiles
NOWHERE = 2**31 - 1
"""The place of a token that a row does not have."""


@flax.struct.dataclass
class Read:
    """What is kept of one layer while prompts are read, and for the turns that follow them."""

    queries: Leaf  # [B, W, N, H]: the queries of the last W tokens read, after RoPE
    q_before_rope: Leaf  # [B, N, H]: the query of the last token read, before RoPE
    mass: Leaf | None  # float32 [B, K, G, S]: the attention that each key has received


@flax.struct.dataclass
class Answer:
    """Where decoding stands in an answer: what the next call of `decode` goes on from."""

    policy: Policy = flax.struct.field(pytree_node=False)
    policy_states: tuple[Any, ...]  # of each layer with full attention
    token: Leaf  # int32 [B]: chosen, not yet fed
    step: Leaf  # int32 [], or by row [B] (`lossless.py`): decode steps taken, one fewer than the tokens chosen
    done: Leaf  # bool [B]: rows that have ended
    keys: Any  # PRNG keys [B], or None
    lengths: Leaf  # int32 [B]: new tokens of each row, its end-of-sequence token included
    full_steps: Leaf  # int32 [B, L]
    sampling: Any  # what processors carry from token to token
    prompt_length: Leaf  # int32 []: slots written when the prompts had been read
    rings: tuple[LayerCache, ...]  # the caches of the layers with a sliding window, at that time
    room: int = flax.struct.field(pytree_node=False)  # new tokens that there was room for, at that time


@flax.struct.dataclass
class Prefilled:
    """Prompts that have been read: what `decode` starts from, under any policy that was named to `prefill`."""

    cache: KVCache
    logits: Leaf  # float32 [B, V]: of each row's last prompt token
    stats: tuple[PromptStats, ...]  # what the named policies need, per layer with full attention
    read: tuple[Read, ...]  # of the same layers
    row_lengths: Leaf  # int32 [B]: the tokens of each row, the new ones that were asked for included
    first_places: Leaf  # int32 [B, V]: where each row has each token first, counted from its beginning, or NOWHERE
    needs: PromptNeeds = flax.struct.field(pytree_node=False)  # those of the named policies
    prompt_slots: int = flax.struct.field(pytree_node=False)  # slots that the prompts fill, padding included
    room: int = flax.struct.field(pytree_node=False)  # new tokens that were asked for; the last one is never fed
    answer: Answer | None = None  # where decoding stands, if it was told not to rewind
    origin: Origin | None = flax.struct.field(pytree_node=False, default=None)  # the model, for `save`

    @property
    def seen(self) -> Array:
        """bool [B, V]: the tokens that each row has, for `sampling.Processor`."""
        return self.first_places < NOWHERE

    def without_room(self) -> Prefilled:
        """The state as programs take it, which are not compiled for each number of new tokens and each model."""
        answer = None if self.answer is None else dataclasses.replace(self.answer, room=0)
        return dataclasses.replace(self, room=0, answer=answer, origin=None)

    def save(self, folder: Path | str, params: Any = None, config: LlamaConfig | None = None, **facts: Any) -> None:
        """Write the state to a folder, from which `load_state` reads it: the caches, what policies need, and where decoding
        stands in an answer. An earlier state there is replaced in one step. `params` and `config` are needed only if the
        state was made inside `jax.jit`, or its model's parameters are gone; `facts`, of JSON's types, go into the card.

        Raises ValueError for a donated state, for a folder that holds something else, and in the middle of an answer
        under a policy whose state is of a class from outside of this package; OSError if the folder cannot be written."""
        if self.logits.is_deleted():
            raise ValueError("this state was donated to an earlier call: save the state that it returned")
        if params is not None and config is not None:
            origin = Origin(params, config)
        elif self.origin is None:
            raise ValueError("this state does not know its model: pass params and config to save")
        else:
            origin = self.origin
        held = int(self.cache.length) - np.asarray(self.cache.starts)
        noted = {
            "rows": len(held),
            "tokens": held.tolist(),
            "policy": None if self.answer is None else str(self.answer.policy),
            "statistics": {
                "windows": sorted(self.needs.windows),
                "query": self.needs.query,
                "mass": self.needs.mass,
            },
        }
        state_files.write(folder, self, origin.model(), noted | {"notes": facts})


def prefill(
    params: Params,
    config: LlamaConfig,
    prompts: Any,
    *,
    policies: Sequence[Policy | str] | Policy | str = (),
    max_new_tokens: int = 64,
    prompt_lengths: Any = None,
    implementation: str | None = None,
    allow_beyond_context: bool = False,
) -> Prefilled:
    """The prompts' KV caches, next-token logits and what `policies` (policies or policy strings) need of them.

    `prompts` is a list of ragged token-id lists, what a transformers tokenizer returns for several texts, or an int
    array [B, T], right-padded, with `prompt_lengths` [B]. The cache has room for `max_new_tokens`. Attention is causal
    and full over chunks of the prompt, so memory beyond the cache does not grow with T. Raises ValueError for empty
    prompts, ids outside the vocabulary, and prompts that with their new tokens exceed the config's
    `max_position_embeddings`, unless `allow_beyond_context` (inside `jax.jit`, where lengths are not known, nothing is
    checked)."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    implementations.resolve(implementation)
    named = (policies,) if isinstance(policies, Policy | str) else policies
    needs = functools.reduce(operator.or_, (as_policy(policy).needs for policy in named), PromptNeeds())
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) > 1:
        raise ValueError(f"params mix {' and '.join(sorted(dtypes))}: cast them to one dtype")
    tokens, lengths = prompt_arrays.as_arrays(prompts, prompt_lengths, config)
    if not allow_beyond_context:
        prompt_arrays.check_context(lengths, max_new_tokens, config)
    rows = tokens.shape[0]
    tokens, lengths = sharding.spread(tokens, "B-", rows), sharding.spread(lengths, "B", rows)
    state = read_prompts(
        params,
        tokens,
        lengths,
        config,
        columns(max_new_tokens) + 1 + needs.spare,
        needs,
        implementation,
        lengths + max_new_tokens,
    )
    return dataclasses.replace(state, room=max_new_tokens, origin=Origin.of(params, config))


def columns(new_tokens: int) -> int:
    """`new_tokens` rounded up to the sizes that programs are compiled for."""
    return -(-new_tokens // COLUMNS) * COLUMNS


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "needs", "implementation"))
def read_prompts(
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    config: LlamaConfig,
    max_new_tokens: int,
    needs: PromptNeeds,
    implementation: str | None,
    row_lengths: Int[Array, " B"] | None = None,
) -> Prefilled:
    """The program behind `prefill`: the cache has room for `max_new_tokens`, the last of which is never fed. A row is
    expected to have `row_lengths` tokens in the end (None: `max_new_tokens` new ones)."""
    attention = implementations.resolve(implementation)
    batch, width = tokens.shape
    chunk, chunks = chunks_of(batch, width)
    prompt_slots = chunks * chunk
    starts = prompt_slots - lengths
    # right-align: slot s of row b holds token s - starts[b]
    positions = jnp.maximum(jnp.arange(prompt_slots, dtype=jnp.int32) - starts[:, None], 0)
    tokens = jnp.take_along_axis(tokens, jnp.minimum(positions, width - 1), axis=1)
    dtype = params["embedding"].dtype
    slots = prompt_slots + max_new_tokens - 1
    empty = cache.empty(config, batch, slots, dtype, starts, attention.slots_last)
    layers = tuple(
        (cached, _nothing_read(config, batch, cached, needs) if cached.window is None else None)
        for cached in empty.layers
    )
    row_lengths = lengths + max_new_tokens if row_lengths is None else row_lengths

    def read_chunk(index: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        layers, _ = carry
        offset = index * chunk
        read = functools.partial(attend_chunk, attention, starts, None, offset)
        attend = CachedAttention(offset, starts, attention, read)
        chunk_tokens = lax.dynamic_slice_in_dim(tokens, offset, chunk, axis=1)
        chunk_positions = lax.dynamic_slice_in_dim(positions, offset, chunk, axis=1)
        chunk_inputs = chunk_tokens, chunk_positions, attend, layers, row_lengths
        hidden, layers = model.hidden_states(params, config, *chunk_inputs)
        return layers, hidden[:, -1]

    carry = (layers, jnp.zeros((batch, config.hidden_size), dtype))
    # chunks that hold padding alone in every row are skipped
    layers, hidden = lax.fori_loop(jnp.min(starts) // chunk, chunks, read_chunk, carry)
    length = jnp.asarray(prompt_slots, jnp.int32)
    of_full = [(cached, read) for cached, read in layers if cached.window is None]
    stats = tuple(prompt_stats(attention, cached, read, starts, length, needs) for cached, read in of_full)
    kv_cache = KVCache(tuple(cached for cached, _ in layers), starts, length)
    logits, read = model.logits(params, config, hidden), tuple(read for _, read in of_full)
    is_token = jnp.arange(prompt_slots, dtype=jnp.int32) >= starts[:, None]
    places = jnp.full((batch, config.vocab_size), NOWHERE, jnp.int32)
    places = with_tokens(places, tokens, jnp.where(is_token, positions, NOWHERE))
    return Prefilled(kv_cache, logits, stats, read, row_lengths, places, needs, prompt_slots, max_new_tokens)


def with_tokens(first_places: Array, tokens: Array, places: Array) -> Array:
    """`first_places` [B, V] with these tokens [B, T] at these places [B, T], which are NOWHERE for padding."""
    return first_places.at[jnp.arange(first_places.shape[0])[:, None], tokens].min(places)


def without_tokens(first_places: Array, counts: Array) -> Array:
    """`first_places` [B, V] of each row's first `counts` [B] tokens alone."""
    return jnp.where(first_places < counts[:, None], first_places, NOWHERE)


def chunks_of(batch: int, width: int) -> tuple[int, int]:
    """The tokens of a chunk, and the number of chunks that hold `width` tokens."""
    chunks = -(-width // max(1, min(PREFILL_CHUNK, PREFILL_TOKENS // batch)))
    chunk = -(-width // chunks)
    if chunk > CHUNK_MULTIPLE:
        chunk = -(-chunk // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
    return chunk, -(-width // chunk)


def _nothing_read(config: LlamaConfig, batch: int, cached: LayerCache, needs: PromptNeeds) -> Read:
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    dtype, mass = cached.stored_keys.dtype, (batch, kv_heads, heads // kv_heads, cached.capacity)
    return Read(
        jnp.zeros((batch, max(needs.windows, default=1), heads, dim), dtype),
        jnp.zeros((batch, heads, dim), dtype),
        jnp.zeros(mass, jnp.float32) if needs.mass else None,
    )


def attend_chunk(
    attention: Implementation,
    starts: Array,
    first: Array | None,
    offset: Array,
    layer: int,
    heads: Heads,
    cached: LayerCache,
    read: Read,
) -> tuple[Array, Read]:
    """Attention of one chunk in one layer, and what is kept of it. A row's new tokens are those in slots from `first` on
    (None: from `starts` on); there are some in every row's last chunk."""
    width, kept = heads.q.shape[1], read.queries.shape[1]
    queries, q_before_rope = jnp.concatenate([read.queries, heads.q], axis=1), heads.q_before_rope[:, -1]
    if first is None:
        queries = queries[:, -kept:]
    else:
        new = jnp.clip(offset + width - first, 0, width)[:, None]
        place = jnp.arange(kept, dtype=jnp.int32)
        place = place + jnp.where(kept - place <= new, width, new)  # the newest, of which `new` are from this chunk
        queries = jnp.take_along_axis(queries, place[:, :, None, None], axis=1)
        q_before_rope = jnp.where(new[:, :, None] > 0, q_before_rope, read.q_before_rope)
    mass = read.mass
    if mass is None:
        out = attention.chunk(heads.q, cached, starts, offset)
    else:
        out, received = attention.chunk_with_mass(heads.q, cached, starts, offset, first)
        mass = mass + received
    return out, Read(queries, q_before_rope, mass)


def prompt_stats(
    attention: Implementation, cached: LayerCache, read: Read, starts: Array, length: Array, needs: PromptNeeds
) -> PromptStats:
    scores = {
        window: attention.window_scores(read.queries[:, -window:], cached, starts, length)
        for window in sorted(needs.windows)
    }
    query = (read.queries[:, -1], read.q_before_rope) if needs.query else (None, None)
    return PromptStats(scores, *query, read.mass)
