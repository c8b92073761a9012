"""States go on: an answer in parts is the whole answer, prompts in parts are the whole prompts, and what was read stays."""

import contextlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from policy_strings import NEW, RAGGED, STRINGS, every_policy

import recyc_jax as rj
from recyc_jax import decoding, prefilling, turns
from recyc_jax.kernels.gpu import triton_call


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def joined(parts):
    """The answers of several calls as one."""
    tokens = np.concatenate([part.tokens for part in parts], axis=1)
    return tokens, sum(np.asarray(part.lengths) for part in parts), sum(np.asarray(part.full_steps) for part in parts)


@every_policy
def test_an_answer_in_parts_is_the_whole_answer(params, config, policy):
    """Also where a part ends in the middle of a period, and where rows end."""
    state = rj.prefill(params, config, RAGGED, policies=policy, max_new_tokens=NEW)
    whole, state = rj.decode(params, config, state, policy=policy)
    eos = int(whole.tokens[1, 7])
    for ids in ((), (eos,)):
        whole, state = rj.decode(params, config, state, policy=policy, eos_ids=ids)
        parts = []
        for number in (1, 6, 2, NEW - 9):
            out, state = rj.decode(
                params, config, state, policy=policy, max_new_tokens=number, eos_ids=ids, rewind=False
            )
            parts.append(out)
        same(whole, joined(parts))
        assert state.room == 0
        state = rj.rewind(state)
        assert state.room == NEW
        same(whole, rj.decode(params, config, state, policy=policy, eos_ids=ids)[0])
        state = rj.prefill(params, config, RAGGED, policies=policy, max_new_tokens=NEW)


@every_policy
def test_prompts_in_parts_are_the_whole_prompts(params, config, policy):
    """Rows whose parts differ in length move within the cache, which grows."""
    tokens = np.random.default_rng(0).integers(0, 96, (3, 80)).tolist()
    ends = [(3, 4, 40), (50, 51, 52), (20, 37, 77)]
    whole = rj.generate(
        params, config, [row[: end[-1]] for row, end in zip(tokens, ends, strict=True)], policy=policy, max_new_tokens=9
    )
    state = rj.prefill(
        params,
        config,
        [row[: end[0]] for row, end in zip(tokens, ends, strict=True)],
        policies=policy,
        max_new_tokens=2,
    )
    for before, after in ((0, 1), (1, 2)):
        turn = [row[end[before] : end[after]] for row, end in zip(tokens, ends, strict=True)]
        state = rj.extend(params, config, state, turn, max_new_tokens=9)
    same(whole, rj.decode(params, config, state, policy=policy)[0])


def test_a_turn_follows_an_answer(params, config):
    """Under full attention, what was decoded is as if it had been read; rows that ended early keep no padding."""
    full = rj.FullAttention()
    state = rj.prefill(params, config, RAGGED, policies=full, max_new_tokens=NEW)
    whole, state = rj.decode(params, config, state, policy=full)
    eos = int(whole.tokens[1, 7])
    first, state = rj.decode(params, config, state, policy=full, max_new_tokens=12, eos_ids=eos, rewind=False)
    assert len(set(np.asarray(first.lengths).tolist())) > 1
    turn = [[7, 8, 9], [1], list(range(30)), [2, 3]]
    state = rj.extend(params, config, state, turn, max_new_tokens=10)
    texts = [
        [*prompt, *row[:length].tolist(), *more]
        for prompt, row, length, more in zip(RAGGED, np.asarray(first.tokens), first.lengths, turn, strict=True)
    ]
    want = rj.generate(params, config, texts, policy=full, max_new_tokens=10)
    same(want, rj.decode(params, config, state, policy=full)[0])


@pytest.mark.parametrize("text", [STRINGS[3], STRINGS[12], STRINGS[16], STRINGS[18]])
def test_many_questions_about_one_document(params, config, text):
    policy, questions = rj.parse_policy(text), ([[5, 6, 7], [8]], [[9], [10, 11] * 20], [[1, 2], [3, 4]])
    documents = [list(range(20, 60)), list(range(90, 60, -1))]
    state = rj.prefill(params, config, documents, policies=policy, max_new_tokens=4)
    place = rj.bookmark(state)
    for question in questions:
        state = rj.extend(params, config, state, question, max_new_tokens=8)
        out, state = rj.decode(params, config, state, policy=policy, rewind=False)
        asked = [[*document, *its] for document, its in zip(documents, question, strict=True)]
        same(out, rj.generate(params, config, asked, policy=policy, max_new_tokens=8))
        state = rj.rewind(state, place)
    assert state.room == 4
    state = rj.with_room(state, 8)
    want = rj.generate(params, config, documents, policy=policy, max_new_tokens=8)
    same(want, rj.decode(params, config, state, policy=policy)[0])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_turns_of_any_lengths(params, config, data):
    policy = rj.parse_policy(data.draw(st.sampled_from([STRINGS[1], STRINGS[7], STRINGS[12], STRINGS[16]])))
    rows, rounds = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    lengths = np.array(data.draw(st.lists(st.integers(1, 40), min_size=rows * rounds, max_size=rows * rounds)))
    lengths = lengths.reshape(rounds, rows)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    parts = [[rng.integers(0, 96, length).tolist() for length in row] for row in lengths]
    state = rj.prefill(params, config, parts[0], policies=policy, max_new_tokens=6)
    for part in parts[1:]:
        _, state = rj.decode(params, config, state, policy=policy, eos_ids=())
        state = rj.extend(params, config, state, part, max_new_tokens=6)
    whole = [[token for part in row for token in part] for row in zip(*parts, strict=True)]
    want = rj.generate(params, config, whole, policy=policy, max_new_tokens=6, eos_ids=())
    same(want, rj.decode(params, config, state, policy=policy, eos_ids=())[0])


