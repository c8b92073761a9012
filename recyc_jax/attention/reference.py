"""Attention in plain jax.numpy: the oracle of every other implementation, and the default on a CPU.

Letters: B batch, T and C queries, S cache slots, R selected slots, N query heads, K key/value heads, G = N // K query
heads per group, H head dim. Logits and softmax are float32 whatever the dtype of the inputs; the probabilities are
rounded to the values' dtype for the second product, which accumulates in float32. Masked logits are float32's finite
minimum, so a row that sees nothing gives finite garbage rather than NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.attention.remainder import Moments

MASKED = float(jnp.finfo(jnp.float32).min)


def _grouped(q: Float[Array, "... N H"], kv_heads: int) -> Float[Array, "... K G H"]:
    return q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def _scale(head_dim: int) -> float:
    return head_dim**-0.5


def causal(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], window: int | None = None
) -> Float[Array, "B T N H"]:
    """Ordinary causal attention over the sequence itself, or over each token and the `window - 1` tokens before it;
    builds the T x T logits."""
    grouped = _grouped(q, k.shape[2])
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((q.shape[1], q.shape[1]), jnp.bool_))
    if window is not None:
        seen = jnp.triu(seen, 1 - window)
    weights = jax.nn.softmax(jnp.where(seen, logits * _scale(q.shape[-1]), MASKED), axis=-1)
    out = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


def masked_logits(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    visible: Bool[Array, "B _ S"],
) -> Float[Array, "B K G S"]:
    """Scaled logits of one query per row; slots that are not visible (to all heads, or to each) are masked."""
    grouped = _grouped(q, keys.shape[1])
    logits = jnp.einsum("bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32)
    return jnp.where(visible[:, :, None, :], logits * _scale(q.shape[-1]), MASKED)


def log_softmax(logits: Float[Array, "*heads S"]) -> Float[Array, "*heads S"]:
    """`logit - logsumexp`. Log-probabilities, because probabilities underflow in the tail, where ranks still count."""
    return logits - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def weighted_values(
    logits: Float[Array, "B K G S"], values: Float[Array, "B K S H"], q: Float[Array, "B N H"]
) -> Float[Array, "B N H"]:
    """The values' mean under the softmax of the logits, in the shape and dtype of q."""
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


