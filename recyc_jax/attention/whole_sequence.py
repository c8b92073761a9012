"""Recycled attention over a whole sequence in parallel, as training needs it.

This module computes for all tokens at once what the decode loop computes one token at a time: some tokens attend to all
tokens before them and select keys; the tokens after such a token attend to the keys that it selected and to the tokens
since then. Queries are processed in blocks, which are recomputed for the gradient, so memory never holds T x T numbers.

Letters: B batch, T tokens, N query heads, K key/value heads, G = N // K, H head dim, R ranked keys; C stretches of a
block, J tokens of a stretch. A *stretch* is a token that selects and the tokens after it up to the next one that does;
the argument `segments` numbers the documents of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from recyc_jax.attention import reference, selection

SELECTION = "recycled_selection"
"""The name of the selected slots for rematerialisation: the slots are small, and ranking keys again is expensive."""

OUTPUT = "attention_output"
"""The name for rematerialisation of the attention output, and of its normaliser where the gradient needs it: computing
attention again is expensive too."""


def keeps_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Whether rematerialisation keeps the results of a primitive: a policy for `jax.checkpoint` that keeps the arrays
    named `SELECTION` and `OUTPUT`, and the residuals of cuDNN's attention."""
    if primitive.name == "name":
        return params["name"] in (SELECTION, OUTPUT)
    return primitive.name.startswith("dot_product_attention_fwd")


QUERY_BLOCK = 512
"""Queries that are processed at once: bounds the logits in memory to this many rows of T."""

CUDNN_MULTIPLE = 64
"""Sequences are padded to a multiple of this length for cuDNN."""

Attention = Callable[[Array, Array, Array, Array | None], Array]
"""(q [B, T, N, H], k and v [B, T, K, H], segments [B, T] or None) -> out [B, T, N, H]."""
Dense = Attention
"""`causal`, or another implementation of the same attention."""


class Recycle(NamedTuple):
    """Which tokens select keys, and what the tokens after them attend to. All fields are static.

    Token `prefix - 1` and every `stride`-th token after it attend to all tokens before them and select their top
    `budget` keys; tokens before `prefix - 1` attend causally; the others attend to the keys of the latest selection and
    to the tokens since then. With `evict`, the first j tokens after a selection have replaced its j lowest-ranked keys
    when the j-th of them attends, as in the decode loop's sets of constant size. `budget`, `pool` and `lookahead` are
    those of `RecycledAttention`.
    """

    prefix: int
    stride: int
    budget: int
    pool: int = 7
    lookahead: int = 0
    evict: bool = False


def causal(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of every token, to the latest `window` tokens if that is given. With `segments`, which numbers
    the documents of each row, a token attends only to tokens of its own document."""
    width = q.shape[1]
    keys, values = _by_head(k), _by_head(v)
    slots = jnp.arange(width, dtype=jnp.int32)
    size = min(QUERY_BLOCK, width)
    segment_blocks = None if segments is None else _blocks(segments, size)

    def attend(block: Any) -> Array:
        queries, query_slots, query_segments = block
        seen = (slots <= query_slots[:, None])[None]
        if window is not None:
            seen = seen & (slots > query_slots[:, None] - window)
        if segments is not None:
            seen = seen & (segments[:, None, :] == query_segments[..., None])
        grouped = _grouped(queries, k.shape[2])
        logits = jnp.einsum("bckgh,bksh->bkgcs", grouped, keys.narrow(), preferred_element_type=jnp.float32)
        return _attended(jnp.where(seen[:, None, None], logits * _scale(q), reference.MASKED), values.narrow(), queries)

    out = _map(attend, (_blocks(q, size), _blocks(slots[None], size)[:, 0], segment_blocks))
    return checkpoint_name(_unblock(out, width), OUTPUT)


def causal_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """`causal` with cuDNN's fused attention, for NVIDIA GPUs, 16-bit dtypes and one document per row."""
    width = q.shape[1]
    if segments is not None:
        raise ValueError("attention='cudnn' cannot tell the documents of a packed row apart")
    # cuDNN has no gradient for odd lengths; the padding changes no output, because no token sees the tokens after it
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % CUDNN_MULTIPLE), (0, 0), (0, 0))) for x in (q, k, v))
    before = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=before, implementation="cudnn")
    return out[:, :width]


