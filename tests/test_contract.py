"""What every policy owes, whatever its method: one body for all that the registry knows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax.policies.registry import POLICIES

RAGGED = ([5, 9, 3], list(range(40, 73)), list(range(17)), [1])
WIDTH = 36  # what 33, the longest, is padded to
NEW = 20
STRINGS = (
    "full",
    "recycled:budget=5,stride=4,pool=3",
    "recycled:budget=6,stride=4,pool=1,lookahead=auto",
    "recycled:budget=5,stride=4,pool=3,window=8,decay=1",
    "recycled:budget=5,stride=4,evict=false",
    "recycled:budget=5,stride=4,ablation=no_refresh",
    "recycled:budget=5,stride=4,ablation=no_full_attention",
    "recycled:budget=5,check_every=3,threshold=0.1,pool=3",
    "recycled:budget=5,check_every=1,threshold=0.0,rope=true",
    "recycled:budget=5,check_every=3,threshold=0.1,evict=false",
    "snapkv:budget=5",
    "snapkv:budget=5,window=8,pool=3,lookahead=2",
    "h2o:budget=6",
    "h2o:budget=5,full_stride=3",
    "streaming_llm:budget=6",
    "streaming_llm:budget=6,sinks=2,full_stride=3",
)
every_policy = pytest.mark.parametrize("policy", [rj.parse_policy(text) for text in STRINGS], ids=STRINGS)


@pytest.fixture(scope="module")
def full(params, config):
    return rj.generate(params, config, RAGGED, max_new_tokens=NEW)


@pytest.fixture
def generate(params, config):
    return functools.partial(rj.generate, params, config, max_new_tokens=NEW)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_registered_method_is_here():
    assert {text.partition(":")[0] for text in STRINGS} == set(POLICIES)


@every_policy
def test_a_ragged_batch_is_each_row_alone(generate, full, policy):
    together = generate(RAGGED, policy=policy)
    for row, prompt in enumerate(RAGGED):
        alone = generate(np.array([prompt + [7] * (WIDTH - len(prompt))]), prompt_lengths=[len(prompt)], policy=policy)
        same([field[row] for field in together], [field[0] for field in alone])
    if not isinstance(policy, rj.FullAttention):
        assert (np.asarray(together.tokens) != np.asarray(full.tokens)).any()  # the method shows


@every_policy
def test_a_budget_of_the_whole_length_is_full_attention(generate, full, policy):
    """Exactly the longest row's 52 tokens (H2O: half of the budget is for the latest), and far beyond the cache."""
    if isinstance(policy, rj.FullAttention):
        return
    for budget in (52 * (1 + isinstance(policy, rj.H2O)), 1000):
        got = generate(RAGGED, policy=dataclasses.replace(policy, budget=budget))
        np.testing.assert_array_equal(got.tokens, full.tokens)


@pytest.mark.parametrize("text", ["full", *STRINGS[6::3]])
def test_arrays_inside_jit(params, config, generate, text):
    policy = rj.parse_policy(text)
    tokens, lengths = np.full((4, 50), 95, np.int32), np.array([len(prompt) for prompt in RAGGED], np.int32)
    for row, prompt in enumerate(RAGGED):
        tokens[row, : len(prompt)] = prompt

    @jax.jit
    def inside(tokens, lengths):
        return rj.generate(params, config, tokens, prompt_lengths=lengths, policy=policy, max_new_tokens=NEW)

    same(generate(RAGGED, policy=policy), inside(jnp.asarray(tokens), jnp.asarray(lengths)))


def test_one_prefill_serves_all(params, config, generate):
    """Decoded in turn from one state, each as if it were alone."""
    policies = [rj.parse_policy(text) for text in ("full", *STRINGS[6::3], STRINGS[6])]
    state = rj.prefill(params, config, RAGGED, policies=policies, max_new_tokens=NEW)
    for policy in policies:
        out, state = rj.decode(params, config, state, policy=policy)
        same(out, generate(RAGGED, policy=policy))


@every_policy
def test_rows_end_and_steps_are_counted(generate, policy):
    """Truncating at a row's end changes nothing before it, in any row; full steps within it are counted."""
    plain = generate(RAGGED, policy=policy, eos_ids=())
    tokens = np.asarray(plain.tokens)
    eos = (int(tokens[0, 6]), int(tokens[1, 11]))
    out = generate(RAGGED, policy=policy, eos_ids=eos, pad_id=77)
    for row in range(4):
        ends = np.flatnonzero(np.isin(tokens[row], eos))
        length = ends[0] + 1 if ends.size else NEW
        assert int(out.lengths[row]) == length
        np.testing.assert_array_equal(out.tokens[row], np.append(tokens[row, :length], [77] * (NEW - length)))
        assert (np.asarray(out.full_steps[row]) <= np.asarray(plain.full_steps[row])).all()


@every_policy
def test_score_is_generate_teacher_forced(params, config, policy):
    prompt = list(range(30, 60))
    out = rj.generate(params, config, [prompt], policy=policy, max_new_tokens=NEW, eos_ids=())
    tokens = np.asarray([prompt + np.asarray(out.tokens)[0].tolist()])
    got = np.asarray(rj.score(params, config, tokens, policy=policy, context_length=30))[0]
    assert got.shape == (NEW,)
    assert (got > np.log(1 / config.vocab_size)).all()  # each the likeliest of 96


@every_policy
def test_prefill_without_it_is_refused(params, config, policy):
    state = rj.prefill(params, config, RAGGED, max_new_tokens=NEW)
    if policy.observes == type(policy.observes)():
        rj.decode(params, config, state, policy=policy)
    else:
        with pytest.raises(ValueError, match=r"needs the prompt's .*: name it in prefill\(policies=...\)"):
            rj.decode(params, config, state, policy=policy)


@pytest.mark.parametrize("lookahead", [0, 3])
def test_never_refreshing_is_snapkv(generate, lookahead):
    snapkv = generate(RAGGED, policy=rj.SnapKV(5, pool=3, lookahead=lookahead))
    for schedule in (rj.FixedStride(NEW), rj.QuerySimilarity(3, -1.0)):
        recycled = generate(RAGGED, policy=rj.RecycledAttention(5, schedule, pool=3, lookahead=lookahead))
        if isinstance(schedule, rj.FixedStride):
            same(snapkv, recycled)
        else:  # a similarity of exactly -1 alone would be a full step
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
    """Each field is seen by the loop."""
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
@settings(max_examples=8, deadline=None, derandomize=True)
def test_neighbours_do_not_matter(params, config, prompts, text):
    run = functools.partial(rj.generate, params, config, policy=rj.parse_policy(text), max_new_tokens=8, eos_ids=())
    padded, lengths = np.zeros((3, 24), np.int32), np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    together = run(padded, prompt_lengths=lengths)
    alone = run(padded[1:2], prompt_lengths=lengths[1:2])
    np.testing.assert_array_equal(together.tokens[1], alone.tokens[0])
    np.testing.assert_array_equal(together.full_steps[1], alone.full_steps[0])