def test_few_programs(params, config):
    """A session: other numbers of new tokens, prompts and turns of one size compile nothing new."""
    policy = rj.parse_policy(STRINGS[16])

    def session(prompt, new, turn):
        state = rj.prefill(params, config, [[1] * prompt], policies=policy, max_new_tokens=new)
        _, state = rj.decode(params, config, state, policy=policy, rewind=False)
        state = rj.extend(params, config, state, [[2] * turn], max_new_tokens=new)
        return rj.decode(params, config, state, policy=policy)[0]

    programs = prefilling.read_prompts, decoding.decode_tokens, turns.read_turns
    session(10, 16, 5)
    before = [program._cache_size() for program in programs]
    for sizes in ((12, 17, 9), (16, 40, 15), (3, 2, 1)):
        out = session(*sizes)
        assert out.tokens.shape == (1, sizes[1])
    assert [program._cache_size() for program in programs] == before


def test_what_does_not_go_on_is_named(params, config):
    state = rj.prefill(params, config, RAGGED, policies=(STRINGS[1], "full"), max_new_tokens=4)
    with pytest.raises(ValueError, match="2 turns for a state of 4 rows"):
        rj.extend(params, config, state, [[1], [2]])
    place = rj.bookmark(state)
    _, state = rj.decode(params, config, state, policy="full", max_new_tokens=2, rewind=False)
    with pytest.raises(ValueError, match="begun under full"):
        rj.decode(params, config, state, policy=STRINGS[1], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens=3"):
        rj.decode(params, config, state, policy="full", max_new_tokens=3)
    with pytest.raises(ValueError, match="middle of an answer"):
        rj.bookmark(state)
    with pytest.raises(ValueError, match="middle of an answer"):
        rj.with_room(state, 100)
    with pytest.raises(ValueError, match="exceed the model's context"):
        rj.extend(params, config, state, [[1]] * 4, max_new_tokens=config.max_position_embeddings)
    with pytest.raises(ValueError, match=r"outside of jax\.jit"):
        jax.jit(lambda state: rj.extend(params, config, state, np.ones((4, 1), np.int32)))(state)
    other = rj.prefill(params, config, [[1]], policies="full", max_new_tokens=4)
    with pytest.raises(ValueError, match="has 4 rows, the state 1"):
        rj.rewind(other, place)


@pytest.mark.parametrize("window", [5, 24])
def test_layers_with_a_sliding_window_go_on(window):
    """Their rings keep what the next turn's first tokens see, also in rows that ended early, moved, or rewound."""
    config = rj.LlamaConfig.tiny(
        layer_types=("full_attention", "sliding_attention", "full_attention"),
        sliding_window=window,
        num_hidden_layers=3,
    )
    params, policy = rj.init_params(config, jax.random.key(1)), rj.FullAttention()
    prompts, turn = [[5, 9, 3], list(range(40, 73)), [1]], [[7, 8], [4], list(range(40))]
    state = rj.prefill(params, config, prompts, policies=policy, max_new_tokens=12)
    place = rj.bookmark(state)
    whole, state = rj.decode(params, config, state, policy=policy)
    eos = int(whole.tokens[1, 3])
    first, state = rj.decode(params, config, state, policy=policy, eos_ids=eos, rewind=False)
    assert len(set(np.asarray(first.lengths).tolist())) > 1
    state = rj.extend(params, config, state, turn, max_new_tokens=6)
    texts = [
        [*prompt, *row[:length].tolist(), *more]
        for prompt, row, length, more in zip(prompts, np.asarray(first.tokens), first.lengths, turn, strict=True)
    ]
    out, state = rj.decode(params, config, state, policy=policy)
    same(out, rj.generate(params, config, texts, policy=policy, max_new_tokens=6))
    state = rj.rewind(state, place)
    same(first, rj.decode(params, config, state, policy=policy, eos_ids=eos)[0])


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
@pytest.mark.parametrize("text", [STRINGS[1], STRINGS[16]])
def test_kernels_read_turns(implementation, text, monkeypatch):
    if jax.default_backend() == "gpu" and implementation == "pallas_tpu":
        pytest.skip("JAX's interpreter of TPU kernels waits for ever on a machine with a GPU; CPUs run these")
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
    config = rj.LlamaConfig.tiny(head_dim=16)
    params = rj.init_params(config, jax.random.key(1))
    prompts, turn = [list(range(33)), [5, 6]], [[7, 8, 9], list(range(40, 59))]

    def run(name):
        state = rj.prefill(params, config, prompts, policies=text, max_new_tokens=3, implementation=name)
        state = rj.extend(params, config, state, turn, max_new_tokens=6, implementation=name)
        parts = []
        for count in (2, 4):
            options = dict(policy=text, max_new_tokens=count, implementation=name, rewind=False)
            out, state = rj.decode(params, config, state, **options)
            parts.append(out.tokens)
        return np.concatenate(parts, axis=1)

    expected = run("reference")
    interpreted = pltpu.force_tpu_interpret_mode() if implementation == "pallas_tpu" else contextlib.nullcontext()
    with interpreted:
        np.testing.assert_array_equal(run(implementation), expected)
