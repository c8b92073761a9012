"""Attention in plain jax.numpy: the oracle of every other implementation, and the default on a CPU.

Letters: B batch, T and C queries, S cache slots, R selected slots, N query heads, K key/value heads, G = N // K query
heads a group, H head dim. Logits and softmax are float32 whatever the inputs' dtype; the probabilities are
rounded to the values' dtype for the second product, which accumulates in float32. Masked logits are float32's finite
minimum, so a row with nothing to see gives finite garbage rather than NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax import projections as projections  # a part of every implementation
from recyc_jax.attention import select

SLOTS_LAST: bool = False
COPIES: bool = False
INDEXES: bool = False

MASKED = float(jnp.finfo(jnp.float32).min)


def _grouped(q: Float[Array, "... N H"], kv_heads: int) -> Float[Array, "... K G H"]:
    return q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def _scale(head_dim: int) -> float:
    return head_dim**-0.5


def causal(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Float[Array, "B T N H"]:
    """Ordinary causal attention over the sequence itself; builds the T x T logits."""
    grouped = _grouped(q, k.shape[2])
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), jnp.bool_))
    weights = jax.nn.softmax(jnp.where(seen, logits * _scale(q.shape[-1]), MASKED), axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


def decode_logits(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    visible: Bool[Array, "B _ S"],
) -> Float[Array, "B K G S"]:
    """Scaled logits of one query a row, those of slots that are not visible (of all heads or of each) masked."""
    grouped = _grouped(q, keys.shape[1])
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, :, None, :], logits * _scale(q.shape[-1]), MASKED)


def _weighted(
    logits: Float[Array, "B K G S"], values: Float[Array, "B K S H"], q: Float[Array, "B N H"]
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
    weights = jax.nn.softmax(logits, axis=-1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape), weights


def full(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """One query a row over every visible slot."""
    return full_with_weights(q, keys, values, visible)[0]


def full_with_weights(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
    """`full`, and the probabilities of each query head in float32."""
    return _weighted(decode_logits(q, keys, visible[:, None]), values, q)


def full_with_scores(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K S"]]:
    """`full`, and how much each slot matters to the query: its log-probability, the maximum over the heads of its group
    (section 3.1 of the paper). Our decision: float32 `logit - logsumexp` rather than the probability, which underflows in
    the tail and would leave the order there to chance. Slots that are not visible hold meaningless finite numbers."""
    logits = decode_logits(q, keys, visible[:, None])
    scores = jnp.max(logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True), axis=2)
    return _weighted(logits, values, q)[0], scores


def window_scores(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    length: Int[Array, ""],
) -> Float[Array, "B K S"]:
    """Each slot's score under the last W tokens, in slots `length - W` to `length - 1`: the log of its probability summed
    over these queries, the maximum over the heads of its group. Where a row has fewer tokens, all of them. W = 1
    is the score of `full_with_scores`. One query at a time, so memory does not grow with W."""
    batch, window, heads, _ = q.shape
    kv_heads, capacity = keys.shape[1:3]
    slots = jnp.arange(capacity, dtype=jnp.int32)
    first = length - window

    def add(index: Array, total: Array) -> Array:
        seen = (slots >= starts[:, None]) & (slots <= first + index)
        here = lax.dynamic_index_in_dim(q, index, axis=1, keepdims=False)
        logits = decode_logits(here, keys, seen[:, None])
        chances = logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        is_token = first + index >= starts
        return jnp.logaddexp(total, jnp.where(is_token[:, None, None, None], chances, MASKED))

    total = jnp.full((batch, kv_heads, heads // kv_heads, capacity), MASKED, jnp.float32)
    return jnp.max(lax.fori_loop(0, window, add, total), axis=2)


def selected(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
) -> Float[Array, "B N H"]:
    """One query a row over the slots listed for each key/value head, gathered by index; -1 lists nothing."""
    return selected_with_weights(q, keys, values, slots)[0]


def selected_with_weights(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"]]:
    """`selected`, and the probabilities of each query head in float32."""
    at = jnp.maximum(slots, 0)[..., None]
    near_keys = jnp.take_along_axis(keys, at, axis=2, mode="clip")
    near_values = jnp.take_along_axis(values, at, axis=2, mode="clip")
    return _weighted(decode_logits(q, near_keys, slots >= 0), near_values, q)


def recycled(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
    since: Int[Array, " B"],
    length: Int[Array, ""],
    evict: bool,
) -> Float[Array, "B N H"]:
    """One query a row over the slots listed for each key/value head (-1 lists nothing), and over slots `since` to
    `length - 1`. With `evict` only the R newest of all these: each new slot takes the place of the last that is listed,
    once these have left of the oldest new one. Gathers over the whole cache: exact, not fast."""
    entries, capacity = slots.shape[2], keys.shape[2]
    kept, first = jnp.full_like(since, entries), since
    if evict:
        kept, first = entries - (length - since), jnp.maximum(since, length - entries)
    listed = jnp.where(jnp.arange(entries) < kept[:, None, None], slots, -1)
    at = jnp.arange(capacity, dtype=jnp.int32)
    newest = jnp.where((at >= first[:, None]) & (at < length), at, -1)
    newest = jnp.broadcast_to(newest[:, None], (*slots.shape[:2], capacity))
    return selected(q, keys, values, jnp.concatenate([listed, newest], axis=2))


def full_or_recycled(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
    due: Bool[Array, " B"],
    slots: Int[Array, "B K R"],
    since: Int[Array, " B"],
    length: Int[Array, ""],
    evict: bool,
) -> tuple[Float[Array, "B N H"], Float[Array, "B K S"]]:
    """`full_with_scores` of the rows that are due, `recycled` of the others; their scores are -inf."""
    out, scores = full_with_scores(q, keys, values, visible)
    here = due[:, None, None]
    few = recycled(q, keys, values, slots, since, length, evict)
    return jnp.where(here, out, few), jnp.where(here, scores, -jnp.inf)


def top_slots(scores: Float[Array, "L B K S"], budget: int, ordered: int) -> Int[Array, "L B K R"]:
    """The R = min(budget, S) best slots in rank order, ties to the lower slot; -1 where the score is -inf. Callers rely on
    the order of the last `ordered` only, at least of the last one."""
    return select.top_slots(scores, budget)


def pieces_with_weights(
    q: Float[Array, "B N H"],
    pieces: Sequence[tuple[Array, Array, Array]],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"]]:
    """One query a row over several pieces as one softmax, and the probabilities piece after piece. A piece is its keys
    [B, K, R, H], its values, and which of them are visible [B, K or 1, R]; nothing is gathered or copied."""
    logits = [decode_logits(q, keys, visible) for keys, _, visible in pieces]
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
    ends = np.cumsum([keys.shape[2] for keys, _, _ in pieces])
    out = sum(
        jnp.einsum("bkgs,bksh->bkgh", here.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for here, (_, values, _) in zip(jnp.split(weights, ends[:-1], axis=-1), pieces, strict=True)
    )
    return jnp.asarray(out).astype(q.dtype).reshape(q.shape), weights


def compact(
    keys: Float[Array, "B K S H"], values: Float[Array, "B K S H"], chosen: Bool[Array, "B K S"], most: int
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R H"]]:
    """The keys and values of the chosen slots, at most `most` a head, in the slots' order, then zeros."""
    unchosen_last = jnp.argsort(~chosen, axis=2, stable=True)[..., :most]
    listed = (jnp.arange(most) < jnp.sum(chosen, axis=2, keepdims=True))[..., None]
    near_keys, near_values = (
        jnp.where(listed, jnp.take_along_axis(cached, unchosen_last[..., None], axis=2), 0) for cached in (keys, values)
    )
    return near_keys, near_values


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> Float[Array, "B C N H"]:
    """C consecutive queries, the first in slot `offset` (a multiple of C), each over the slots up to its own.

    Key blocks of C slots are visited one by one with a running softmax, from the first that holds a token to the
    queries' own, so memory is C x C a head and blocks in the future cost nothing.
    """
    return _chunk(q, keys, values, starts, offset)[0]


