"""Recycled attention over a whole sequence in parallel, as training needs it.

What the decode loop does one token at a time is done here for all tokens at once: some tokens attend to everything
before them and select, the tokens after each of them attend to what it selected and to the tokens since. Queries are
taken in blocks that are recomputed for the gradient, so memory never holds T x T numbers.

Letters: B batch, T tokens, N query heads, K key/value heads, G = N // K, H head dim, C segments of a block, J tokens of
a segment, R ranked keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from recyc_jax.attention import reference, select

SELECTION = "recycled_selection"
"""The name of the selected slots, for rematerialisation: they are small, and ranking again is dear."""

OUTPUT = "attention_output"
"""Likewise of what attention gives, and of its normaliser where the gradient needs that: attending again is dear too."""


def keeps(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of rematerialisation (`jax.checkpoint`) that keeps what is named here, and what cuDNN's attention leaves."""
    if primitive.name == "name":
        return params["name"] in (SELECTION, OUTPUT)
    return primitive.name.startswith("dot_product_attention_fwd")


QUERY_BLOCK = 512
"""Queries that are worked on at once: bounds the logits in memory to this many rows of T."""


WHOLE = 64
"""Lengths that cuDNN is asked for are multiples of this."""

Attention = Callable[[Array, Array, Array, Array | None], Array]
"""(q [B, T, N, H], k and v [B, T, K, H], segments [B, T] or None) -> out [B, T, N, H]."""
Dense = Attention
"""`causal` or one that does the same."""


class Recycle(NamedTuple):
    """Which tokens select, and what those after them attend to. All static.

    Token `prefix - 1` and every `stride`-th after it attend to all tokens before them and select their top `budget`
    keys; tokens before `prefix - 1` attend causally; the others attend to the keys of the latest selection and to the
    tokens since. `evict`: as the decode loop's sets of constant size do, the j-th token after a selection has taken the
    places of the j lowest-ranked keys. `budget`, `pool` and `lookahead` are those of `RecycledAttention`.
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
) -> Float[Array, "B T N H"]:
    """Causal attention of every token, within its own segment where `segments` tells documents of a row apart."""
    width = q.shape[1]
    keys, values = _by_head(k), _by_head(v)
    slots = jnp.arange(width, dtype=jnp.int32)
    size = min(QUERY_BLOCK, width)
    kind = None if segments is None else _blocks(segments, size)

    def attend(block: Any) -> Array:
        queries, at, mine = block
        seen = (slots <= at[:, None])[None]
        if segments is not None:
            seen = seen & (segments[:, None, :] == mine[..., None])
        grouped = _grouped(queries, k.shape[2])
        logits = jnp.einsum("bckgh,bksh->bkgcs", grouped, keys.narrow(), preferred_element_type=jnp.float32)
        return _attended(jnp.where(seen[:, None, None], logits * _scale(q), reference.MASKED), values.narrow(), queries)

    out = _map(attend, (_blocks(q, size), _blocks(slots[None], size)[:, 0], kind))
    return checkpoint_name(_unblock(out, width), OUTPUT)


def causal_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """`causal` by cuDNN's fused attention: NVIDIA GPUs, 16-bit dtypes, one document a row."""
    width = q.shape[1]
    if segments is not None:
        raise ValueError("attention='cudnn' cannot tell the documents of a packed row apart")
    # odd lengths have no gradient in cuDNN; no token sees what comes behind it
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % WHOLE), (0, 0), (0, 0))) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")[:, :width]


def recycled(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    recycle: Recycle,
    dense: Dense = causal,
) -> Float[Array, "B T N H"]:
    """What each token's attention gives when the sequence is read under `recycle` (section 5 of the paper, and our
    strided form). `dense` does the causal attention of the tokens before the first selection. Gathered keys and values
    receive gradients; the selection itself passes none on."""
    first = recycle.prefix - 1
    before = dense(q[:, :first], k[:, :first], v[:, :first], None) if first else q[:, :0]
    return jnp.concatenate([before, _segments(q, k, v, first, recycle)], axis=1)


