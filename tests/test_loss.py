"""The training loss and its gradient against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations

from train import loss


def plain(hidden, head, targets, z_loss, shares):
    logits = jnp.einsum("btd,vd->btv", hidden, head)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2 - chosen


def gradients_of(losses, targets, weights, z_loss, shares=1):
    def total(hidden, head):
        made = losses(hidden, head, targets, z_loss, shares)
        return jnp.sum(made * weights), made

    def made_and_gradients(hidden, head):
        (_, made), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, head)
        return made, *gradients

    return jax.jit(made_and_gradients)


def arrays(rows, width, seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden, head = (jnp.asarray(rng.normal(size=size), dtype) for size in ((rows, width, 16), (40, 16)))
    weights = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    return hidden, head, jnp.asarray(rng.integers(0, 40, (rows, width)), jnp.int32), weights


@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.sampled_from([0, 0.1]),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, derandomize=True)
def test_it_is_cross_entropy(rows, width, z_loss, block, shares, seed):
    """The loss is cross-entropy for any sizes of blocks."""
    hidden, head, targets, weights = arrays(rows, width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_BLOCK", block)
        patch.setattr(loss, "_LEAST", 2 * block)
        found, expected = (
            gradients_of(losses, targets, weights, z_loss, shares)(hidden, head)
            for losses in (loss.token_losses, plain)
        )
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_sums_over_blocks_are_float32_and_products_16_bit(monkeypatch):
    """In bfloat16, the head's gradient over 64 blocks is as exact as that of a single product."""
    monkeypatch.setattr(loss, "_BLOCK", 4)
    monkeypatch.setattr(loss, "_LEAST", 4)
    hidden, head, targets, weights = arrays(1, 256, 0, jnp.bfloat16)
    mine = gradients_of(loss.token_losses, targets, weights, 0)
    found = mine(hidden, head)
    wide = hidden.astype(jnp.float32), head.astype(jnp.float32)
    expected = gradients_of(plain, targets, weights, 0)(*wide)
    for one, other, near in zip(found, expected, (1e-5, 4e-3, 4e-3), strict=True):
        off = np.linalg.norm(np.asarray(one, np.float32) - other) / np.linalg.norm(other)
        assert off < near
    products = [
        eqn for eqn in equations(jax.make_jaxpr(mine)(hidden, head).jaxpr) if eqn.primitive.name == "dot_general"
    ]
    assert len(products) == 4  # logits twice, and the gradients of hidden states and of the head
    assert {operand.aval.dtype for eqn in products for operand in eqn.invars} == {jnp.bfloat16.dtype}
