"""Every policy reads the same tokens, in whichever form an implementation stores a kept set."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from policy_strings import NEW, RAGGED, STRINGS

import recyc_jax as rj
from recyc_jax import implementations
from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.tpu import copied_set

LAYERS = 1  # policies treat layers alike


def slow(text):
    return pytest.param(text, marks=pytest.mark.slow)


@pytest.fixture
def in_pieces(monkeypatch):
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "in_pieces", "in_pieces:InPieces")


def scores(params, config, policy, implementation, new=NEW):
    tokens = jax.random.randint(jax.random.key(0), (2, 30 + new), 0, config.vocab_size)
    return rj.score(params, config, tokens, policy=policy, context_length=30, implementation=implementation)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", [STRINGS[n] for n in (4, 6, 9, 11, 14)])
def test_the_same_probabilities(params, config, text):
    policy = rj.parse_policy(text)
    want, got = (scores(params, config, policy, name) for name in ("reference", "in_pieces"))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", [STRINGS[3], "h2o:budget=5,full_stride=3", "streaming_llm:budget=6,full_stride=3"])
def test_the_same_tokens_of_a_ragged_batch(params, config, text):
    """The shortest prompt has one token: fewer than the budget, the window and the sinks."""
    want, got = (
        rj.generate(params, config, RAGGED, policy=rj.parse_policy(text), max_new_tokens=NEW, implementation=name)
        for name in ("reference", "in_pieces")
    )
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("in_pieces")
@pytest.mark.parametrize("text", ["recycled:budget=9,check_every=3,threshold=0.1,evict=false", "snapkv:budget=12"])
def test_many_new_tokens_are_read_in_a_long_piece(params, config, text, monkeypatch):
    """There are more than `FEW` new tokens, and more than the budget, so that the oldest new tokens leave."""
    monkeypatch.setattr(copied_set, "FEW", 4)
    policy = rj.parse_policy(text)
    np.testing.assert_allclose(
        scores(params, config, policy, "in_pieces", 31), scores(params, config, policy, "reference", 31), atol=1e-4
    )


@pytest.mark.parametrize("text", [STRINGS[1], STRINGS[7], STRINGS[11], slow(STRINGS[4]), slow(STRINGS[9])])
def test_sets_read_by_the_gpus_kernels(params, config, text, monkeypatch):
    """The GPU kernels in the loop, interpreted, for so many steps that the oldest new tokens leave."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    policy = rj.parse_policy(text)
    want, got = (scores(params, config, policy, name) for name in ("reference", "pallas_gpu"))
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "recycled:budget=9,check_every=2,threshold=0.3,window=4,decay=1",
        slow("recycled:budget=9,check_every=2,threshold=0.3,ablation=no_full_attention"),
    ],
)
def test_rows_decide_for_themselves(params, config, text, monkeypatch):
    """Kernels skip rows that are not due: rows of many lengths, some of which end before others."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
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
    "text",
    [
        "recycled:budget=9,stride=4",
        slow("recycled:budget=9,check_every=3,threshold=0.1"),
        slow("h2o:budget=6"),
    ],
)
def test_the_kernels_in_the_loop(params, config, text):
    """The TPU kernels, interpreted: prefill, full steps with scores, copies at refreshes."""
    policy = rj.parse_policy(text)
    want = scores(params, config, policy, "reference", 9)
    with pltpu.force_tpu_interpret_mode():
        got = scores(params, config, policy, "pallas_tpu", 9)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_state_goes_on_with_what_it_began_with(params, config, in_pieces):
    state = rj.prefill(params, config, RAGGED)
    with pytest.raises(ValueError, match="'in_pieces' stores its cache in another layout than this state's"):
        rj.decode(params, config, state, policy=rj.FullAttention(), implementation="in_pieces")


def test_kernels_by_platform(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert implementations.resolve(None) is implementations.resolve("reference")
    with pytest.raises(ValueError, match="no kernels for cpu, only for gpu, tpu"):
        implementations.resolve("pallas")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    gpu = types.SimpleNamespace(compute_capability="8.9")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert implementations.resolve(None) is implementations.resolve("reference")
    assert "this GPU (compute capability 8.9) may lack" in caplog.records.pop().message
    gpu.compute_capability = "9.0"
    assert implementations.resolve(None) is implementations.resolve("pallas") is implementations.resolve("pallas_gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert implementations.resolve(None) is implementations.resolve("pallas") is implementations.resolve("pallas_tpu")
    # a JAX that cannot import the kernels: plain JAX runs, after one warning
    monkeypatch.setitem(implementations.IMPLEMENTATIONS, "pallas_tpu", "recyc_jax.kernels.tpu.not_there:TPU")
    assert implementations.resolve(None) is implementations.resolve(None) is implementations.resolve("reference")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(ImportError):
        implementations.resolve("pallas")


def test_room_is_what_was_asked_for(params, config, in_pieces):
    """The room for new tokens does not include the slots that rounding the capacity up to a tile adds."""
    state = rj.prefill(params, config, RAGGED, max_new_tokens=7, implementation="in_pieces")
    assert state.cache.capacity == 128
    out, _ = rj.decode(params, config, state, policy=rj.FullAttention(), implementation="in_pieces")
    assert out.tokens.shape == (len(RAGGED), 7)
    assert jnp.issubdtype(out.tokens.dtype, jnp.integer)
