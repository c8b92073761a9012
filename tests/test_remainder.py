"""One token that stands for many: what holds of it whatever the query."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recyc_jax.attention import reference, remainder

B, K, G, H = 2, 2, 2, 8


def moments(q, keys, values, seen):
    visible = jnp.broadcast_to(jnp.asarray(seen), (B, keys.shape[2]))
    return reference.moments(q, [(keys, values, visible[:, None])], with_key=True)


def random(seed, tokens, scale):
    rng = np.random.default_rng(seed)
    q, other = rng.normal(size=(2, B, K * G, H)) * scale
    keys, values = rng.normal(size=(2, B, K, tokens, H))
    return (jnp.asarray(x, jnp.float32) for x in (q, other, keys, values))


@given(st.integers(0, 10**6), st.integers(2, 40), st.floats(0.1, 5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_query_that_made_it_loses_nothing_and_no_other_gets_too_much(seed, tokens, scale):
    q, other, keys, values = random(seed, tokens, scale)
    kept = np.arange(tokens) < max(1, tokens // 3)
    everything, inside = moments(q, keys, values, True), moments(q, keys, values, kept)
    rest = remainder.outside(q, everything, inside, jnp.array([True, True]))
    full = reference.full(q, keys, values, jnp.ones((B, tokens), bool))
    np.testing.assert_allclose(rest.added(q, inside), full, atol=5e-4)
    # under another query, it takes no more of the softmax than the tokens that it stands for
    logit = jnp.sum(other.reshape(rest.key.shape) * rest.key, axis=-1) * H**-0.5 + rest.bias
    np.testing.assert_array_less(logit, moments(other, keys, values, ~kept).lse + 1e-2)


def test_nothing_outside_is_nothing():
    q, other, keys, values = random(0, 9, 1.0)
    everything = moments(q, keys, values, True)
    rest = remainder.outside(q, everything, everything, jnp.array([False, True]))
    assert np.isneginf(rest.bias).all()
    now = moments(other, keys, values, True)
    np.testing.assert_array_equal(rest.added(other, now), now.value.reshape(other.shape))
