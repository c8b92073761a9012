"""The loss of each token from its hidden state, in blocks of tokens so that few logits are in memory at once.

Letters: B batch, T tokens, D hidden size, V vocabulary.

The gradient is written by hand. JAX's own would keep the gradient of the logits in float32, the dtype of the logits, so
its matrix products with 16-bit hidden states and weights would run in float32 (in TF32 at best), and it would sum the
gradient of the output embedding over blocks in 16 bits. Here the products have 16-bit inputs like all others, and sums
over blocks are float32."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import model

_BLOCK = 512
"""Least number of tokens of each row in a block."""
_LEAST = 2048
"""Least number of tokens of a block on each device, over all its rows: every block reads and writes the whole gradient
of the output embedding, so small blocks are slow."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"], z_loss: float, shares: int
) -> Float[Array, "B T"]:
    """The negative log-probability of each target, in nats, float32. `head` is the output embedding. `z_loss` is the
    coefficient of an added squared log of the softmax normaliser (PaLM, https://arxiv.org/abs/2204.02311, section 5).
    `shares` is the number of parts that the rows are split into over the mesh."""
    return _forward(hidden, head, targets, z_loss, shares)[0]


def _forward(hidden: Array, head: Array, targets: Array, z_loss: float, shares: int) -> tuple[Array, tuple[Array, ...]]:
    def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.output_logits(part[0], head)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return normaliser - chosen, normaliser

    width = hidden.shape[1]
    losses, normaliser = (_joined(x, width) for x in lax.map(block, (_cut(hidden, shares), _cut(targets, shares))))
    if z_loss:
        losses = losses + z_loss * normaliser**2
    return losses, (hidden, head, targets, normaliser)


def _backward(z_loss: float, shares: int, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, None]:
    hidden, head, targets, normaliser = kept
    of_normaliser = gradient * (1 + 2 * z_loss * normaliser) if z_loss else gradient

    def block(of_head: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        hidden, targets, normaliser, gradient, of_normaliser = part
        chances = jnp.exp(model.output_logits(hidden, head) - normaliser[..., None])
        is_target = targets[..., None] == jnp.arange(head.shape[0], dtype=targets.dtype)
        of_logits = chances * of_normaliser[..., None] - jnp.where(is_target, gradient[..., None], 0)
        of_logits = of_logits.astype(hidden.dtype)
        of_head = of_head + jnp.einsum("btv,btd->vd", of_logits, hidden, preferred_element_type=jnp.float32)
        return of_head, jnp.einsum("btv,vd->btd", of_logits, head)

    # the padding of the last block has a gradient of 0
    parts = tuple(_cut(x, shares) for x in (hidden, targets, normaliser, gradient, of_normaliser))
    of_head, of_hidden = lax.scan(block, jnp.zeros(head.shape, jnp.float32), parts)
    return _joined(of_hidden, hidden.shape[1]), of_head.astype(head.dtype), None


token_losses.defvjp(_forward, _backward)


def _cut(x: Array, shares: int) -> Array:
    """x [B, T, ...] in blocks of t tokens, [blocks, B, t, ...], the last one padded with zeros."""
    rows, width = x.shape[:2]
    size = min(width, max(_BLOCK, -(-_LEAST * shares // rows)))
    blocks = -(-width // size)
    x = jnp.pad(x, [(0, 0), (0, blocks * size - width), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(rows, blocks, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: Array, width: int) -> Array:
    """The inverse of `_cut`; `width` is T."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :width]
