"""Laws of generation that hold for any weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax import decoding, prefilling

RAGGED = ([5, 9, 3], list(range(40, 73)), list(range(17)), [1])
RECYCLED = rj.RecycledAttention(budget=5, schedule=rj.FixedStride(4), pool=3)


@pytest.fixture
def generate(params, config):
    return functools.partial(rj.generate, params, config, max_new_tokens=20)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_stride_one_is_full_attention(generate):
    same(
        generate(RAGGED, policy=rj.FullAttention()), generate(RAGGED, policy=rj.RecycledAttention(3, rj.FixedStride(1)))
    )


@pytest.mark.parametrize("policy", [rj.FullAttention(), RECYCLED], ids=["full", "recycled"])
def test_lists_arrays_and_jit_agree(params, config, generate, policy):
    listed = generate(RAGGED, policy=policy)
    tokens, lengths = np.full((4, 50), 95, np.int32), np.array([len(prompt) for prompt in RAGGED], np.int32)
    for row, prompt in enumerate(RAGGED):
        tokens[row, : len(prompt)] = prompt
    same(listed, generate(tokens, prompt_lengths=lengths, policy=policy))

    @jax.jit
    def inside(tokens, lengths):
        return rj.generate(params, config, tokens, prompt_lengths=lengths, policy=policy, max_new_tokens=20)

    same(listed, inside(jnp.asarray(tokens), jnp.asarray(lengths)))


def test_chunks_do_not_matter(params, config, monkeypatch):
    """Prompts that are read in many chunks, the first of which hold only padding for most rows."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 96, size).tolist() for size in (61, 8, 30)]
    policies = (RECYCLED, rj.SnapKV(5, window=12), rj.H2O(6), rj.RecycledAttention(5, rj.QuerySimilarity(5, 0.5)))
    whole = rj.prefill(params, config, prompts, policies=policies, max_new_tokens=2)
    monkeypatch.setattr(prefilling, "PREFILL_CHUNK", 9)
    prefilling.read_prompts.clear_cache()
    parts = rj.prefill(params, config, prompts, policies=policies, max_new_tokens=2)
    prefilling.read_prompts.clear_cache()
    assert parts.prompt_slots == whole.prompt_slots == 64  # 8 chunks of 8
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-4)
    for a, b in zip(parts.stats, whole.stats, strict=True):
        for row, prompt in enumerate(prompts):
            mine = slice(parts.prompt_slots - len(prompt), parts.prompt_slots)
            theirs = slice(whole.prompt_slots - len(prompt), whole.prompt_slots)
            for window in (1, 12):
                np.testing.assert_allclose(a.scores[window][row, :, mine], b.scores[window][row, :, theirs], atol=1e-4)
            np.testing.assert_allclose(a.mass[row, :, :, mine], b.mass[row, :, :, theirs], atol=1e-4)
            # each query's probabilities sum to 1
            np.testing.assert_allclose(np.asarray(a.mass[row]).sum(axis=-1), len(prompt), rtol=1e-5)
        for name in ("q", "q_before_rope"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4)


def test_score_under_full_attention_is_forward(params, config):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 96, (3, 40)), jnp.int32)
    chances = jax.nn.log_softmax(rj.forward(params, config, tokens))
    expected = np.take_along_axis(chances[:, :-1], np.asarray(tokens)[:, 1:, None], axis=2)[..., 0]
    for context in (1, 11, 39):
        got = rj.score(params, config, tokens, policy=rj.FullAttention(), context_length=context)
        assert got.shape == (3, 40 - context)
        np.testing.assert_allclose(got, expected[:, context - 1 :], atol=2e-5)
        stride_one = rj.score(
            params, config, tokens, policy=rj.RecycledAttention(2, rj.FixedStride(1)), context_length=context
        )
        np.testing.assert_allclose(stride_one, got, atol=2e-5)


def test_decode_rewinds(params, config):
    state = rj.prefill(params, config, RAGGED, policies=(RECYCLED, rj.FullAttention()), max_new_tokens=20)
    first, state = rj.decode(params, config, state, policy=RECYCLED)
    full, state = rj.decode(params, config, state, policy=rj.FullAttention())
    short, state = rj.decode(params, config, state, policy=RECYCLED, max_new_tokens=7)
    again, state = rj.decode(params, config, state, policy=RECYCLED)
    same(first, again)
    same(first, rj.generate(params, config, RAGGED, policy=RECYCLED, max_new_tokens=20))
    same(full, rj.generate(params, config, RAGGED, max_new_tokens=20))
    np.testing.assert_array_equal(short.tokens, first.tokens[:, :7])
    with pytest.raises(ValueError, match=r"must lie in 1\.\.20"):
        rj.decode(params, config, state, policy=RECYCLED, max_new_tokens=21)


@pytest.mark.parametrize("policy", [rj.FullAttention(), RECYCLED], ids=["full", "recycled"])
def test_a_row_ends_at_any_of_its_eos_ids(generate, policy):
    plain = generate(RAGGED, policy=policy, eos_ids=())
    assert plain.lengths.tolist() == [20] * 4
    tokens = np.asarray(plain.tokens)
    eos = (int(tokens[0, 6]), int(tokens[1, 11]))
    out = generate(RAGGED, policy=policy, eos_ids=eos, pad_id=77)
    for row in range(4):
        ends = np.flatnonzero(np.isin(tokens[row], eos))
        length = ends[0] + 1 if ends.size else 20
        assert int(out.lengths[row]) == length
        np.testing.assert_array_equal(out.tokens[row], np.append(tokens[row, :length], [77] * (20 - length)))
        fulls = length - 1 if isinstance(policy, rj.FullAttention) else (length - 1) // 4
        assert np.asarray(out.full_steps[row]).tolist() == [fulls] * 2


