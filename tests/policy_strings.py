"""What the tests of all policies share: a string of each method and option, and a ragged batch."""

import numpy as np
import pytest

import recyc_jax as rj

RAGGED = ([5, 9, 3], list(range(40, 73)), list(range(17)), [1])
WIDTH = 36  # the longest prompt has 33 tokens, padded to 36
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
    "lookahead:budget=5,stride=4,lookahead=2,window=8,pool=1",
    "lookahead:budget=5,stride=4,lookahead=2,remainder=false",
    "quest:budget=8,page=4,dense_layers=0",
    "top_k:budget=3",
)
VARIANTS = (4, 5, 6, 9, 15, 17)
"""Strings whose options other strings have too, one by one: their laws run under `-m slow`."""
every_policy = pytest.mark.parametrize(
    "policy",
    [
        pytest.param(rj.parse_policy(text), marks=[pytest.mark.slow] if number in VARIANTS else [], id=text)
        for number, text in enumerate(STRINGS)
    ],
)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
