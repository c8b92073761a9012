"""The selection rules that lost do what their names say, and their command runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from eval.ideas import rules
from recyc_jax import implementations
from recyc_jax.attention import reference, selection
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache
from recyc_jax.kernels.gpu import triton_call
from recyc_jax.policies import registry
from recyc_jax.policies.base import Step


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, make in rules.IDEAS.items():
        monkeypatch.setitem(registry.POLICIES, name, make)


@pytest.fixture(scope="module")
def tokens(config):
    return jax.random.randint(jax.random.key(0), (2, 60), 0, config.vocab_size)


def scored(params, config, tokens, policy):
    state = rj.prefill(params, config, tokens[:, :40], policies=(policy,), max_new_tokens=20)
    return rj.score_after(params, config, state, tokens[:, 40:], policy=policy)[0]


def test_early_refreshes_are_at_steps_1_2_4_8_and_every_stride(params, config, tokens):
    policy = rj.parse_policy("idea_early:budget=6,stride=7,lookahead=auto")
    assert policy.lookahead == 6
    none = jnp.zeros(2, jnp.int32)
    steps = [Step(None, None, None, none, none[0], jnp.int32(number), none > 0) for number in range(20)]
    numbers = [number for number in range(1, 20) if bool(policy.schedule.due(steps[number], None)[0])]
    assert numbers == [1, 2, 4, 7, 8, 14]
    assert scored(params, config, tokens, policy).full_steps.tolist() == [[6] * 2] * 2


@pytest.mark.parametrize("implementation", ["in_pieces", "pallas_gpu"])
def test_irregular_refreshes_leave_the_same_sets(params, config, tokens, implementation, monkeypatch):
    """A set must last for the most steps between two full steps, not only for the schedule's period of 1."""
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "in_pieces", "in_pieces:InPieces")
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
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
    mean = rules.MeanOverGroups(Implementation())
    out, log_probabilities = mean.full_with_log_probabilities(q, LayerCache(k, v), visible)
    scores = selection.group_maximum(log_probabilities)
    _, each = reference.full_with_log_probabilities(q, k, v, visible)
    np.testing.assert_allclose(jnp.exp(scores), jnp.exp(each).mean(axis=2), rtol=1e-5)
    np.testing.assert_allclose(out, reference.full(q, k, v, visible), rtol=1e-6)


def test_without_groups_mean_and_maximum_are_one(tokens):
    config = rj.LlamaConfig.tiny(num_key_value_heads=4)
    params = jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))
    mean, maximum = (
        scored(params, config, tokens, rj.parse_policy(f"{name}:budget=8,stride=5")).log_probabilities
        for name in ("idea_mean", "recycled")
    )
    np.testing.assert_allclose(mean, maximum, atol=1e-4)


@pytest.mark.parametrize("option", ["", ",slope=0", ",head=false", ",shared=0", ",vote=1", ",reserve=0"])
def test_without_options_the_combined_rule_is_look_ahead_with_memory(params, config, tokens, option):
    plain = rj.parse_policy("recycled:budget=9,stride=5,lookahead=auto,window=32,decay=1")
    idea = rj.parse_policy(f"idea_combined:budget=9,stride=5,lookahead=auto,decay=1{option}")
    one, other = (scored(params, config, tokens, policy).log_probabilities for policy in (plain, idea))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    ["anchor=0", "slope=0.5", "vote=4", "sum=true", "head=true", "shared=3", "reserve=0.6,reach=3", "tail=zero"],
)
def test_each_option_makes_a_difference(params, config, tokens, option):
    plain, changed = "idea_combined:budget=9,stride=5,lookahead=3,decay=1,pool=1", f",{option}"
    one, other = (
        scored(params, config, tokens, rj.parse_policy(text)).log_probabilities for text in (plain, plain + changed)
    )
    assert np.abs(np.asarray(one) - np.asarray(other)).max() > 1e-4


def test_the_tail_to_first_order_is_the_remainder_of_look_ahead(params, config, tokens):
    idea = rj.parse_policy("idea_combined:budget=9,stride=5,lookahead=3,decay=1,tail=first")
    named = rj.parse_policy("lookahead:budget=9,stride=5,lookahead=3")
    one, other = (scored(params, config, tokens, policy).log_probabilities for policy in (idea, named))
    np.testing.assert_allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("name", ["idea_coverage", "idea_share"])
def test_schedules_by_coverage_lie_between_their_bounds(params, config, tokens, name):
    """A goal that cannot be missed (or is always missed) gives the longest (or the shortest) intervals."""
    always, never = ("0", "1.1") if name == "idea_coverage" else ("1.1", "0")
    rare, often = (
        scored(params, config, tokens, rj.parse_policy(f"{name}:budget=9,check_every=3,longest=12,goal={goal}"))
        for goal in (always, never)
    )
    # 19 steps: at 3, 9 (waits of 3, 6 and 12) or, by share, at 12 alone; against every third
    assert rare.full_steps.tolist() == [[2 if name == "idea_coverage" else 1] * 2] * 2
    assert often.full_steps.tolist() == [[6] * 2] * 2
    fixed = rj.parse_policy("lookahead:budget=9,stride=3,lookahead=49")
    np.testing.assert_allclose(
        often.log_probabilities, scored(params, config, tokens, fixed).log_probabilities, atol=1e-4
    )


def test_the_command_is_ruler_with_more_policies(call_module, tmp_path, monkeypatch):
    """`eval.ideas` knows the additional policies, `eval.ruler` does not."""
    for name in rules.IDEAS:
        monkeypatch.delitem(registry.POLICIES, name)
    flags = ["--policies", "idea_mean:budget=5,stride=3", "--tasks", "nothing", "--out", tmp_path]
    assert "'nothing' is unknown" in call_module("eval.ideas", *flags).stderr
    flags[3] = "vt"
    assert "'idea_mean' is unknown" in call_module("eval.ruler", *flags).stderr
    flags[1] = "idea_mean:budget=5,stride=three"
    assert "stride=three is not a whole number" in call_module("eval.ideas", *flags).stderr
