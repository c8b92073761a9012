"""`generate` and `score` under recycled attention against the numpy oracle."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj

SHAPES = {  # query heads, kv heads
    "mha": (2, 2),
    "gqa": (4, 2),
    "mqa": (3, 1),
}
PROMPTS = (7, 16)  # few lengths, because each needs a compilation


@pytest.fixture(scope="module")
def models():
    made = {}
    for name, (heads, kv_heads) in SHAPES.items():
        config = rj.LlamaConfig.tiny(num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=64)
        made[name] = config, jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(1)))
    return made


def check(params, config, prompt, budget, stride, pool, new_tokens=12, lookahead=0):
    policy = rj.RecycledAttention(budget, rj.FixedStride(stride), pool=pool, lookahead=lookahead)
    out = rj.generate(params, config, [prompt], policy=policy, max_new_tokens=new_tokens, eos_ids=())
    ahead = stride - 1 if lookahead == "auto" else lookahead
    trace = oracle.recycled(
        params, config, prompt, budget=budget, stride=stride, pool=pool, new_tokens=new_tokens, lookahead=ahead
    )
    # float32 against float64: after a choice with a margin below 1e-5, either outcome is right
    sure = sum(gap > 1e-5 for gap in trace.least_gap)
    assert np.asarray(out.tokens)[0, :sure].tolist() == trace.tokens[:sure]
    assert np.asarray(out.full_steps).tolist() == [trace.full_steps]
    return sure, trace


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    length=st.sampled_from(PROMPTS),
    budget=st.sampled_from((1, 2, 3, 5, 9, 40)),
    stride=st.sampled_from((1, 2, 4, 11, 30)),
    pool=st.sampled_from((1, 3, 7)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_generate_equals_the_reference(models, shape, length, budget, stride, pool, seed):
    config, params = models[shape]
    prompt = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()
    check(params, config, prompt, budget, stride, pool)


@pytest.mark.parametrize(("budget", "stride", "pool"), [(3, 4, 1), (5, 3, 3), (9, 30, 7), (40, 4, 3)])
def test_score_equals_the_reference(models, budget, stride, pool):
    """Every column of two teacher-forced rows agrees with the oracle; with another stride the scores are far off."""
    config, params = models["gqa"]
    prompts = np.random.default_rng(8).integers(0, config.vocab_size, (2, 16))
    options = dict(budget=budget, stride=stride, pool=pool, new_tokens=14)
    traces = [oracle.recycled(params, config, prompt.tolist(), **options) for prompt in prompts]
    tokens = np.concatenate([prompts, [trace.tokens for trace in traces]], axis=1)
    expected = np.array(
        [[row[token] - np.logaddexp.reduce(row) for row, token in zip(t.logits, t.tokens, strict=True)] for t in traces]
    )

    def score(stride):
        policy = rj.RecycledAttention(budget, rj.FixedStride(stride), pool=pool)
        return np.asarray(rj.score(params, config, tokens, policy=policy, context_length=16))

    for row, trace in enumerate(traces):
        sure = sum(gap > 1e-5 for gap in trace.least_gap)
        assert sure >= 10
        np.testing.assert_allclose(score(stride)[row, :sure], expected[row, :sure], atol=1e-4)
    if budget < 30 and stride < 14:  # otherwise both strides give the same steps
        assert np.abs(score(stride + 1) - expected).max() > 0.1


@pytest.mark.slow
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    length=st.integers(1, 40),
    budget=st.integers(1, 60),
    stride=st.integers(1, 40),
    pool=st.sampled_from((1, 3, 5, 7, 9, 15)),
    lookahead=st.sampled_from((0, 0, 1, 4, 19, "auto")),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_generate_equals_the_reference_far_and_wide(models, shape, length, budget, stride, pool, lookahead, seed):
    config, params = models[shape]
    prompt = np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()
    check(params, config, prompt, budget, stride, pool, new_tokens=30, lookahead=lookahead)


def test_the_comparison_has_teeth(models):
    """The oracle's tokens differ between budgets, strides and pools, and near ties exclude few steps."""
    config, params = models["gqa"]
    prompt = np.random.default_rng(5).integers(0, config.vocab_size, 16).tolist()
    traces = {}
    settings = (
        (3, 4, 1, 0),
        (3, 11, 1, 0),
        (9, 4, 1, 0),
        (3, 4, 7, 0),
        (3, 11, 1, 2),
    )
    for budget, stride, pool, ahead in settings:
        case = budget, stride, pool, ahead
        sure, traces[case] = check(params, config, prompt, budget, stride, pool, lookahead=ahead)
        assert sure >= 10
    distinct = {tuple(trace.tokens) for trace in traces.values()}
    assert len(distinct) == len(traces)


def test_biased_untied_models_too(models):
    config = dataclasses.replace(models["gqa"][0], qkv_bias=True, tie_word_embeddings=True)
    params = jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(2)))
    for layer in range(config.num_hidden_layers):
        for name in "qkv":
            dense = params[f"layers_{layer}"]["attention"][f"{name}_proj"]
            dense["bias"] = jax.random.normal(jax.random.key(layer), dense["bias"].shape)
    prompt = np.random.default_rng(6).integers(0, config.vocab_size, 16).tolist()
    sure, _ = check(params, config, prompt, 5, 4, 3)
    assert sure >= 10


@pytest.mark.parametrize(
    "fields",
    [
        dict(qk_norm="head"),
        dict(qk_norm="projection"),
        dict(layers_without_rope=(1,)),  # in the first layer, equal tokens would have equal keys, and their scores tie
        dict(qk_norm="head", layer_types=("sliding_attention", "full_attention"), sliding_window=5),
    ],
    ids=str,
)
def test_norms_of_heads_layers_without_rope_and_sliding_windows_too(models, fields):
    config = dataclasses.replace(models["gqa"][0], **fields)
    params = jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(2)))
    sure = 0
    for seed in (6, 7, 8):  # one text may hold a near tie early on
        prompt = np.random.default_rng(seed).integers(0, config.vocab_size, 16).tolist()
        sure += check(params, config, prompt, 5, 4, 3)[0]
    assert sure >= 15