def chunk_with_mass(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> tuple[Float[Array, "B C N H"], Float[Array, "B K G S"]]:
    """`chunk`, and the probability that each slot receives from these queries, summed over them, for each query head in
    float32. Queries of padding give nothing. A second visit of the key blocks, once the normalisers are known."""
    batch, width, heads, _ = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups = heads // kv_heads
    out, normaliser = _chunk(q, keys, values, starts, offset)
    stacked = _stacked(q, kv_heads)
    is_token = offset + jnp.arange(width, dtype=jnp.int32) >= starts[:, None]

    def visit(block: Array, mass: Array) -> Array:
        chances = _block_logits(stacked, keys, starts, offset, block, width) - normaliser[..., None]
        chances = chances.reshape(batch, kv_heads, groups, width, width)
        received = jnp.sum(jnp.where(is_token[:, None, None, :, None], jnp.exp(chances), 0), axis=3)
        zero = jnp.zeros((), jnp.int32)
        return lax.dynamic_update_slice(mass, received, (zero, zero, zero, block * width))

    mass = jnp.zeros((batch, kv_heads, groups, capacity), jnp.float32)
    return out, lax.fori_loop(jnp.min(starts) // width, offset // width + 1, visit, mass)


def _stacked(q: Float[Array, "B C N H"], kv_heads: int) -> Float[Array, "B K GC H"]:
    """All queries of a key/value head in one matrix."""
    batch, width, heads, dim = q.shape
    by_head = q.reshape(batch, width, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    return by_head.reshape(batch, kv_heads, heads // kv_heads * width, dim)


def _block_logits(
    stacked: Float[Array, "B K GC H"],
    keys: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    block: Int[Array, ""],
    width: int,
) -> Float[Array, "B K GC C"]:
    """Scaled logits of the queries, the first in slot `offset`, over the block's keys; masked where they see nothing."""
    rows, dim = stacked.shape[2:]
    query_slots = offset + jnp.tile(jnp.arange(width, dtype=jnp.int32), rows // width)
    key_slots = block * width + jnp.arange(width, dtype=jnp.int32)
    seen = (key_slots <= query_slots[:, None]) & (key_slots >= starts[:, None, None])
    block_keys = lax.dynamic_slice_in_dim(keys, block * width, width, axis=2)
    logits = jnp.einsum("bkqh,bksh->bkqs", stacked, block_keys, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None], logits * _scale(dim), MASKED)


def _chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
) -> tuple[Float[Array, "B C N H"], Float[Array, "B K GC"]]:
    """The output, and each query's log of the sum of exponentials."""
    batch, width, heads, dim = q.shape
    kv_heads = keys.shape[1]
    groups = heads // kv_heads
    stacked = _stacked(q, kv_heads)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        logits = _block_logits(stacked, keys, starts, offset, block, width)
        block_values = lax.dynamic_slice_in_dim(values, block * width, width, axis=2)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        shrink = jnp.exp(peak - new_peak)
        weights = jnp.exp(logits - new_peak[..., None])
        block_out = jnp.einsum(
            "bkqs,bksh->bkqh", weights.astype(values.dtype), block_values, preferred_element_type=jnp.float32
        )
        return new_peak, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + block_out

    rows = (batch, kv_heads, groups * width)
    carry = (
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, dim), jnp.float32),
    )
    peak, total, out = lax.fori_loop(jnp.min(starts) // width, offset // width + 1, visit, carry)
    out = (out / total[..., None]).astype(q.dtype).reshape(batch, kv_heads, groups, width, dim)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape), peak + jnp.log(total)