def full(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B N H"]:
    """One query per row over every visible slot."""
    return full_with_log_probabilities(q, keys, values, visible)[0]


def full_with_log_probabilities(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G S"]]:
    """`full`, and the log-probability of each slot under each query head, float32. Slots that are not visible hold
    meaningless finite numbers."""
    logits = masked_logits(q, keys, visible[:, None])
    return weighted_values(logits, values, q), log_softmax(logits)


def mean_under(weights: Float[Array, "B K G S"], side: Float[Array, "B K S H"]) -> Float[Array, "B K G H"]:
    """The sum of keys or values by float32 weights, in float32. Keys of 16 bits are multiplied as they are: the
    weights are split into a part of as many bits and what that rounds off."""
    if side.dtype.itemsize > 2:
        return jnp.einsum("bkgs,bksh->bkgh", weights, side, preferred_element_type=jnp.float32)
    coarse = weights.astype(side.dtype)
    fine = (weights - coarse.astype(jnp.float32)).astype(side.dtype)
    main, correction = (
        jnp.einsum("bkgs,bksh->bkgh", part, side, preferred_element_type=jnp.float32) for part in (coarse, fine)
    )
    return main + correction


def moments(
    q: Float[Array, "B N H"],
    pieces: Sequence[tuple[Array, Array, Array]],
    with_key: bool,
) -> Moments:
    """Attention of one query per row over several pieces of a cache as one softmax (`over_pieces`), with its logsumexp,
    and the mean of the keys if asked for."""
    logits = jnp.concatenate([masked_logits(q, keys, visible) for keys, _, visible in pieces], axis=-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    ends = np.cumsum([keys.shape[2] for keys, _, _ in pieces])
    parts = jnp.split(weights, ends[:-1], axis=-1)

    def mean(side: int) -> Array:
        sums = [mean_under(part, piece[side]) for part, piece in zip(parts, pieces, strict=True)]
        return functools.reduce(jnp.add, sums)

    return Moments(lse, mean(1), mean(0) if with_key else None)


def window_scores(
    q: Float[Array, "B W N H"],
    keys: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    length: Int[Array, ""],
    normaliser: Float[Array, "W B K G"] | None = None,
) -> Float[Array, "B K S"]:
    """Each slot's score under the queries of the last W tokens, in slots `length - W` to `length - 1`: the log of its
    probability summed over these queries, the maximum over the heads of its group. A row of fewer than W tokens counts
    all of them. W = 1 gives the score of a full step. One query at a time, so memory does not grow with W. The
    `normaliser` (None: that of these slots) divides the probabilities."""
    batch, window, heads, _ = q.shape
    kv_heads, capacity = keys.shape[1:3]
    first = length - window

    def add(index: Array, total: Array) -> Array:
        logits = _window_logits(q, keys, starts, first, index)
        by = jax.nn.logsumexp(logits, axis=-1) if normaliser is None else normaliser[index]
        is_token = first + index >= starts
        return jnp.logaddexp(total, jnp.where(is_token[:, None, None, None], logits - by[..., None], MASKED))

    total = jnp.full((batch, kv_heads, heads // kv_heads, capacity), MASKED, jnp.float32)
    return jnp.max(lax.fori_loop(0, window, add, total), axis=2)


def window_normaliser(
    q: Float[Array, "B W N H"], keys: Float[Array, "B K S H"], starts: Int[Array, " B"], length: Int[Array, ""]
) -> Float[Array, "W B K G"]:
    """Each of the last W queries' log of the sum of exponentials over the slots that it sees."""
    window = q.shape[1]

    def one(index: Array) -> Array:
        return jax.nn.logsumexp(_window_logits(q, keys, starts, length - window, index), axis=-1)

    return lax.map(one, jnp.arange(window, dtype=jnp.int32))


def _window_logits(q: Array, keys: Array, starts: Array, first: Array, index: Array) -> Float[Array, "B K G S"]:
    """The logits of query number `index`, which is in slot `first + index`."""
    slots = jnp.arange(keys.shape[2], dtype=jnp.int32)
    seen = (slots >= starts[:, None]) & (slots <= first + index)
    query = lax.dynamic_index_in_dim(q, index, axis=1, keepdims=False)
    return masked_logits(query, keys, seen[:, None])


def listed(
    keys: Float[Array, "B K S H"], values: Float[Array, "B K S H"], slots: Int[Array, "B K R"]
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R H"], Bool[Array, "B K R"]]:
    """The slots listed for each key/value head as a piece of a cache, gathered by index; -1 lists nothing."""
    index = jnp.maximum(slots, 0)[..., None]
    keys, values = (jnp.take_along_axis(side, index, axis=2, mode="clip") for side in (keys, values))
    return keys, values, slots >= 0


def selected(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    slots: Int[Array, "B K R"],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"]]:
    """One query per row over the slots listed for each key/value head, gathered by index (-1 lists nothing), and the
    log-probability of each listed slot under each query head."""
    listed_keys, listed_values, is_listed = listed(keys, values, slots)
    logits = masked_logits(q, listed_keys, is_listed)
    return weighted_values(logits, listed_values, q), log_softmax(logits)


def over_pieces(
    q: Float[Array, "B N H"],
    pieces: Sequence[tuple[Array, Array, Array]],
) -> tuple[Float[Array, "B N H"], Float[Array, "B K G R"]]:
    """One query per row over several pieces of a cache as one softmax, and the log-probabilities, piece after piece. A
    piece is its keys [B, K, R, H], its values, and which of them are visible [B, K or 1, R]; nothing is gathered."""
    logits = jnp.concatenate([masked_logits(q, keys, visible) for keys, _, visible in pieces], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)
    ends = np.cumsum([keys.shape[2] for keys, _, _ in pieces])
    out = sum(
        jnp.einsum("bkgs,bksh->bkgh", part.astype(values.dtype), values, preferred_element_type=jnp.float32)
        for part, (_, values, _) in zip(jnp.split(weights, ends[:-1], axis=-1), pieces, strict=True)
    )
    return jnp.asarray(out).astype(q.dtype).reshape(q.shape), log_softmax(logits)


def part(
    q: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    visible: Bool[Array, "B S"],
) -> tuple[Moments, Float[Array, "B K G S"]]:
    """Attention of one query per row over the visible slots as moments with keys, and the logits: what several parts of
    a cache are put together from. Where no slot is visible, means are meaningless and finite, and the logsumexp is so
    low that they count for nothing."""
    logits = masked_logits(q, keys, visible[:, None])
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])
    return Moments(lse, mean_under(weights, values), mean_under(weights, keys)), logits


def chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    window: int | None = None,
) -> Float[Array, "B C N H"]:
    """C consecutive queries, the first in slot `offset`, each over the slots up to its own, or over the latest `window`
    of these.

    Key blocks of C slots are visited one by one with a running softmax, from the first block that holds a token to the
    queries' own block, so memory is C x C per head and blocks in the future cost nothing.
    """
    return chunk_part(q, keys, values, starts, offset, window)[0].astype(q.dtype)


def chunk_part(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    window: int | None = None,
) -> tuple[Float[Array, "B C N H"], Float[Array, "B C N"]]:
    """`chunk` in float32, and each query's log of the sum of exponentials. The keys may be a part of a cache: `starts` and
    `offset`, counted from the part's first slot, may then lie before or behind it."""
    batch, width, heads, dim = q.shape
    out, normaliser = _chunk(q, keys, values, starts, offset, window)
    shape = (batch, keys.shape[1], heads // keys.shape[1], width)
    out, normaliser = out.reshape(*shape, dim), normaliser.reshape(shape)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape), normaliser.transpose(0, 3, 1, 2).reshape(q.shape[:3])


def chunk_with_mass(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    first: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B C N H"], Float[Array, "B K G S"]]:
    """`chunk`, and the probability that each slot receives from these queries, summed over them, for each query head in
    float32. Queries in slots before `first` (None: before `starts`) add nothing. The key blocks are visited twice: the
    second time with the normalisers of the first."""
    out, normaliser = chunk_part(q, keys, values, starts, offset)
    return out.astype(q.dtype), received_mass(q, keys, starts, offset, starts if first is None else first, normaliser)


def received_mass(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    first: Int[Array, " B"],
    normaliser: Float[Array, "B C N"],
) -> Float[Array, "B K G S"]:
    """The probability that each slot receives from C queries, summed over those in slots from `first` on, by the queries'
    normalisers."""
    batch, width, heads, _ = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups, size = heads // kv_heads, min(width, capacity)
    stacked = _stacked(q, kv_heads)
    by_head = normaliser.reshape(batch, width, kv_heads, groups).transpose(0, 2, 3, 1).reshape(batch, kv_heads, -1)
    is_token = offset + jnp.arange(width, dtype=jnp.int32) >= first[:, None]

    def visit(block: Array, mass: Array) -> Array:
        log_probabilities = _block_logits(stacked, keys, starts, offset, block, width) - by_head[..., None]
        probabilities = jnp.exp(log_probabilities).reshape(batch, kv_heads, groups, width, size)
        received = jnp.sum(jnp.where(is_token[:, None, None, :, None], probabilities, 0), axis=3)
        begin = _block_begin(block, size, capacity)
        before = lax.dynamic_slice_in_dim(mass, begin, size, axis=3)
        return lax.dynamic_update_slice_in_dim(mass, before + received, begin, axis=3)

    mass = jnp.zeros((batch, kv_heads, groups, capacity), jnp.float32)
    return lax.fori_loop(_first_block(jnp.min(starts), size), _blocks(offset, width, capacity), visit, mass)


def _blocks(offset: Int[Array, ""], width: int, capacity: int) -> Int[Array, ""]:
    """The number of blocks of slots that hold the slots up to the last of `width` queries'."""
    size = min(width, capacity)
    return jnp.minimum((offset + width - 1) // size + 1, -(-capacity // size))


def _first_block(slot: Int[Array, ""], size: int) -> Int[Array, ""]:
    """The block of `size` slots that holds this slot."""
    return jnp.maximum(slot, 0) // size


def _block_begin(block: Int[Array, ""], width: int, capacity: int) -> Int[Array, ""]:
    """The first slot that is read for a block. The last block may begin before its own slots, to end with the cache;
    slots of the block before it are then masked."""
    return jnp.minimum(block * width, capacity - width)


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
    window: int | None = None,
) -> Float[Array, "B K GC _"]:
    """Scaled logits of `width` queries, the first in slot `offset`, over a block of as many keys (of all, if there are
    fewer); masked where they see nothing."""
    (rows, dim), size = stacked.shape[2:], min(width, keys.shape[2])
    query_slots = offset + jnp.tile(jnp.arange(width, dtype=jnp.int32), rows // width)
    begin = _block_begin(block, size, keys.shape[2])
    key_slots = begin + jnp.arange(size, dtype=jnp.int32)
    seen = (key_slots <= query_slots[:, None]) & (key_slots >= jnp.maximum(starts, block * size)[:, None, None])
    if window is not None:
        seen = seen & (key_slots > query_slots[:, None] - window)
    block_keys = lax.dynamic_slice_in_dim(keys, begin, size, axis=2)
    logits = jnp.einsum("bkqh,bksh->bkqs", stacked, block_keys, preferred_element_type=jnp.float32)
    return jnp.where(seen[:, None], logits * _scale(dim), MASKED)


def _chunk(
    q: Float[Array, "B C N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    starts: Int[Array, " B"],
    offset: Int[Array, ""],
    window: int | None = None,
) -> tuple[Float[Array, "B K GC H"], Float[Array, "B K GC"]]:
    """The output in float32, and each query's log of the sum of exponentials."""
    batch, width, heads, dim = q.shape
    kv_heads, capacity = keys.shape[1:3]
    groups, size = heads // kv_heads, min(width, capacity)
    stacked = _stacked(q, kv_heads)

    def visit(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, out = carry
        logits = _block_logits(stacked, keys, starts, offset, block, width, window)
        block_values = lax.dynamic_slice_in_dim(values, _block_begin(block, size, capacity), size, axis=2)
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
    first = jnp.min(starts)
    if window is not None:
        first = jnp.maximum(first, jnp.maximum(offset - window + 1, 0))
    visited = _first_block(first, size), _blocks(offset, width, capacity)
    peak, total, out = lax.fori_loop(*visited, visit, carry)
    total = jnp.where(total > 0, total, 1)  # no block was visited: the keys are a part behind the queries
    return out / total[..., None], peak + jnp.log(total)
