"""The loss of each token from its hidden state, with logits of a few tokens in memory at once.

Its gradient is written out: left to JAX, the logits' own is float32, as the logits are, so that both of its products with
16-bit hidden states and weights run in float32 (tensor cores' TF32 at best), and the head's is summed up over blocks in 16
bits. Here those products are 16-bit as all others are, and sums over blocks float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import model

_BLOCK = 512
"""Tokens of a row whose logits are in memory at once, or more where a device has few rows:"""
_LEAST = 2048
"""as many as make this many of its rows. Each block adds to the head's gradient, which is read and written for it."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_losses(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], targets: Int[Array, "B T"], z_loss: float, shares: int
) -> Float[Array, "B T"]:
    """The negative log-probability of each target, in nats, float32. `z_loss` adds that many times the squared log of the
    softmax's normaliser (PaLM, https://arxiv.org/abs/2204.02311, section 5; 0 adds nothing). Rows lie on `shares` devices
    or groups of them."""
    return _forward(hidden, head, targets, z_loss, shares)[0]


def _forward(hidden: Array, head: Array, targets: Array, z_loss: float, shares: int) -> tuple[Array, tuple[Array, ...]]:
    def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = model.products(part[0], head)
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
        chances = jnp.exp(model.products(hidden, head) - normaliser[..., None])
        is_target = targets[..., None] == jnp.arange(head.shape[0], dtype=targets.dtype)
        of_logits = chances * of_normaliser[..., None] - jnp.where(is_target, gradient[..., None], 0)
        of_logits = of_logits.astype(hidden.dtype)
        of_head = of_head + jnp.einsum("btv,btd->vd", of_logits, hidden, preferred_element_type=jnp.float32)
        return of_head, jnp.einsum("btv,vd->btd", of_logits, head)

    # what fills the last block has a gradient of 0
    parts = tuple(_cut(x, shares) for x in (hidden, targets, normaliser, gradient, of_normaliser))
    of_head, of_hidden = lax.scan(block, jnp.zeros(head.shape, jnp.float32), parts)
    return _joined(of_hidden, hidden.shape[1]), of_head.astype(head.dtype), None


token_losses.defvjp(_forward, _backward)


def _cut(x: Array, shares: int) -> Array:
    """[B, T, ...] as blocks of tokens [blocks, B, t, ...], the last one filled with zeros."""
    rows, width = x.shape[:2]
    size = min(width, max(_BLOCK, -(-_LEAST * shares // rows)))
    blocks = -(-width // size)
    x = jnp.pad(x, [(0, 0), (0, blocks * size - width), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(rows, blocks, size, *x.shape[2:]).swapaxes(0, 1)


def _joined(x: Array, width: int) -> Array:
    """The inverse of `_cut`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :width]
