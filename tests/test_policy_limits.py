"""Where one policy must equal another, and that refinements and neighbouring rows change what they should."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_strings import NEW, RAGGED, STRINGS, same

import recyc_jax as rj

LAYERS = 1  # policies treat layers alike


@pytest.fixture(scope="module")
def full(params, config):
    return rj.generate(params, config, RAGGED, max_new_tokens=NEW)


@pytest.fixture
def generate(params, config):
    return functools.partial(rj.generate, params, config, max_new_tokens=NEW)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_never_refreshing_is_snapkv(generate, lookahead):
    snapkv = generate(RAGGED, policy=rj.SnapKV(5, pool=3, lookahead=lookahead))
    for schedule in (rj.FixedStride(NEW), rj.QuerySimilarity(3, -1.0)):
        recycled = generate(RAGGED, policy=rj.RecycledAttention(5, schedule, pool=3, lookahead=lookahead))
        if isinstance(schedule, rj.FixedStride):
            same(snapkv, recycled)
        else:  # only a similarity of exactly -1 would give a full step
            np.testing.assert_array_equal(snapkv.tokens, recycled.tokens)
            assert not recycled.full_steps.any()


@pytest.mark.parametrize("rope", [False, True])
def test_a_threshold_of_one_at_every_step_is_full_attention(generate, full, rope):
    same(full, generate(RAGGED, policy=rj.RecycledAttention(5, rj.QuerySimilarity(1, 1.0, rope))))


@pytest.mark.parametrize("check_every", [1, 4])
def test_a_threshold_of_one_is_the_fixed_stride(generate, check_every):
    dynamic = generate(RAGGED, policy=rj.RecycledAttention(5, rj.QuerySimilarity(check_every, 1.0), pool=3))
    same(dynamic, generate(RAGGED, policy=rj.RecycledAttention(5, rj.FixedStride(check_every), pool=3)))


@pytest.mark.parametrize("policy", [rj.H2O(5, full_stride=1), rj.StreamingLLM(5, full_stride=1)], ids=["h2o", "llm"])
def test_full_at_every_step_is_full_attention(generate, full, policy):
    same(full, generate(RAGGED, policy=policy))


def test_the_new_refinements_differ_from_the_plain_method(params, config):
    """Each field changes the result of the loop."""
    plain = rj.RecycledAttention(5, rj.FixedStride(4), pool=3)
    others = [
        dataclasses.replace(plain, **change)
        for change in (
            {"evict": False},
            {"ablation": "no_refresh"},
            {"ablation": "no_full_attention"},
            {"lookahead": 2},
        )
    ]
    tokens = np.random.default_rng(3).integers(0, 96, (2, 60))
    scores = [
        np.asarray(rj.score(params, config, tokens, policy=policy, context_length=30)) for policy in (plain, *others)
    ]
    for other in scores[1:]:
        assert np.abs(other - scores[0]).max() > 1e-2


@given(
    st.lists(st.lists(st.integers(0, 95), min_size=1, max_size=24), min_size=3, max_size=3), st.sampled_from(STRINGS)
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_neighbours_do_not_matter(params, config, prompts, text):
    run = functools.partial(rj.generate, params, config, policy=rj.parse_policy(text), max_new_tokens=8, eos_ids=())
    padded, lengths = np.zeros((3, 24), np.int32), np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    together = run(padded, prompt_lengths=lengths)
    alone = run(padded[1:2], prompt_lengths=lengths[1:2])
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    np.testing.assert_array_equal(together.full_steps[1], alone.full_steps[0])
