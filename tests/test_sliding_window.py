"""Layers with a sliding window: their cache is a ring of the window, which no policy touches."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import recyc_jax as rj
from recyc_jax import implementations, prefilling, sliding_window
from recyc_jax.attention import reference
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache
from recyc_jax.kernels.gpu import triton_call


def alternating(window, **fields):
    return rj.LlamaConfig.tiny(
        num_hidden_layers=3,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_window=window,
        **fields,
    )


def strong(config):
    return jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))


@pytest.fixture
def small_chunks(monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(prefilling, "PREFILL_CHUNK", 8)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("window", [1, 3, 8, 20, 64])
@pytest.mark.usefixtures("small_chunks")
def test_a_ragged_batch_read_in_chunks_is_each_row_at_once(window):
    """Windows smaller and larger than a chunk and than a prompt; starts that fall on every place of the ring."""
    config = alternating(window)
    params, rng = strong(config), np.random.default_rng(0)
    prompts = [rng.integers(0, 96, length).tolist() for length in (37, 30, 9, 1)]
    out = rj.generate(params, config, prompts, max_new_tokens=20, policy="recycled:budget=1000,stride=3", eos_ids=())
    texts = [prompt + row for prompt, row in zip(prompts, out.tokens.tolist(), strict=True)]
    for prompt, text in zip(prompts, texts, strict=True):
        logits = np.asarray(rj.forward(params, config, [text]))[0, len(prompt) - 1 : -1]
        chosen = logits[np.arange(20), text[len(prompt) :]]
        assert (chosen >= logits.max(axis=1) - 1e-4).all()


def test_the_ring_has_the_size_of_the_window():
    config = alternating(16)
    state = rj.prefill(strong(config), config, [list(range(90))], max_new_tokens=30, policies=("h2o:budget=8",))
    assert [layer.capacity for layer in state.cache.layers] == [16, state.cache.capacity, 16]
    assert state.cache.capacity >= 119
    assert len(state.stats) == 1
    short = rj.prefill(strong(config), config, [[1, 2, 3]], max_new_tokens=4)
    assert [layer.capacity for layer in short.cache.layers] == [16, 80, 16]  # 16 slots of the prompt, 64 new ones


def test_states_decode_again_from_the_prompt():
    """Decoding overwrites the ring's oldest tokens, which the state that is handed back still has."""
    config = alternating(5)
    params = strong(config)
    state = rj.prefill(params, config, [list(range(40)), [7]], max_new_tokens=24, policies=("snapkv:budget=4",))
    first, state = rj.decode(params, config, state, policy="full")
    for policy in ("snapkv:budget=4", "full"):
        again, state = rj.decode(params, config, state, policy=policy)
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_a_model_of_windows_alone_decodes_under_any_policy():
    config = rj.LlamaConfig.tiny(layer_types=("sliding_attention",) * 2, sliding_window=6)
    params = strong(config)
    expected = rj.generate(params, config, [list(range(30))], max_new_tokens=16)
    for policy in ("recycled:budget=4,stride=4", "h2o:budget=4", "streaming_llm:budget=8,full_stride=2"):
        out = rj.generate(params, config, [list(range(30))], max_new_tokens=16, policy=policy)
        np.testing.assert_array_equal(out.tokens, expected.tokens)
        assert out.full_steps.shape == (1, 0)


def test_a_window_cannot_see_beyond_itself():
    """Changing a token changes nothing, in a layer with a window, for queries further than the window after it."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 30, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    other = k.at[:, 10].add(1.0)
    before, after = (reference.causal(q, keys, v, window=6) for keys in (k, other))
    changed = np.abs(np.asarray(before - after)).max(axis=(0, 2, 3)) > 0
    assert changed.tolist() == [10 <= at < 16 for at in range(30)]


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_implementations_agree(implementation, monkeypatch):
    """The TPU's ring is rounded up to whole tiles, and stored with the slots last."""
    if jax.default_backend() == "gpu" and implementation == "pallas_tpu":
        pytest.skip("JAX's interpreter of TPU kernels waits for ever on a machine with a GPU; CPUs run these")
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    config = alternating(20, head_dim=16, qk_norm="head")
    params = strong(config)
    prompts = [list(range(33)), list(range(50, 60))]
    policy = "recycled:budget=6,stride=3"
    expected = rj.generate(params, config, prompts, max_new_tokens=8, policy=policy, implementation="reference")
    interpreted = pltpu.force_tpu_interpret_mode() if implementation == "pallas_tpu" else contextlib.nullcontext()
    with interpreted:
        got = rj.generate(params, config, prompts, max_new_tokens=8, policy=policy, implementation=implementation)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_a_chunk_that_begins_anywhere():
    """A chunk of 6 tokens after 11, in a ring of 4: the queries see tokens that the chunk's own keys overwrite."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 18, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    starts = jnp.asarray([0, 3], jnp.int32)
    ring = LayerCache(*(jnp.zeros((2, 2, 4, 8)) for _ in range(2)), window=4)
    outs = []
    for offset in (0, 6, 12):
        part = (one[:, offset : offset + 6] for one in (q, k, v))
        out, ring = sliding_window.read_chunk(Implementation(), *part, ring, starts, jnp.int32(offset))
        outs.append(out)
    got = jnp.concatenate(outs, axis=1)
    np.testing.assert_allclose(got[0], reference.causal(q[:1], k[:1], v[:1], window=4)[0], atol=1e-5)
    alone = reference.causal(q[1:, 3:], k[1:, 3:], v[1:, 3:], window=4)[0]
    np.testing.assert_allclose(got[1, 3:], alone, atol=1e-5)


@pytest.mark.parametrize("window", [1, 30, 64, 500])
def test_the_gpus_prefill_kernel_sees_the_same_window(window, monkeypatch):
    """Rows that begin before the first slot, within a block, and at the queries; blocks before the window are skipped."""
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(3, 128, 4, 16)), jnp.bfloat16)
    keys, values = (jnp.asarray(rng.normal(size=(3, 2, 384, 16)), jnp.bfloat16) for _ in range(2))
    starts, offset = jnp.asarray([-90, 70, 300], jnp.int32), jnp.int32(256)
    got = implementations.resolve("pallas_gpu").window_chunk(q, keys, values, starts, offset, window)
    want = reference.chunk(q, keys, values, starts, offset, window)
    is_token = (256 + np.arange(128)) >= np.asarray(starts)[:, None]
    difference = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max(axis=(2, 3))
    assert (difference[is_token] < 0.03).all()
    assert np.isfinite(np.asarray(got, np.float32)).all()
