"""Every method against the numpy oracle: the generated tokens, and the scores of each column."""

import jax
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj

NEW = 14


@pytest.fixture(scope="module")
def model():
    config = rj.LlamaConfig.tiny(vocab_size=64)
    return jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(1))), config


def recycled(budget, schedule, **options):
    """The policy, and the oracle's class and options for it."""
    make = rj.FixedStride if "stride" in schedule else rj.QuerySimilarity
    return rj.RecycledAttention(budget, make(**schedule), **options), (
        oracle.Recycled,
        dict(budget=budget, **schedule, **options),
    )


def lookahead(**options):
    return rj.Lookahead(**options), (oracle.Lookahead, options)


CASES = {
    "lookahead": lookahead(budget=7, stride=4, lookahead=2, window=6, pool=1),
    "lookahead by default": lookahead(budget=9, stride=5),
    "lookahead at every step": lookahead(budget=3, stride=1),
    "lookahead, least": lookahead(budget=1, stride=3, pool=1),
    "lookahead, more than the prompt": lookahead(budget=20, stride=6),
    "lookahead without the rest": lookahead(budget=6, stride=4, lookahead=2, window=6, pool=1, remainder=False),
    "top_k": (rj.TopK(3), (oracle.TopK, dict(budget=3))),
    "quest": (rj.Quest(8, 4, 1), (oracle.Quest, dict(budget=8, page=4, dense_layers=1))),
    "quest, small pages": (rj.Quest(3, 1, 0), (oracle.Quest, dict(budget=3, page=1, dense_layers=0))),
    "streaming_llm": (rj.StreamingLLM(6, sinks=2), (oracle.StreamingLLM, dict(budget=6, sinks=2))),
    "streaming_llm without sinks": (rj.StreamingLLM(3, sinks=0), (oracle.StreamingLLM, dict(budget=3, sinks=0))),
    "streaming_llm, many sinks": (rj.StreamingLLM(20, sinks=18), (oracle.StreamingLLM, dict(budget=20, sinks=18))),
    "streaming_llm++": (
        rj.StreamingLLM(6, sinks=2, full_stride=4),
        (oracle.StreamingLLM, dict(budget=6, sinks=2, full_stride=4)),
    ),
    "h2o": (rj.H2O(7), (oracle.H2O, dict(budget=7))),
    "h2o, least": (rj.H2O(2), (oracle.H2O, dict(budget=2))),
    "h2o, more than the prompt": (rj.H2O(20), (oracle.H2O, dict(budget=20))),
    "h2o++": (rj.H2O(6, full_stride=3), (oracle.H2O, dict(budget=6, full_stride=3))),
    "snapkv": (rj.SnapKV(5, pool=3), (oracle.SnapKV, dict(budget=5, pool=3))),
    "snapkv, window": (rj.SnapKV(5, window=4, pool=3), (oracle.SnapKV, dict(budget=5, window=4, pool=3))),
    "snapkv, window of all": (rj.SnapKV(4, window=40, pool=1), (oracle.SnapKV, dict(budget=4, window=40, pool=1))),
    "snapkv, lookahead": (rj.SnapKV(7, pool=1, lookahead=3), (oracle.SnapKV, dict(budget=7, pool=1, lookahead=3))),
    "dynamic": recycled(5, {"check_every": 3, "threshold": 0.1}, pool=3),
    "dynamic, every step": recycled(4, {"check_every": 1, "threshold": 0.0}, pool=1),
    "dynamic, after rope": (
        rj.RecycledAttention(5, rj.QuerySimilarity(2, 0.1, rope=True), pool=3),
        (oracle.Recycled, dict(budget=5, check_every=2, threshold=0.1, rope=True, pool=3)),
    ),
    "dynamic, lookahead": recycled(6, {"check_every": 3, "threshold": 0.1}, pool=1, lookahead="auto"),
    "remembering": recycled(5, {"stride": 4}, pool=1, decay=0.5),
    "remembering the window": recycled(5, {"stride": 3}, pool=3, lookahead=1, window=6, decay=1.0),
    "remembering, dynamic": recycled(5, {"check_every": 2, "threshold": 0.1}, pool=1, window=6, decay=0.2),
    "window alone": recycled(5, {"stride": 6}, pool=3, window=6),
    "no eviction": recycled(4, {"stride": 4}, pool=3, evict=False),
    "no eviction, dynamic": recycled(4, {"check_every": 3, "threshold": 0.1}, pool=3, evict=False),
    "no refresh": recycled(5, {"stride": 4}, pool=3, ablation="no_refresh"),
    "no refresh, no eviction": recycled(5, {"stride": 4}, pool=3, evict=False, ablation="no_refresh"),
    "no full attention": recycled(5, {"stride": 4}, pool=3, ablation="no_full_attention"),
    "no full attention, no eviction": recycled(5, {"stride": 4}, pool=3, evict=False, ablation="no_full_attention"),
    "no full attention, dynamic": recycled(
        5, {"check_every": 2, "threshold": 0.1}, pool=3, ablation="no_full_attention"
    ),
}


