"""Policy strings, and the checks of policies' fields."""

import jax.numpy as jnp
import numpy as np
import pytest
from policy_strings import STRINGS

import recyc_jax as rj
from recyc_jax.policies.registry import as_policy


@pytest.mark.parametrize("text", [*STRINGS, "lookahead", "recycled:budget=4,stride=2,decay=0.25,lookahead=auto"])
def test_a_policy_says_its_string(text):
    policy = rj.parse_policy(text)
    assert rj.parse_policy(str(policy)) == policy
    assert str(as_policy(policy)) == str(policy)  # ablations are run by a class of their own


def test_a_class_of_ones_own_does_not_pass_for_its_base():
    class Mine(rj.FullAttention):
        pass

    class MyStride(rj.FixedStride):
        pass

    assert "Mine" in str(Mine())
    assert "MyStride" in str(rj.RecycledAttention(4, MyStride(2)))


def test_strings_name_policies():
    assert rj.parse_policy("full") == rj.FullAttention()
    assert rj.parse_policy("recycled:budget=512,stride=10") == rj.RecycledAttention(512, rj.FixedStride(10))
    assert rj.parse_policy("recycled:stride=5,budget=0.125,pool=1,lookahead=4", 4096) == rj.RecycledAttention(
        512, rj.FixedStride(5), pool=1, lookahead=4
    )
    assert rj.parse_policy("recycled:budget=1.0,stride=5,lookahead=auto", 100) == rj.RecycledAttention(
        100, rj.FixedStride(5), lookahead="auto"
    )
    assert rj.parse_policy("recycled:budget=512,check_every=5,threshold=0.85") == rj.RecycledAttention(
        512, rj.QuerySimilarity(5, 0.85)
    )
    assert rj.parse_policy(
        "recycled:budget=8,check_every=5,threshold=-1,rope=true,evict=false,ablation=no_refresh"
    ) == rj.RecycledAttention(8, rj.QuerySimilarity(5, -1.0, rope=True), evict=False, ablation="no_refresh")
    assert rj.parse_policy("recycled:budget=8,stride=5,window=32,decay=1") == rj.RecycledAttention(
        8, rj.FixedStride(5), window=32, decay=1.0
    )
    assert rj.parse_policy("lookahead") == rj.Lookahead(budget=1024, stride=50)
    assert rj.parse_policy("lookahead:budget=0.25,stride=10", 4096) == rj.Lookahead(1024, 10)
    assert rj.parse_policy(
        "lookahead:budget=512,stride=10,lookahead=9,window=1,decay=0,pool=1,remainder=false"
    ) == rj.Lookahead(512, 10, 9, 1, 0.0, 1, False)
    assert rj.parse_policy("lookahead:lookahead=auto") == rj.Lookahead()
    assert rj.parse_policy("quest:budget=0.5,page=4,dense_layers=0", 100) == rj.Quest(50, 4, 0)
    assert rj.parse_policy("top_k:budget=512") == rj.TopK(512)
    assert rj.parse_policy("snapkv:budget=0.5,window=16,pool=5,lookahead=9", 100) == rj.SnapKV(50, 16, 5, 9)
    assert rj.parse_policy("h2o:budget=512") == rj.H2O(512)
    assert rj.parse_policy("h2o:budget=512,full_stride=10") == rj.H2O(512, full_stride=10)
    assert rj.parse_policy("streaming_llm:budget=512") == rj.StreamingLLM(512, sinks=4)
    assert rj.parse_policy("streaming_llm:budget=512,sinks=0,full_stride=10") == rj.StreamingLLM(512, 0, 10)
    assert rj.parse_policy("recycled:budget=0.001,stride=5", 100).budget == 1
    assert [rj.parse_policy(f"recycled:budget={b},stride=5", 100).budget for b in ("0.29", "0.57", "0.58")] == [
        29,
        57,
        58,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "'magic' is unknown; there is full, lookahead, recycled, snapkv, h2o, streaming_llm, quest, top_k"),
        ("", "'' is unknown"),
        ("full:budget=3", "full has no option budget"),
        ("recycled", "needs budget"),
        ("recycled:budget=8", "needs stride"),
        ("recycled:budget=8,stride=0", "stride=0 must be at least 1"),
        ("recycled:budget=0,stride=1", "budget=0 must be at least 1"),
        ("recycled:budget=-4,stride=1", "budget=-4 must be at least 1"),
        ("recycled:budget=8,stride=1.5", r"stride=1\.5 is not a whole number"),
        ("recycled:budget=many,stride=1", "budget=many is not a whole number"),
        ("recycled:budget=1.5,stride=1", "must lie in"),
        ("recycled:budget=0.0,stride=1", "must lie in"),
        ("recycled:budget=0.x,stride=1", r"budget=0\.x is not a number"),
        ("recycled:budget=8,stride=2,stride=3", "gives stride twice"),
        ("recycled:budget=8,stride", "'stride' is not of the form key=value"),
        ("recycled:budget=8,stride=2,pool=4", "pool=4 must be odd"),
        ("recycled:budget=8,stride=2,lookahead=-1", "lookahead=-1"),
        ("recycled:budget=8,check_every=5", "needs threshold"),
        ("recycled:budget=8,threshold=0.5", "needs check_every"),
        ("recycled:budget=8,check_every=5,threshold=high", "threshold=high is not a number"),
        ("recycled:budget=8,check_every=5,threshold=1.5", "threshold=1.5 must lie in -1..1"),
        ("recycled:budget=8,check_every=5,threshold=nan", "threshold=nan must lie in -1..1"),
        ("recycled:budget=8,check_every=0,threshold=0.5", "check_every=0 must be at least 1"),
        ("recycled:budget=8,stride=2,check_every=5,threshold=0.5", "stride goes with neither"),
        ("recycled:budget=8,stride=2,rope=true", "recycled has no option rope"),
        ("recycled:budget=8,stride=2,evict=no", "evict=no is neither true nor false"),
        ("recycled:budget=8,stride=2,ablation=all", "ablation='all' is unknown; there is no_refresh"),
        ("recycled:budget=8,stride=2,decay=-1", "decay=-1 must lie in 0..inf"),
        ("recycled:budget=8,stride=2,decay=x", "decay=x is not a number"),
        ("recycled:budget=8,stride=2,window=0", "window=0 must be at least 1"),
        ("lookahead:budget=0", "budget=0 must be at least 1"),
        ("lookahead:stride=0", "stride=0 must be at least 1"),
        ("lookahead:lookahead=far", "lookahead=far is not a whole number"),
        ("lookahead:decay=-1", "decay=-1 must lie in"),
        ("lookahead:remainder=maybe", "remainder=maybe is neither true nor false"),
        ("quest:budget=8", "budget=8 must be at least page=16"),
        ("quest:budget=8,page=0", "page=0 must be at least 1"),
        ("top_k", "needs budget"),
        ("snapkv:budget=8,lookahead=auto", "lookahead=auto is not a whole number"),
        ("snapkv:budget=8,window=0", "window=0 must be at least 1"),
        ("snapkv:budget=8,pool=2", "pool=2 must be odd"),
        ("h2o:budget=1", "budget=1 must be at least 2"),
        ("h2o:budget=8,full_stride=0", "full_stride=0 must be at least 1"),
        ("streaming_llm:budget=4", "budget=4 must exceed sinks=4"),
        ("streaming_llm:budget=4,sinks=-1", "sinks=-1 must be at least 0"),
        ("streaming_llm:budget=8,full_stride=0", "full_stride=0 must be at least 1"),
        ("recycled:budget=8,stride=2,colour=red", "recycled has no option colour"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_strings_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message) as error:
        rj.parse_policy(text, 1000)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("budget", "stride", "ahead"),
    [(1024, 50, 49), (1024, 10, 24), (4096, 1, 24), (512, 10, 16), (128, 10, 9), (1, 1, 0)],
)
def test_how_far_ahead_by_default(budget, stride, ahead):
    assert rj.Lookahead(budget, stride).ahead == ahead
    assert rj.Lookahead(budget, stride, lookahead=7).ahead == 7


def test_a_fraction_needs_a_length():
    with pytest.raises(ValueError, match="needs a length"):
        rj.parse_policy("recycled:budget=0.125,stride=10")


def test_policies_are_hashable_and_frozen():
    assert len({rj.RecycledAttention(8, rj.FixedStride(2)), rj.RecycledAttention(8, rj.FixedStride(2))}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rj.RecycledAttention(512 / 8, rj.FixedStride(10)), "budget=64.0 must be a whole number"),
        (lambda: rj.RecycledAttention(8, rj.FixedStride(2.5)), "stride=2.5 must be a whole number"),
        (lambda: rj.RecycledAttention(8, 10), "schedule=10 must be a schedule"),
        (lambda: rj.RecycledAttention(8, rj.FixedStride(2), lookahead="x"), "lookahead='x' must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_whole_number_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_and_jax_are_numbers():
    policy = rj.RecycledAttention(np.int64(8), rj.FixedStride(jnp.int32(2)))
    assert policy == rj.RecycledAttention(8, rj.FixedStride(2))
    assert type(policy.budget) is type(policy.schedule.stride) is int
