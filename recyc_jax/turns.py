"""Further turns: tokens that are read over the cache that is there, after the prompts or after an answer.

A conversation: `prefill`, then `decode(..., rewind=False)` and `extend` by turns. Many questions about one document:
keep a `bookmark` of the document's state, `extend` it by a question, `decode`, and `rewind` to the bookmark. The
document's cache is neither read again nor copied; a bookmark is what else belongs to that state: some queries, scores,
and the rings of layers with a sliding window."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int

from recyc_jax import implementations, model, sharding
from recyc_jax import prompts as prompt_arrays
from recyc_jax.answers import rewound
from recyc_jax.cache import KVCache, LayerCache
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.config import LlamaConfig
from recyc_jax.model import Params
from recyc_jax.prefilling import (
    NOWHERE,
    Prefilled,
    Read,
    attend_chunk,
    chunks_of,
    columns,
    prompt_stats,
    with_tokens,
    without_tokens,
)
from recyc_jax.validation import whole_number

SLOTS = 256
"""A cache grows to multiples of this, so that the turns of a conversation need few programs."""


def extend(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    turns: Any,
    *,
    max_new_tokens: int = 64,
    turn_lengths: Any = None,
    keep: Any = None,
    implementation: str | None = None,
    allow_beyond_context: bool = False,
) -> Prefilled:
    """The state after each row's further turn, with room for `max_new_tokens`: what `prefill` would make of the whole
    text, where the state holds prompts and turns alone.

    `turns` is given as `prefill`'s prompts are, one for each row; lengths may differ. After an answer (`decode(...,
    rewind=False)`), its tokens stay, with the keys and values that decoding under the policy made; rows that ended keep
    none of the padding behind their end. `keep` [B] drops all but a row's first tokens, prompt and answer, before the turn
    is read; not in models with sliding windows, which no longer have what their windows would reach back to. `state` is
    donated.

    The next answer begins anew: its policy chooses by the last tokens that were read, turns and prompts (`window` of
    them), not by the answers' queries; scores that refreshes remembered (`decay`) and the attention that H2O saw while
    decoding are forgotten, what H2O saw while reading is kept.

    Raises ValueError as `prefill` does, for another number of rows, for `keep` beyond what a row has, and inside `jax.jit`,
    where the cache cannot grow."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    if isinstance(state.cache.length, Tracer):
        raise ValueError("extend works outside of jax.jit alone: how far the cache must grow is not known inside")
    tokens, lengths = prompt_arrays.as_arrays(turns, turn_lengths, config)
    rows = state.cache.starts.shape[0]
    if tokens.shape[0] != rows:
        raise ValueError(f"there are {tokens.shape[0]} turns for a state of {rows} rows: pass one turn for each row")
    held, pending = token_counts(state)
    if keep is not None:
        held, pending = _kept(keep, held, pending, config)
    added = np.asarray(lengths) + pending
    if not allow_beyond_context:
        prompt_arrays.check_context(held + added, max_new_tokens, config)
    ends, width = np.asarray(state.cache.starts) + held, prompt_arrays.bucket(int(np.max(added)))
    chunk, chunks = chunks_of(rows, width)
    after = max(int(np.max(ends + added)), chunk * chunks)
    before = jnp.zeros(rows, jnp.int32) if state.answer is None else state.answer.token
    state = _grown(dataclasses.replace(state, answer=None), after + columns(max_new_tokens) + state.needs.spare)
    moves = bool(np.any(after - added - ends))
    layers, rest = state.cache.layers, dataclasses.replace(state.cache, layers=())
    rest = dataclasses.replace(state.without_room(), cache=rest)  # donated are the layers' caches alone
    turn = Turn(
        sharding.spread(jnp.concatenate([before[:, None], tokens], axis=1), "B-", rows),
        *(sharding.spread(jnp.asarray(one, jnp.int32), "B", rows) for one in (lengths, pending, ends)),
    )
    new_tokens = jnp.asarray(max_new_tokens, jnp.int32)
    origin = state.origin
    state = read_turns(params, layers, rest, turn, new_tokens, config, width, moves, implementation)
    return dataclasses.replace(state, room=max_new_tokens, origin=origin)


def token_counts(state: Prefilled) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each row are in the cache [B], and 1 where the row's last token is not in it yet, else 0 [B]."""
    starts, answer = np.asarray(state.cache.starts), state.answer
    if answer is None:
        return int(state.cache.length) - starts, np.zeros_like(starts)
    lengths, step = np.asarray(answer.lengths), np.asarray(answer.step)
    return int(answer.prompt_length) - starts + np.minimum(lengths, step), (lengths > step).astype(np.int32)


def _kept(keep: Any, held: np.ndarray, pending: np.ndarray, config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """`token_counts` of a state of which each row keeps its first tokens."""
    wanted = np.asarray(keep, np.int32)
    if wanted.shape != held.shape or np.any(wanted < 1) or np.any(wanted > held + pending):
        raise ValueError(
            f"keep={wanted.tolist()} must be one number for each row, from 1 to {(held + pending).tolist()}"
        )
    if np.any(wanted < held + pending) and len(config.full_layers) < config.num_hidden_layers:
        raise ValueError("keep drops tokens that this model's sliding windows have replaced: prefill the text instead")
    return np.minimum(held, wanted), np.where(wanted > held, pending, 0)


def with_room(state: Prefilled, max_new_tokens: int) -> Prefilled:
    """The state with room for an answer of `max_new_tokens`. Its cache grows, if it must, by a copy, to sizes that differ
    by an eighth. Raises ValueError in the middle of an answer, whose policy chose for the room that there was, and inside
    `jax.jit`."""
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    if isinstance(state.cache.length, Tracer):
        raise ValueError("with_room works outside of jax.jit alone: how far the cache must grow is not known inside")
    if state.answer is not None:
        raise ValueError("there is no more room to make in the middle of an answer: ask prefill or extend for it")
    lengths = state.row_lengths + (max_new_tokens - state.room)
    state = _grown(state, int(state.cache.length) + columns(max_new_tokens) + state.needs.spare)
    return dataclasses.replace(state, row_lengths=lengths, room=max_new_tokens)


@dataclasses.dataclass(frozen=True)
class Bookmark:
    """A state without its cache, to `rewind` to."""

    state: Prefilled  # whose caches are empty but for rings


def bookmark(state: Prefilled) -> Bookmark:
    """What `rewind` needs to come back to this state, copied; the state itself remains to be used. Raises ValueError in
    the middle of an answer."""
    if state.answer is not None:
        raise ValueError("there is no bookmark in the middle of an answer: `rewind(state)` goes to its beginning")
    layers = tuple(
        dataclasses.replace(layer, stored_keys=None, stored_values=None) if layer.window is None else layer
        for layer in state.cache.layers
    )
    light = dataclasses.replace(state, cache=dataclasses.replace(state.cache, layers=layers))
    return Bookmark(jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, light))


def rewind(state: Prefilled, to: Bookmark | None = None) -> Prefilled:
    """The state at the bookmark, with the cache of `state`, which has been extended or decoded since; without one, at the
    beginning of the answer that `decode(..., rewind=False)` began. `state` is donated. Raises ValueError for a bookmark of
    other rows."""
    state = rewound(state)
    if to is None:
        return state
    then = to.state
    if then.cache.starts.shape != state.cache.starts.shape:
        raise ValueError(
            f"the bookmark has {then.cache.starts.shape[0]} rows, the state {state.cache.starts.shape[0]}: rewind a"
            " state that came from the bookmark's"
        )
    back, capacity = then.cache.starts - state.cache.starts, state.cache.capacity
    moves, layers = bool(np.any(np.asarray(back))), []
    for now, before in zip(state.cache.layers, then.cache.layers, strict=True):
        if now.window is not None:
            layers.append(before.grown(capacity))
        else:
            layers.append(_moved(now, back) if moves else now)
    cache = dataclasses.replace(then.cache, layers=tuple(layers))
    slots = next((layer.capacity for layer in layers if layer.window is None), 0)
    return dataclasses.replace(then, cache=cache, stats=_padded(then.stats, slots), read=_padded(then.read, slots))


@functools.partial(jax.jit, donate_argnames="cached")
def _moved(cached: LayerCache, by: Array) -> LayerCache:
    return cached.shifted(by)


def _padded(noted: Any, slots: int) -> Any:
    """Statistics by slot (scores [B, K, S] and masses [B, K, G, S]) with room for `slots` slots."""

    def pad(array: Array | None) -> Array | None:
        return array if array is None else jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, slots - array.shape[-1])])

    def padded(one: Any) -> Any:
        if isinstance(one, Read):
            return dataclasses.replace(one, mass=pad(one.mass))
        return dataclasses.replace(one, scores={w: pad(score) for w, score in one.scores.items()}, mass=pad(one.mass))

    return tuple(padded(one) for one in noted)


def rounded(state: Prefilled) -> Prefilled:
    """The state with the capacity that it would grow to first: for a conversation, whose turns then need no other
    program."""
    return _grown(state, -(-state.cache.capacity // SLOTS) * SLOTS)


def _grown(state: Prefilled, slots: int) -> Prefilled:
    """The state with at least `slots` slots, if not more in a bucket of capacities."""
    if slots <= state.cache.capacity:
        return state
    capacity = prompt_arrays.bucket(-(-slots // SLOTS) * SLOTS)
    return dataclasses.replace(_with_capacity(state.without_room(), capacity), room=state.room, origin=state.origin)


@functools.partial(jax.jit, static_argnames="capacity")
def _with_capacity(state: Prefilled, capacity: int) -> Prefilled:
    layers = tuple(layer.grown(capacity) for layer in state.cache.layers)
    cache = dataclasses.replace(state.cache, layers=layers)
    slots = next((layer.capacity for layer in layers if layer.window is None), 0)
    return dataclasses.replace(state, cache=cache, stats=_padded(state.stats, slots), read=_padded(state.read, slots))


class Turn(NamedTuple):
    """What `read_turns` reads of each row."""

    tokens: Array  # int32 [B, 1 + T]: the row's last token before the turn, then the turn, right-padded
    lengths: Array  # int32 [B]: the tokens of the turn
    pending: Array  # int32 [B]: 1 where the last token before the turn is to be read too, else 0
    ends: Array  # int32 [B]: the slot behind the row's last token in the cache


@functools.partial(jax.jit, static_argnames=("config", "width", "moves", "implementation"), donate_argnames="caches")
def read_turns(
    params: Params,
    caches: tuple[LayerCache, ...],
    state: Prefilled,
    turn: Turn,
    new_tokens: Int[Array, ""],
    config: LlamaConfig,
    width: int,
    moves: bool,
    implementation: str | None,
) -> Prefilled:
    """The program behind `extend`, for at most `width` tokens a row; `state` lacks the layers' `caches`. The newest token
    of every row ends in the same slot again, so rows whose turn is shorter than another's, or whose answer ended
    earlier, move (`moves`: there are such rows)."""
    attention = implementations.resolve(implementation)
    rows, ends, lengths = turn.tokens.shape[0], turn.ends, turn.lengths + turn.pending
    chunk, chunks = chunks_of(rows, width)
    width = chunk * chunks
    length = jnp.maximum(jnp.max(ends + lengths), width)
    first = length - lengths
    kept_places = without_tokens(state.first_places, ends - state.cache.starts)
    starts = state.cache.starts + first - ends
    slots = length - width + jnp.arange(width, dtype=jnp.int32)
    number = slots - first[:, None]  # of each slot's token in the row's turn
    picked = jnp.clip(number + 1 - turn.pending[:, None], 0, turn.tokens.shape[1] - 1)
    tokens, positions = jnp.take_along_axis(turn.tokens, picked, axis=1), jnp.maximum(slots - starts[:, None], 0)
    row_lengths = length - starts + new_tokens
    full = iter(state.read)
    layers = []
    for cached in caches:
        read = next(full) if cached.window is None else None
        if moves:
            cached = cached.shifted(first - ends)
        if read is not None and read.mass is not None:
            mass = _shifted_mass(read.mass, first - ends)
            is_old = jnp.arange(mass.shape[3], dtype=jnp.int32) < first[:, None, None, None]
            read = dataclasses.replace(read, mass=jnp.where(is_old, mass, 0))
        layers.append((cached, read))

    def read_chunk(index: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        layers, _ = carry
        offset = length - width + index * chunk
        read = functools.partial(attend_chunk, attention, starts, first, offset)
        its_tokens, its_positions, its_numbers = (
            lax.dynamic_slice_in_dim(one, index * chunk, chunk, axis=1) for one in (tokens, positions, number)
        )
        attend = CachedAttention(offset, starts, attention, read, its_numbers >= 0)
        hidden, layers = model.hidden_states(params, config, its_tokens, its_positions, attend, layers, row_lengths)
        return layers, hidden[:, -1]

    carry = (tuple(layers), jnp.zeros((rows, config.hidden_size), params["embedding"].dtype))
    carry = lax.fori_loop((width - jnp.max(lengths)) // chunk, chunks, read_chunk, carry)
    of_all, hidden = carry
    of_full = [(cached, read) for cached, read in of_all if cached.window is None]
    length = length.astype(jnp.int32)
    stats = tuple(prompt_stats(attention, cached, read, starts, length, state.needs) for cached, read in of_full)
    return dataclasses.replace(
        state,
        cache=KVCache(tuple(cached for cached, _ in of_all), starts, length),
        logits=model.logits(params, config, hidden),
        stats=stats,
        read=tuple(read for _, read in of_full),
        row_lengths=row_lengths,
        first_places=with_tokens(kept_places, tokens, jnp.where(number >= 0, positions, NOWHERE)),
        answer=None,
    )


def _shifted_mass(mass: Array, by: Array) -> Array:
    return jax.vmap(lambda row, steps: jnp.roll(row, steps, axis=2))(mass, by)
