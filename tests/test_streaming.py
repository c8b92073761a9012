"""Streams: their pieces are the whole answer, soon and in time; text comes in whole characters."""

import jax
import numpy as np
import pytest
from policy_strings import NEW, RAGGED, STRINGS, every_policy

import recyc_jax as rj
from recyc_jax.generation_loop import Stretch
from recyc_jax.spelling import Spelling


@every_policy
def test_pieces_are_the_answer(params, config, policy):
    whole = rj.generate(params, config, RAGGED, policy=policy, max_new_tokens=NEW)
    for ids in ((), (int(whole.tokens[1, 7]),)):
        whole = rj.generate(params, config, RAGGED, policy=policy, max_new_tokens=NEW, eos_ids=ids)
        answer = rj.stream(params, config, RAGGED, policy=policy, max_new_tokens=NEW, eos_ids=ids)
        pieces = list(answer)
        np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces], axis=1), whole.tokens)
        np.testing.assert_array_equal(sum(piece.lengths for piece in pieces), whole.lengths)
        np.testing.assert_array_equal(answer.full_steps, whole.full_steps)
        np.testing.assert_array_equal(answer.lengths, whole.lengths)
        assert pieces[0].tokens.shape[1] == 1
        assert all(piece.tokens.shape[1] <= 16 for piece in pieces)
        assert pieces[-1].done.all()


def test_a_stream_ends_when_all_rows_have_ended(params, config):
    whole = rj.generate(params, config, [RAGGED[1]], max_new_tokens=8, eos_ids=())
    eos = int(whole.tokens[0, 3])
    pieces = list(rj.stream(params, config, [RAGGED[1]], max_new_tokens=400, eos_ids=eos))
    assert sum(int(piece.lengths[0]) for piece in pieces) == whole.tokens[0].tolist().index(eos) + 1
    assert sum(piece.tokens.shape[1] for piece in pieces) <= 33


def test_a_stream_draws_what_generate_draws(params, config):
    options = dict(max_new_tokens=24, sampling=rj.Sample(2.0), key=jax.random.key(3), eos_ids=(), policy=STRINGS[1])
    whole = rj.generate(params, config, RAGGED, **options)
    pieces = rj.stream(params, config, RAGGED, **options)
    np.testing.assert_array_equal(np.concatenate([piece.tokens for piece in pieces], axis=1), whole.tokens)


def test_a_stream_that_is_left_goes_on_from_what_was_read(params, config):
    """The tokens that were decoded ahead are dropped."""
    turn = [[7, 8, 9]]
    answer = rj.stream(params, config, [RAGGED[1]], max_new_tokens=200, eos_ids=())
    read = [next(answer) for _ in range(3)]
    said = np.concatenate([piece.tokens for piece in read], axis=1)[0].tolist()
    keep = [len(RAGGED[1]) + len(said)]
    state = rj.extend(params, config, answer.state, turn, keep=keep, max_new_tokens=10)
    out, _ = rj.decode(params, config, state, policy="full", eos_ids=())
    want = rj.generate(params, config, [[*RAGGED[1], *said, *turn[0]]], max_new_tokens=10, eos_ids=())
    np.testing.assert_array_equal(out.tokens, want.tokens)


@pytest.mark.parametrize("text", [STRINGS[1], STRINGS[12], STRINGS[16], STRINGS[18]])
def test_a_state_keeps_the_beginning(params, config, text):
    """Any number of tokens of each row can be kept, of the prompt alone or of the answer too."""
    prompts, turn = [list(range(40)), list(range(50, 60))], [[3] * 12, [4, 5]]
    for keep in ([30, 10], [1, 7]):
        state = rj.prefill(params, config, prompts, policies=(text, "full"), max_new_tokens=12)
        _, state = rj.decode(params, config, state, policy="full", eos_ids=(), rewind=False)
        state = rj.extend(params, config, state, turn, keep=keep, max_new_tokens=9)
        texts = [[*prompt[:count], *more] for prompt, count, more in zip(prompts, keep, turn, strict=True)]
        if text != STRINGS[12]:  # H2O keeps what the dropped queries gave to the tokens that stay
            want = rj.generate(params, config, texts, policy=text, max_new_tokens=9, eos_ids=())
            np.testing.assert_array_equal(
                rj.decode(params, config, state, policy=text, eos_ids=())[0].tokens, want.tokens
            )
        else:
            assert rj.decode(params, config, state, policy=text, eos_ids=())[0].tokens.shape == (2, 9)
    with pytest.raises(ValueError, match="keep="):
        rj.extend(params, config, rj.prefill(params, config, prompts), turn, keep=[41, 10])


class Bytes:
    """A tokenizer of bytes, some of which are no character alone."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_half_characters(size):
    text = "Zażółć 漢字 🙂 e\u0301nd"
    ids, spelling, said = list(text.encode()), Spelling(Bytes()), []
    for begin in range(0, len(ids), size):
        said.append(spelling.add(ids[begin : begin + size], begin + size >= len(ids)))
    assert "".join(said) == text
    assert not any("\ufffd" in piece for piece in said)
    assert Spelling(Bytes()).add([0xF0, 0x9F], True) == "\ufffd"


@pytest.mark.parametrize("period", [None, 1, 2, 3, 7, 10, 16, 17, 24, 48, 50, 64, 100])
def test_pieces_are_short_and_waste_little(period):
    """From any step, a piece takes from 1 to 16 steps, and few of those that its program has room for are none."""
    policy = rj.FullAttention() if period is None else rj.Lookahead(8, period)
    piece = Stretch.of(policy)
    for first in range(0, 3 * (period or 5)):
        assert 1 <= piece.steps(policy, first) <= 16
    step = used = made = 0
    while step < 1000:
        taken = piece.steps(policy, step)
        decides = 0 if period is None else (step + taken) // period - step // period
        step, used, made = step + taken, used + decides + piece.rounds * piece.partial, made + taken
    assert used <= 1.05 * made