def recycled(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    recycle: Recycle,
    dense: Dense = causal,
) -> Float[Array, "B T N H"]:
    """The attention output of each token when the sequence is read under `recycle` (section 5 of the paper, and our
    strided form). `dense` computes the causal attention of the tokens before the first selection. Gathered keys and
    values receive gradients; the selection itself passes no gradient on."""
    first = recycle.prefix - 1
    before = dense(q[:, :first], k[:, :first], v[:, :first], None) if first else q[:, :0]
    return jnp.concatenate([before, _from_first_selection(q, k, v, first, recycle)], axis=1)


def _from_first_selection(
    q: Array, k: Array, v: Array, first: int, recycle: Recycle
) -> Float[Array, "B T_minus_first N H"]:
    """The outputs of token `first` and of the tokens after it: stretches of `stride` tokens, the first of which attends
    to all tokens before it and selects."""
    width = q.shape[1]
    stride = min(recycle.stride, width - first)
    count = -(-(width - first) // stride)
    at_once = min(count, max(1, QUERY_BLOCK // stride))
    keys, values = _by_head(k), _by_head(v)

    def by_stretch(x: Array) -> Array:
        """x from token `first` on as [blocks, B, C, J, ...], padded with zeros at the end."""
        blocks = _blocks(x[:, first:], at_once * stride)
        return blocks.reshape(*blocks.shape[:2], at_once, stride, *blocks.shape[3:])

    def attend(block: Any) -> Array:
        queries, new_keys, new_values, ends = block
        visible = jnp.arange(width, dtype=jnp.int32) < ends[:, None]  # [C, T]
        attend_and_score = jax.vmap(reference.full_with_log_probabilities, in_axes=(1, None, None, 0), out_axes=(1, 0))
        out, log_probabilities = attend_and_score(
            queries[:, :, 0],
            keys.narrow(),
            values.narrow(),
            jnp.broadcast_to(visible[:, None], (at_once, q.shape[0], width)),
        )
        scores = jnp.max(lax.stop_gradient(log_probabilities), axis=3)
        slots = checkpoint_name(_ranked(scores, visible, recycle), SELECTION)
        later = new_keys[:, :, 1:], new_values[:, :, 1:]
        partial = _partial(queries[:, :, 1:], keys, values, slots, *later, recycle.evict)
        return jnp.concatenate([out[:, :, None], partial], axis=2)

    parts = by_stretch(q), by_stretch(k), by_stretch(v)
    ends = first + 1 + stride * jnp.arange(parts[0].shape[0] * at_once, dtype=jnp.int32)
    out = _map(attend, (*parts, ends.reshape(-1, at_once)))
    out = out.reshape(*out.shape[:2], at_once * stride, *out.shape[4:])
    return checkpoint_name(_unblock(out, width - first), OUTPUT)


def _ranked(scores: Float[Array, "C B K T"], visible: Array, recycle: Recycle) -> Int[Array, "B K C R"]:
    """The slots that each stretch's first token selects, best first; -1 where it sees fewer tokens than the budget."""
    seen = jnp.broadcast_to(visible[:, None], (*scores.shape[:2], scores.shape[3]))
    pooled = jax.vmap(lambda scores, seen: selection.pool(scores, seen, recycle.pool, recycle.lookahead))(scores, seen)
    slots = selection.top_slots(pooled.reshape(-1, *pooled.shape[2:]), recycle.budget)
    return slots.reshape(*scores.shape[:3], -1).transpose(1, 2, 0, 3)


def _partial(
    queries: Float[Array, "B C J N H"],
    keys: _Wide,
    values: _Wide,
    slots: Int[Array, "B K C R"],
    new_keys: Float[Array, "B C J K H"],
    new_values: Float[Array, "B C J K H"],
    evict: bool,
) -> Float[Array, "B C J N H"]:
    """The attention of each stretch's later tokens to the ranked keys and to the tokens since the selection."""
    kv_heads, ranks = slots.shape[1], slots.shape[3]
    grouped = _grouped(queries, kv_heads)
    old = jnp.einsum("bcjkgh,bkcrh->bkcgjr", grouped, keys.gather(slots), preferred_element_type=jnp.float32)
    new = jnp.einsum("bcjkgh,bcikh->bkcgji", grouped, new_keys, preferred_element_type=jnp.float32)
    token = jnp.arange(1, queries.shape[2] + 1, dtype=jnp.int32)[:, None]  # the j-th after the selection
    since = token.T
    old_seen, new_seen = (slots >= 0)[:, :, :, None, None], since <= token
    if evict:
        old_seen = old_seen & (jnp.arange(ranks, dtype=jnp.int32) < ranks - token)
        new_seen = new_seen & (since > token - ranks)
    logits = jnp.concatenate([jnp.where(old_seen, old, -jnp.inf), jnp.where(new_seen, new, -jnp.inf)], axis=-1)
    # each token sees itself, so no row of logits is entirely -inf
    weights = jax.nn.softmax(logits * _scale(queries), axis=-1).astype(queries.dtype)
    out = jnp.einsum(
        "bkcgjr,bkcrh->bcjkgh", weights[..., :ranks], values.gather(slots), preferred_element_type=jnp.float32
    ) + jnp.einsum("bkcgji,bcikh->bcjkgh", weights[..., ranks:], new_values, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype).reshape(queries.shape)


class _Wide(NamedTuple):
    """Keys or values that many blocks read. They are stored in float32, so that their gradients add up in float32, and
    read in their original dtype. (XLA moves the rounding out of the loop over blocks.)"""

    stored: Array  # float32 [B, K, T, H]
    dtype: Any

    def narrow(self) -> Float[Array, "B K T H"]:
        """In the original dtype."""
        return self.stored.astype(self.dtype)

    def gather(self, slots: Int[Array, "B K C R"]) -> Float[Array, "B K C R H"]:
        """The keys or values of these slots, in the original dtype; those of slot 0 where nothing is listed (-1)."""
        return jax.vmap(jax.vmap(lambda rows, index: rows[index]))(self.stored, jnp.maximum(slots, 0)).astype(
            self.dtype
        )


def _by_head(x: Float[Array, "B T K H"]) -> _Wide:
    return _Wide(x.transpose(0, 2, 1, 3).astype(jnp.float32), x.dtype)


def _grouped(q: Float[Array, "... N H"], kv_heads: int) -> Float[Array, "... K G H"]:
    return q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def _scale(q: Array) -> float:
    return q.shape[-1] ** -0.5


def _attended(logits: Float[Array, "B K G C S"], values: Float[Array, "B K S H"], q: Array) -> Float[Array, "B C N H"]:
    """The values' mean under the softmax of the logits, in the shape and dtype of q."""
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgcs,bksh->bckgh", weights, values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


def _blocks(x: Array, size: int) -> Array:
    """x [B, T, ...] as [blocks, B, size, ...], padded with zeros at the end."""
    count = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _unblock(x: Array, width: int) -> Array:
    """The first `width` tokens of an array in the layout of `_blocks`, as [B, width, ...]."""
    joined = x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return joined[:, :width]


def _map(attend: Callable[[Any], Array], blocks: Any) -> Array:
    """`attend` of one block after the other. For the gradient all intermediate results of `attend` are recomputed,
    except the selection."""
    keep = jax.checkpoint_policies.save_only_these_names(SELECTION)
    return lax.map(jax.checkpoint(attend, policy=keep), blocks)
