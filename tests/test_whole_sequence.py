"""The parallel forms of training against the decode loop, token by token, and their gradients against dense masks."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax.attention import reference, selection, whole_sequence
from recyc_jax.attention.whole_sequence import Recycle
from train import forward


def recycled(recycle):
    return lambda q, k, v, segments: whole_sequence.recycled(q, k, v, recycle)


def dense(q, k, v, segments):
    return whole_sequence.causal(q, k, v, segments)


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def log_probabilities(params, config, tokens, attention, segments=None):
    return -forward.token_losses(
        forward.stack_layers(params, config.num_hidden_layers), config, tokens, segments, attention
    )


def tokens_of(config, rows, width, seed=0):
    return jax.random.randint(jax.random.key(seed), (rows, width), 0, config.vocab_size)


def test_stacking_is_undone(params, config):
    again = forward.unstack_layers(forward.stack_layers(params, config.num_hidden_layers))
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize(
    ("prefix", "stride", "budget", "pool", "lookahead", "evict"),
    [
        (1, 5, 8, 7, 0, False),
        (9, 4, 6, 3, 3, True),
        (30, 10, 5, 7, 9, False),
        (30, 10, 5, 1, 0, True),  # the stride exceeds the budget: the oldest new tokens leave
        (1, 12, 1, 7, 0, True),
    ],
)
def test_the_strided_form_is_score_token_by_token(params, config, prefix, stride, budget, pool, lookahead, evict):
    tokens = tokens_of(config, 2, 57)
    policy = rj.RecycledAttention(budget, rj.FixedStride(stride), pool, lookahead, evict)
    expected = rj.score(params, config, tokens, policy=policy, context_length=prefix)
    got = log_probabilities(params, config, tokens, recycled(Recycle(prefix, stride, budget, pool, lookahead, evict)))
    np.testing.assert_allclose(got[:, prefix - 1 :], expected, atol=2e-4)


@settings(max_examples=2, deadline=None)
@given(st.data())
def test_any_strided_form_is_score(params, config, data):
    any_strided_form(params, config, data)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_strided_form_is_score_far_and_wide(params, config, data):
    any_strided_form(params, config, data)


def any_strided_form(params, config, data):
    width = 40
    prefix = data.draw(st.integers(1, width - 1))
    stride, budget = data.draw(st.integers(1, width + 5)), data.draw(st.integers(1, width + 5))
    pool, lookahead = data.draw(st.sampled_from([1, 3, 7])), data.draw(st.integers(0, 6))
    evict = data.draw(st.booleans())
    tokens = tokens_of(config, 1, width, data.draw(st.integers(0, 9)))
    policy = rj.RecycledAttention(budget, rj.FixedStride(stride), pool, lookahead, evict)
    expected = rj.score(params, config, tokens, policy=policy, context_length=prefix)
    got = log_probabilities(params, config, tokens, recycled(Recycle(prefix, stride, budget, pool, lookahead, evict)))
    np.testing.assert_allclose(got[:, prefix - 1 :], expected, atol=2e-4)


@pytest.mark.parametrize(("stride", "later"), [(10, 10), (26, 40)])
def test_the_paper_form_is_score_without_refresh(params, config, stride, later):
    """The first tokens attend causally; the last `stride` tokens attend to the top keys of the token before them and to
    one another (section 5)."""
    width, budget = 57, 6
    prefix = width - stride
    tokens = tokens_of(config, 2, width)
    policy = rj.RecycledAttention(budget, rj.FixedStride(later + 1), evict=False)
    got = log_probabilities(params, config, tokens, recycled(Recycle(prefix, stride + 1, budget)))
    expected = rj.score(params, config, tokens, policy=policy, context_length=prefix)
    np.testing.assert_allclose(got[:, prefix - 1 :], expected, atol=2e-4)
    full = jax.nn.log_softmax(rj.forward(params, config, tokens))
    full = jnp.take_along_axis(full[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(got[:, : prefix - 1], full[:, : prefix - 1], atol=2e-4)


@pytest.mark.parametrize("attention", [dense, recycled(Recycle(1, 6, 60)), recycled(Recycle(20, 6, 57, evict=True))])
def test_a_budget_that_holds_everything_is_ordinary_training(params, config, attention):
    tokens = tokens_of(config, 2, 57)
    full = jax.nn.log_softmax(rj.forward(params, config, tokens))
    full = jnp.take_along_axis(full[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(log_probabilities(params, config, tokens, attention), full, atol=2e-4)


def test_packed_documents_are_read_as_alone(params, config):
    first, second = tokens_of(config, 1, 23, 1), tokens_of(config, 1, 18, 2)
    packed = jnp.concatenate([first, second], axis=1)
    segments = jnp.asarray([[1] * 23 + [2] * 18])
    together = log_probabilities(params, config, packed, dense, segments)
    np.testing.assert_allclose(together[:, :22], log_probabilities(params, config, first, dense), atol=1e-5)
    np.testing.assert_allclose(together[:, 23:], log_probabilities(params, config, second, dense), atol=1e-5)


def heads(seed=0, width=41, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [2 * jax.random.normal(key, (2, width, n, 8), dtype) for key, n in zip(keys, (4, 2, 2), strict=True)]


def mask_of(q, k, v, recycle):
    """The mask [B, N, T, T] by the definition of `Recycle`, one token at a time."""
    batch, width, heads_, _ = q.shape
    groups = heads_ // k.shape[2]
    seen = np.zeros((batch, heads_, width, width), bool)
    for t in range(width):
        if t < recycle.prefix or (t - recycle.prefix + 1) % recycle.stride == 0:
            seen[:, :, t, : t + 1] = True
            if t >= recycle.prefix - 1:
                visible = jnp.broadcast_to(jnp.arange(width) <= t, (batch, width))
                arrays = q[:, t], k.swapaxes(1, 2), v.swapaxes(1, 2), visible
                scores = selection.group_maximum(reference.full_with_log_probabilities(*arrays)[1])
                pooled = np.full(scores.shape, -np.inf)
                half = recycle.pool // 2
                for j in range(t + 1):
                    low, high = max(0, j - half - recycle.lookahead), min(t, j + half)
                    pooled[:, :, j] = np.asarray(scores)[:, :, low : high + 1].max(axis=2)
                ranked = np.argsort(-pooled, axis=2, kind="stable")[:, :, : min(recycle.budget, t + 1)]
                selected_at = t
        else:
            new = t - selected_at
            left = min(recycle.budget, width) - new if recycle.evict else recycle.budget
            for b in range(batch):
                for head in range(heads_):
                    seen[b, head, t, ranked[b, head // groups][: max(left, 0)]] = True
            begin = selected_at + 1
            if recycle.evict:
                begin = max(begin, t - min(recycle.budget, width) + 1)
            seen[:, :, t, begin : t + 1] = True
    return jnp.asarray(seen)


def masked(q, k, v, seen):
    repeat = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)


@pytest.mark.parametrize(
    "recycle",
    [
        Recycle(1, 5, 6),
        Recycle(1, 5, 6, evict=True),
        Recycle(30, 12, 7),  # the paper's form
        Recycle(13, 7, 3, pool=3, lookahead=2, evict=True),
        Recycle(4, 9, 50),
    ],
)
@pytest.mark.parametrize("block", [pytest.param(512, marks=pytest.mark.slow), 16])
def test_gradients_are_those_of_a_dense_mask(recycle, block, monkeypatch):
    monkeypatch.setattr(whole_sequence, "QUERY_BLOCK", block)
    q, k, v = heads()
    weights = jax.random.normal(jax.random.key(9), q.shape)
    seen = mask_of(q, k, v, recycle)

    def ours(q, k, v):
        return jnp.sum(weights * whole_sequence.recycled(q, k, v, recycle))

    def theirs(q, k, v):
        return jnp.sum(weights * masked(q, k, v, seen))

    np.testing.assert_allclose(whole_sequence.recycled(q, k, v, recycle), masked(q, k, v, seen), atol=1e-5)
    for mine, expected in zip(jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(theirs, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-5)


def test_no_array_of_length_times_length_is_made():
    width, recycle = 4096, Recycle(1, 64, 128)
    q, k, v = (jax.ShapeDtypeStruct((1, width, n, 8), jnp.float32) for n in (2, 1, 1))
    step = jax.jit(jax.grad(lambda q, k, v: jnp.sum(whole_sequence.recycled(q, k, v, recycle)), (0, 1, 2)))
    sizes = [
        aval.size
        for equation in jaxprs.equations(jax.make_jaxpr(step)(q, k, v).jaxpr)
        for aval in (var.aval for var in equation.outvars)
        if hasattr(aval, "size")
    ]
    assert max(sizes) < width * width / 8


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_the_gradient_does_not_select_again(config, remat):
    shapes = jax.eval_shape(lambda: forward.stack_layers(rj.init_params(config, jax.random.key(0)), 2))
    tokens = jax.ShapeDtypeStruct((1, 48), jnp.int32)

    def loss(params, tokens):
        return jnp.sum(forward.token_losses(params, config, tokens, None, recycled(Recycle(1, 8, 16)), remat=remat))

    names = [
        equation.primitive.name for equation in jaxprs.equations(jax.make_jaxpr(jax.grad(loss))(shapes, tokens).jaxpr)
    ]
    assert names.count("top_k") == 1  # one, in the loop over blocks in the scan over layers