def check(model, policy, reference, prompt, new_tokens=NEW):
    params, config = model
    kind, options = reference
    trace = oracle.run(params, config, prompt, kind(config, **options), new_tokens)
    out = rj.generate(params, config, [prompt], policy=policy, max_new_tokens=new_tokens, eos_ids=())
    # float32 against float64: after a choice with a smaller margin, either outcome is right
    sure = sum(gap > (1e-4 if isinstance(policy, rj.Lookahead) else 1e-5) for gap in trace.least_gap)
    assert np.asarray(out.tokens)[0, :sure].tolist() == trace.tokens[:sure]
    if sure == new_tokens:
        assert np.asarray(out.full_steps).tolist() == [trace.full_steps]
    tokens = np.asarray([prompt + trace.tokens])
    got = np.asarray(rj.score(params, config, tokens, policy=policy, context_length=len(prompt)))[0]
    expected = [row[token] - np.logaddexp.reduce(row) for row, token in zip(trace.logits, trace.tokens, strict=True)]
    # the rest is a difference of two float32 sums, whose error grows as its probability falls to `remainder.LEAST`
    atol = 1e-3 if isinstance(policy, rj.Lookahead) else 1e-4
    np.testing.assert_allclose(got[:sure], expected[:sure], atol=atol)
    return sure, trace


# cases with two options at once run under -m slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if "," in name else []) for name in CASES]
)
def test_a_method_equals_its_reference(model, name):
    policy, reference = CASES[name]
    sure, trace = 0, None
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, 64, 16).tolist()
        here, trace = check(model, policy, reference, prompt)
        sure += here
    assert sure >= 2 * NEW  # near ties are rare, so most tokens are compared
    if name == "lookahead at every step":
        return
    # the method makes a difference: full attention generates other tokens
    full = oracle.run(*model, prompt, oracle.Full(model[1]), NEW)
    assert trace.tokens != full.tokens


def test_some_dynamic_decisions_go_either_way(model):
    """Otherwise the dynamic cases above would not test the schedule."""
    steps = []
    for name in (name for name in CASES if name.startswith("dynamic")):
        kind, options = CASES[name][1]
        for seed in range(3):
            prompt = np.random.default_rng(seed).integers(0, 64, 16).tolist()
            method = kind(model[1], **options)
            steps += [
                taken / ((NEW - 1) // method.check_every)
                for taken in oracle.run(*model, prompt, method, NEW).full_steps
            ]
    assert min(steps) < 0.5 < max(steps)
    assert len(set(steps)) > 4


@pytest.mark.slow
@given(
    data=st.data(),
    length=st.sampled_from((1, 2, 9, 24)),
    budget=st.integers(2, 40),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(("streaming_llm", "h2o", "snapkv", "dynamic", "fixed", "lookahead", "top_k", "quest")),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_far_and_wide(model, data, length, budget, seed, kind):
    some = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    if kind == "streaming_llm":
        options = dict(budget=budget, sinks=some(0, 1, budget - 1), full_stride=some(None, 1, 5))
        policy, reference = rj.StreamingLLM(**options), (oracle.StreamingLLM, options)
    elif kind == "h2o":
        options = dict(budget=budget, full_stride=some(None, 1, 5))
        policy, reference = rj.H2O(**options), (oracle.H2O, options)
    elif kind == "snapkv":
        options = dict(budget=budget, window=some(1, 3, 16), pool=some(1, 3, 7), lookahead=some(0, 4))
        policy, reference = rj.SnapKV(**options), (oracle.SnapKV, options)
    elif kind == "lookahead":
        options = dict(budget=budget, stride=some(1, 3, 30), lookahead=some(0, 3, "auto"), window=some(1, 5, 32))
        policy, reference = lookahead(**options, decay=some(0.0, 1.0), pool=some(1, 7))
    elif kind == "top_k":
        policy, reference = rj.TopK(budget), (oracle.TopK, dict(budget=budget))
    elif kind == "quest":
        options = dict(budget=budget, page=some(1, 2), dense_layers=some(0, 1, 9))
        policy, reference = rj.Quest(**options), (oracle.Quest, options)
    else:
        options = dict(pool=some(1, 7), lookahead=some(0, 2, "auto"), evict=some(True, False))
        options |= dict(window=some(1, 5), decay=some(None, 0.0, 1.0))
        options["ablation"] = some(None, None, "no_refresh", "no_full_attention")
        dynamic = {"check_every": some(1, 2, 5), "threshold": some(-1.0, 0.0, 0.3, 1.0)}
        fixed = {"stride": some(1, 3, 30)}
        policy, reference = recycled(budget, dynamic if kind == "dynamic" else fixed, **options)
    prompt = np.random.default_rng(seed).integers(0, 64, length).tolist()
    check(model, policy, reference, prompt)
