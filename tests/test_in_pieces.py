"""Policies that read copies and pieces, or sets told by bounds, choose what those that keep lists of slots choose."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_contract import NEW, RAGGED, STRINGS

import recyc_jax as rj
from recyc_jax.attention import api, triton
from recyc_jax.policies import recycled_set


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setitem(api.IMPLEMENTATIONS, "in_pieces", "in_pieces")


def scores(params, config, policy, implementation, new=NEW):
    tokens = jax.random.randint(jax.random.key(0), (2, 30 + new), 0, config.vocab_size)
    return rj.score(params, config, tokens, policy=policy, context_length=30, implementation=implementation)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", [STRINGS[n] for n in (4, 5, 6, 9, 11, 14)])
def test_the_same_probabilities(params, config, text):
    policy = rj.parse_policy(text)
    want, got = (scores(params, config, policy, name) for name in ("reference", "in_pieces"))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", [STRINGS[3], "h2o:budget=5,full_stride=3", "streaming_llm:budget=6,full_stride=3"])
def test_the_same_tokens_of_a_ragged_batch(params, config, text):
    """The shortest prompt has one token: fewer than the budget, the window, the sinks."""
    want, got = (
        rj.generate(params, config, RAGGED, policy=rj.parse_policy(text), max_new_tokens=NEW, implementation=name)
        for name in ("reference", "in_pieces")
    )
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", ["recycled:budget=9,check_every=3,threshold=0.1,evict=false", "snapkv:budget=12"])
def test_many_new_tokens_are_read_in_a_long_piece(params, config, text, monkeypatch):
    """Beyond `FEW` new tokens, and beyond the budget, where the oldest new ones leave."""
    monkeypatch.setattr(recycled_set, "FEW", 4)
    policy = rj.parse_policy(text)
    np.testing.assert_allclose(
        scores(params, config, policy, "in_pieces", 31), scores(params, config, policy, "reference", 31), atol=1e-4
    )


@pytest.mark.parametrize("text", [STRINGS[n] for n in (1, 4, 7, 9, 11)])
def test_sets_told_by_bounds(params, config, text, monkeypatch):
    """The GPU's kernels in the loop, interpreted; as many steps as make the oldest new tokens leave."""
    monkeypatch.setattr(triton, "INTERPRET", jax.default_backend() == "cpu")
    policy = rj.parse_policy(text)
    want, got = (scores(params, config, policy, name, 31) for name in ("reference", "pallas_gpu"))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "recycled:budget=9,check_every=2,threshold=0.3,window=4,decay=1",
        "recycled:budget=9,check_every=2,threshold=0.3,ablation=no_full_attention",
    ],
)
def test_rows_decide_for_themselves(params, config, text, monkeypatch):
    """Where a row's kernels look whether it is due: rows of many lengths, of which some end before others."""
    monkeypatch.setattr(triton, "INTERPRET", jax.default_backend() == "cpu")
    policy = rj.parse_policy(text)
    first = rj.generate(params, config, RAGGED, policy=policy, max_new_tokens=NEW, implementation="reference")
    eos = int(first.tokens[1, 5])
    want, got = (
        rj.generate(params, config, RAGGED, policy=policy, max_new_tokens=NEW, implementation=name, eos_ids=(eos,))
        for name in ("reference", "pallas_gpu")
    )
    assert len(set(np.asarray(want.lengths).tolist())) > 1
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "text", ["full", "recycled:budget=9,stride=4", "recycled:budget=9,check_every=3,threshold=0.1", "h2o:budget=6"]
)
def test_the_kernels_in_the_loop(params, config, text):
    """Interpreted: prefill, full steps with scores, copies at refreshes."""
    policy = rj.parse_policy(text)
    want = scores(params, config, policy, "reference", 9)
    with pltpu.force_tpu_interpret_mode():
        got = scores(params, config, policy, "pallas_tpu", 9)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_state_goes_on_with_what_it_began_with(params, config, in_pieces):
    state = rj.prefill(params, config, RAGGED)
    with pytest.raises(ValueError, match="'in_pieces' stores its cache another way than this state's"):
        rj.decode(params, config, state, policy=rj.FullAttention(), implementation="in_pieces")


def test_kernels_by_platform(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert api.resolve(None).__name__ == "recyc_jax.attention.reference"
    with pytest.raises(ValueError, match="no kernels for cpu, only for gpu, tpu"):
        api.resolve("pallas")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = types.SimpleNamespace(compute_capability="8.9")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert api.resolve(None) is api.resolve("reference")
    assert "on this GPU (compute capability 8.9" in caplog.records.pop().message
    gpu.compute_capability = "9.0"
    assert api.resolve(None) is api.resolve("pallas") is api.resolve("pallas_gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert api.resolve(None) is api.resolve("pallas") is api.resolve("pallas_tpu")
    # a JAX without what the kernels are written in: the plain functions, and one line that says so
    monkeypatch.setitem(api.IMPLEMENTATIONS, "pallas_tpu", "recyc_jax.attention.not_there")
    assert api.resolve(None) is api.resolve(None) is api.resolve("reference")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(ImportError):
        api.resolve("pallas")


def test_room_is_what_was_asked_for(params, config, in_pieces):
    """Not what rounding the capacity up to a tile has added."""
    state = rj.prefill(params, config, RAGGED, max_new_tokens=7, implementation="in_pieces")
    assert state.cache.capacity == 128
    out, _ = rj.decode(params, config, state, policy=rj.FullAttention(), implementation="in_pieces")
    assert out.tokens.shape == (len(RAGGED), 7)
    assert jnp.issubdtype(out.tokens.dtype, jnp.integer)