def _segments(q: Array, k: Array, v: Array, first: int, recycle: Recycle) -> Float[Array, "B T_minus_first N H"]:
    """The outputs of tokens `first` and later: segments of `stride` tokens whose first one attends fully and selects."""
    width = q.shape[1]
    stride = min(recycle.stride, width - first)
    count = -(-(width - first) // stride)
    at_once = min(count, max(1, QUERY_BLOCK // stride))
    keys, values = _by_head(k), _by_head(v)

    def by_segment(x: Array) -> Array:
        """[blocks, B, C, J, ...], zeros behind the end."""
        blocks = _blocks(x[:, first:], at_once * stride)
        return blocks.reshape(*blocks.shape[:2], at_once, stride, *blocks.shape[3:])

    def attend(block: Any) -> Array:
        queries, new_keys, new_values, ends = block
        visible = jnp.arange(width, dtype=jnp.int32) < ends[:, None]  # [C, T]
        out, scores = jax.vmap(reference.full_with_scores, in_axes=(1, None, None, 0), out_axes=(1, 0))(
            queries[:, :, 0],
            keys.narrow(),
            values.narrow(),
            jnp.broadcast_to(visible[:, None], (at_once, q.shape[0], width)),
        )
        slots = checkpoint_name(_ranked(lax.stop_gradient(scores), visible, recycle), SELECTION)
        local = new_keys[:, :, 1:], new_values[:, :, 1:]
        partial = _partial(queries[:, :, 1:], keys, values, slots, *local, recycle.evict)
        return jnp.concatenate([out[:, :, None], partial], axis=2)

    parts = by_segment(q), by_segment(k), by_segment(v)
    ends = first + 1 + stride * jnp.arange(parts[0].shape[0] * at_once, dtype=jnp.int32)
    out = _map(attend, (*parts, ends.reshape(-1, at_once)))
    out = out.reshape(*out.shape[:2], at_once * stride, *out.shape[4:])
    return checkpoint_name(_unblock(out, width - first), OUTPUT)


def _ranked(scores: Float[Array, "C B K T"], visible: Array, recycle: Recycle) -> Int[Array, "B K C R"]:
    """The slots that each segment's first token selects, best first; -1 beyond the tokens there are."""
    seen = jnp.broadcast_to(visible[:, None], (*scores.shape[:2], scores.shape[3]))
    pooled = jax.vmap(lambda s, m: select.pool(s, m, recycle.pool, recycle.lookahead))(scores, seen)
    slots = select.top_slots(pooled.reshape(-1, *pooled.shape[2:]), recycle.budget)
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
    """Attention to the ranked keys and to the tokens since they were selected."""
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
    # the token sees itself: no row is empty
    weights = jax.nn.softmax(logits * _scale(queries), axis=-1).astype(queries.dtype)
    out = jnp.einsum(
        "bkcgjr,bkcrh->bcjkgh", weights[..., :ranks], values.gather(slots), preferred_element_type=jnp.float32
    ) + jnp.einsum("bkcgji,bcikh->bcjkgh", weights[..., ranks:], new_values, preferred_element_type=jnp.float32)
    return out.astype(queries.dtype).reshape(queries.shape)


class _Wide(NamedTuple):
    """Keys or values that many blocks read: held in float32 so that their gradients add up in float32, and read in the
    dtype that they came in. (XLA moves the rounding out of the loop over blocks.)"""

    held: Array  # float32 [B, K, T, H]
    dtype: Any

    def narrow(self) -> Float[Array, "B K T H"]:
        return self.held.astype(self.dtype)

    def gather(self, slots: Int[Array, "B K C R"]) -> Float[Array, "B K C R H"]:
        return jax.vmap(jax.vmap(lambda rows, at: rows[at]))(self.held, jnp.maximum(slots, 0)).astype(self.dtype)


def _by_head(x: Float[Array, "B T K H"]) -> _Wide:
    return _Wide(x.transpose(0, 2, 1, 3).astype(jnp.float32), x.dtype)


def _grouped(q: Float[Array, "... N H"], kv_heads: int) -> Float[Array, "... K G H"]:
    return q.reshape(*q.shape[:-2], kv_heads, q.shape[-2] // kv_heads, q.shape[-1])


def _scale(q: Array) -> float:
    return q.shape[-1] ** -0.5


def _attended(logits: Float[Array, "B K G C S"], values: Float[Array, "B K S H"], q: Array) -> Float[Array, "B C N H"]:
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bkgcs,bksh->bckgh", weights, values, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(q.shape)


def _blocks(x: Array, size: int) -> Array:
    """[B, T, ...] as [blocks, B, size, ...], with zeros behind the end."""
    count = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)


def _unblock(x: Array, width: int) -> Array:
    """The first `width` of what `_blocks` cut up."""
    joined = x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return joined[:, :width]


def _map(attend: Callable[[Any], Array], blocks: Any) -> Array:
    """`attend` of one block after the other; its insides, but for the selection, are made again for the gradient."""
    keep = jax.checkpoint_policies.save_only_these_names(SELECTION)
    return lax.map(jax.checkpoint(attend, policy=keep), blocks)
