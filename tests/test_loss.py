"""The training loss and its gradient against the obvious ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import loss


def plain(hidden, head, targets, z_loss):
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2 - chosen


def with_gradients(losses, hidden, head, targets, weights, z_loss):
    def total(hidden, head):
        made = losses(hidden, head, targets, z_loss)
        return jnp.sum(made * weights), made

    (_, made), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head)
    return made, *gradients


def arrays(rows, width, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden, head = (jnp.asarray(rng.normal(size=size), dtype) for size in ((rows, width, 16), (40, 16)))
    weights = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, 40, (rows, width)), jnp.int32), weights


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([0, 0.1]), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_it_is_cross_entropy(rows, width, z_loss, block, seed):
    """Whatever the blocks are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_BLOCK", block)
        patch.setattr(loss, "_LEAST", 2 * block)
        found, expected = (
            with_gradients(losses, *arrays(rows, width, seed), z_loss) for losses in (loss.token_losses, plain)
        )
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_sums_over_blocks_are_float32(monkeypatch):
    """In bfloat16 the head's gradient over 64 blocks is as near as one product's rounding."""
    monkeypatch.setattr(loss, "_BLOCK", 4)
    monkeypatch.setattr(loss, "_LEAST", 4)
    hidden, head, targets, weights = arrays(1, 256, 0, jnp.bfloat16)
    _, _, found = with_gradients(loss.token_losses, hidden, head, targets, weights, 0)
    wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
    _, _, expected = with_gradients(plain, *wide, targets, weights, 0)
    off = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
    assert off < 4e-3