def test_the_configs_eos_is_the_default(params, config, generate):
    eos = int(generate(RAGGED, eos_ids=()).tokens[0, 4])
    with_eos = rj.LlamaConfig.tiny(eos_token_ids=(eos,))
    out = rj.generate(params, with_eos, RAGGED, max_new_tokens=20)
    assert int(out.lengths[0]) <= 5
    same(out, generate(RAGGED, eos_ids=(eos,)))
    same(out, generate(RAGGED, eos_ids=eos))


def test_one_new_token_needs_no_step(generate, params, config):
    out = rj.generate(params, config, RAGGED, policy=RECYCLED, max_new_tokens=1)
    np.testing.assert_array_equal(out.tokens[:, 0], generate(RAGGED).tokens[:, 0])
    assert not out.full_steps.any()


def test_two_prompts_of_a_bucket_compile_once(params, config):
    run = functools.partial(rj.generate, params, config, policy=RECYCLED, max_new_tokens=5)
    run([[1] * 129])
    before = prefilling.read_prompts._cache_size(), decoding.decode_tokens._cache_size()
    run([[2] * 144])
    assert (prefilling.read_prompts._cache_size(), decoding.decode_tokens._cache_size()) == before
    run([[2] * 145])
    assert prefilling.read_prompts._cache_size() == before[0] + 1


def test_bfloat16_runs_and_stays_near(params, config):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    state = rj.prefill(half, config, RAGGED, policies=(RECYCLED,), max_new_tokens=9)
    exact = rj.prefill(params, config, RAGGED, max_new_tokens=9)
    assert state.cache.layers[0].keys.dtype == jnp.bfloat16
    assert state.logits.dtype == jnp.float32
    # bfloat16 has 8 significant bits: errors of a few percent of the logits' spread after two layers
    assert float(jnp.abs(state.logits - exact.logits).max()) < 0.1 * float(exact.logits.std())
    out, _ = rj.decode(half, config, state, policy=RECYCLED)
    assert out.tokens.shape == (4, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1, 96]]), "token id 96, outside the vocabulary of 96"),
        (dict(prompts=[[-1]]), "token id -1"),
        (dict(prompts=[[0.5]]), "prompt 0 is not a flat list"),
        (dict(prompts=np.zeros((2, 3), np.float32)), "must be integers"),
        (dict(prompts=np.zeros((2, 3), np.int32), prompt_lengths=[1, 4]), r"prompt_lengths\[1\]=4 is outside 1..3"),
        (dict(prompts=np.zeros((2, 3), np.int32), prompt_lengths=[1]), "prompt_lengths has shape"),
        (dict(prompts=[[1]], prompt_lengths=[1]), "lists carry their own lengths"),
        (dict(prompts=[[1]], max_new_tokens=0), "max_new_tokens=0"),
        (dict(prompts=[[1]], implementation="magic"), "implementation='magic' is unknown"),
        (dict(prompts=[[1]], sampling=rj.Sample()), "sampling needs a key"),
        (dict(prompts=[[1]], sampling=rj.Sample(), key=7), "pass key=jax.random.key"),
        (dict(prompts=[[1]], sampling=rj.Sample(), key=jax.random.split(jax.random.key(0), 3)), "one per row"),
        (dict(prompts=[[2**32 + 5]]), "token id 4294967301, outside the vocabulary"),
        (dict(prompts=np.zeros((2, 3), np.int32), prompt_lengths=[1.5, 2.0]), "prompt_lengths must be integers"),
        (dict(prompts=[[1]], max_new_tokens=2.0), "max_new_tokens=2.0 must be a whole number"),
        (dict(prompts=[[1]], pad_id=None), "pad_id=None must be a whole number"),
        (dict(prompts=[[1]], eos_ids=["x"]), "eos_ids='x' must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_calls_name_the_culprit(params, config, call, message):
    with pytest.raises(ValueError, match=message):
        rj.generate(params, config, **call)


def test_bad_lengths_are_found_inside_jit_too(params, config):
    with pytest.raises(ValueError, match=r"prompt_lengths\[0\]=0 is outside 1\.\.4"):
        jax.jit(lambda tokens: rj.generate(params, config, tokens, prompt_lengths=np.array([0, 4])).tokens)(
            jnp.zeros((2, 4), jnp.int32)
        )


def test_params_of_two_dtypes_are_refused(params, config):
    mixed = {**params, "embedding": params["embedding"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="params mix bfloat16 and float32"):
        rj.generate(mixed, config, [[1]])


def test_a_donated_state_says_so(params, config):
    state = rj.prefill(params, config, RAGGED, max_new_tokens=20)
    rj.decode(params, config, state, policy=rj.FullAttention())
    with pytest.raises(ValueError, match="donated to an earlier decode"):
        rj.decode(params, config, state, policy=rj.FullAttention())


@pytest.mark.parametrize("context", [0, 40])
def test_score_needs_something_to_score(params, config, context):
    with pytest.raises(ValueError, match="context_length"):
        rj.score(params, config, np.zeros((1, 40), np.int32), policy=RECYCLED, context_length=context)
