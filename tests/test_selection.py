"""The selection of slots: pooling, the exact top slots, and the GPU's search for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recyc_jax.attention import selection
from recyc_jax.kernels.gpu import top_slots, triton_call

S = 40


@given(
    width=st.sampled_from((1, 3, 7, 15)),
    lookahead=st.sampled_from((0, 0, 1, 9, 60)),
    start=st.integers(0, 39),
    length=st.integers(0, 40),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pool(width, lookahead, start, length, seed):
    scores = np.random.default_rng(seed).normal(size=(1, 1, S)).astype(np.float32)
    visible = (np.arange(S) >= start) & (np.arange(S) < start + length)
    got = np.asarray(selection.pool(jnp.asarray(scores), jnp.asarray(visible[None]), width, lookahead))[0, 0]
    for slot in range(S):
        window = [
            scores[0, 0, at]
            for at in range(slot - width // 2 - lookahead, slot + width // 2 + 1)
            if 0 <= at < S and visible[at]
        ]
        assert got[slot] == (max(window) if visible[slot] else -np.inf)


@given(budget=st.integers(1, 60), levels=st.integers(1, 40), hidden=st.integers(0, 40), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_top_slots(budget, levels, hidden, seed):
    """Exact order, ties to the lower slot, -1 for slots that are not visible."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (1, 2, S)).astype(np.float32)
    scores[:, :, rng.choice(S, hidden, replace=False)] = -np.inf
    got = np.asarray(selection.top_slots(jnp.asarray(scores), budget))
    for head in range(2):
        order = sorted(range(S), key=lambda slot: (-scores[0, head, slot], slot))[:budget]
        assert got[0, head].tolist() == [-1 if scores[0, head, slot] == -np.inf else slot for slot in order]


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.sampled_from((40, 1024, 1500, 5000))),
    budget=st.one_of(st.integers(1, 60), st.integers(128, 400)),
    ordered=st.integers(0, 12),
    levels=st.sampled_from((1, 3, 1000, 10**6)),
    seen=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
    seed=st.integers(0, 10**6),
)
@example(shape=(1, 1, 1, 20_000), budget=100, ordered=3, levels=10**6, seen=1.0, seed=0)  # more than HELD keys
@example(shape=(2, 1, 1, 5000), budget=130, ordered=9, levels=3, seen=1.0, seed=1)  # too many candidates
@settings(max_examples=4, deadline=None, derandomize=True)
def test_top_slots_by_radix_search(shape, budget, ordered, levels, seen, seed):
    """The kernels choose the same slots as a sort. The last `ordered` entries are in its order, and in the other part
    -1 comes last."""
    rng = np.random.default_rng(seed)
    scores = -rng.integers(0, levels, shape).astype(np.float32) * rng.choice(
        np.float32([-1, 1]), shape
    )  # zeros of both signs
    scores[rng.random(shape) >= seen] = -np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
        got = np.asarray(top_slots.top_slots(jnp.asarray(scores), budget, ordered))
    want = np.asarray(selection.top_slots(jnp.asarray(scores), budget))
    assert got.shape == want.shape
    sure = max(0, want.shape[-1] - ordered)
    np.testing.assert_array_equal(got[..., sure:], want[..., sure:])
    np.testing.assert_array_equal(np.sort(got[..., :sure]), np.sort(want[..., :sure]))
    assert (np.diff((got[..., :sure] < 0).astype(int)) >= 0).all()


@pytest.mark.parametrize("gain", [10, -10])
def test_a_sample_that_misleads(gain, monkeypatch):
    """Every second slot scores higher or lower, so the sample's bound lets through too few slots or far too many."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    scores = np.random.default_rng(0).normal(size=(1, 1, 1, 5000)).astype(np.float32)
    scores[..., ::2] += gain
    got = np.asarray(top_slots.top_slots(jnp.asarray(scores), 130, 5))
    want = np.asarray(selection.top_slots(jnp.asarray(scores), 130))
    np.testing.assert_array_equal(got[..., -5:], want[..., -5:])
    np.testing.assert_array_equal(np.sort(got), np.sort(want))
