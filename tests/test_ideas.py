"""The selection rules that lost: they are what their names say, and their command runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from eval import ideas, ruler
from recyc_jax.attention import api, reference, triton
from recyc_jax.decode import score_after
from recyc_jax.policies import registry


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, make in ideas.IDEAS.items():
        monkeypatch.setitem(registry.POLICIES, name, make)


@pytest.fixture(scope="module")
def tokens(config):
    return jax.random.randint(jax.random.key(0), (2, 60), 0, config.vocab_size)


def scored(params, config, tokens, policy):
    state = rj.prefill(params, config, tokens[:, :40], policies=(policy,), max_new_tokens=20)
    return score_after(params, config, state, tokens[:, 40:], policy=policy)[0]


def test_early_refreshes_are_at_steps_1_2_4_8_and_every_stride(params, config, tokens):
    policy = rj.parse_policy("idea_early:budget=6,stride=7,lookahead=auto")
    assert policy.lookahead == 6
    numbers = [
        number for number in range(1, 20) if bool(policy.schedule.due(jnp.int32(number), tokens[:, 0], None, None)[0])
    ]
    assert numbers == [1, 2, 4, 7, 8, 14]
    assert scored(params, config, tokens, policy).full_steps.tolist() == [[6] * 2] * 2


@pytest.mark.parametrize("implementation", ["in_pieces", "pallas_gpu"])
def test_irregular_refreshes_leave_the_same_sets(params, config, tokens, implementation, monkeypatch):
    """A set must last for the longest way from one full step to the next, not for the schedule's period of 1."""
    monkeypatch.setitem(api.IMPLEMENTATIONS, "in_pieces", "in_pieces")
    monkeypatch.setattr(triton, "INTERPRET", jax.default_backend() == "cpu")
    policy = rj.parse_policy("idea_early:budget=9,stride=7,lookahead=auto")
    want, got = (
        rj.score(params, config, tokens, policy=policy, context_length=40, implementation=name)
        for name in ("reference", implementation)
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_budgets_fall_from_layer_to_layer(params, config, tokens):
    policy = rj.parse_policy("idea_layers:budget=8,stride=5,slope=0.5")
    states = scored(params, config, tokens, policy).states
    assert [state.kept.slots.shape[-1] for state in states] == [12, 4]
    level = rj.parse_policy("idea_layers:budget=8,stride=5,slope=0")
    plain = rj.parse_policy("recycled:budget=8,stride=5")
    np.testing.assert_array_equal(
        scored(params, config, tokens, level).log_probabilities, scored(params, config, tokens, plain).log_probabilities
    )


def test_the_mean_over_a_group_ranks_by_mean_probability():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (
        jax.random.normal(key, shape) for key, shape in zip(keys, [(1, 4, 8), (1, 2, 9, 8), (1, 2, 9, 8)], strict=True)
    )
    visible = jnp.ones((1, 9), jnp.bool_)
    out, scores = ideas._mean_over_groups(reference).full_with_scores(q, k, v, visible)
    _, weights = reference.full_with_weights(q, k, v, visible)
    np.testing.assert_allclose(jnp.exp(scores), weights.mean(axis=2), rtol=1e-5)
    np.testing.assert_allclose(out, reference.full(q, k, v, visible), rtol=1e-6)


def test_rows_that_are_due_are_ranked_by_it_too():
    """Where a row's kernels look whether it is due, there is another function to be asked."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8)])
    visible, slots = jnp.ones((2, 9), jnp.bool_), jnp.zeros((2, 2, 3), jnp.int32)
    mean = ideas._mean_over_groups(reference)
    _, want = mean.full_with_scores(q, k, v, visible)
    rest = jnp.asarray([True, False]), slots, jnp.asarray([9, 9], jnp.int32), jnp.int32(9), True
    out, got = mean.full_or_recycled(q, k, v, visible, *rest)
    np.testing.assert_array_equal(got[0], want[0])
    assert (np.asarray(got[1]) == -np.inf).all()
    np.testing.assert_allclose(out, reference.full_or_recycled(q, k, v, visible, *rest)[0], rtol=1e-5)


def test_without_groups_mean_and_maximum_are_one(tokens):
    config = rj.LlamaConfig.tiny(num_key_value_heads=4)
    params = jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))
    mean, maximum = (
        scored(params, config, tokens, rj.parse_policy(f"{name}:budget=8,stride=5")).log_probabilities
        for name in ("idea_mean", "recycled")
    )
    np.testing.assert_allclose(mean, maximum, atol=1e-4)


def test_the_command_is_ruler_with_more_policies(monkeypatch):
    seen = []
    monkeypatch.setattr(ruler, "main", lambda args: seen.append((args, "idea_mean" in registry.POLICIES)) or 0)
    for name in ideas.IDEAS:
        monkeypatch.delitem(registry.POLICIES, name)
    assert ideas.main(["--help"]) == 0
    assert seen == [(["--help"], True)]
    for name in ideas.IDEAS:
        registry.POLICIES.pop(name)
