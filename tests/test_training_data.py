"""Training data: packed rows, windows, epochs, and held-out documents."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recyc_jax.commands.corpus import Corpus, DomainTokens, Windows
from train import data

BOS, EOS = 10_000, 10_001


def corpus_of(lengths, domains=None, before=(), eos=None):
    """A corpus without files, whose documents hold the tokens 0, 1, 2, ..., after the tokens of `before`."""
    corpus = object.__new__(Corpus)
    corpus.bounds = np.cumsum([0, *(length + len(before) for length in lengths)])
    texts = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    corpus.tokens = np.concatenate([[*before, *text] for text in texts] or [[]]).astype(np.uint32)
    names = domains or ["a"] * len(lengths)
    corpus.domains = tuple(DomainTokens(name, names.count(name), 0) for name in dict.fromkeys(names))
    corpus.before, corpus.after, corpus.eos = list(before), [], eos
    return corpus


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 5))
def test_packed_rows_hold_every_token_once_in_its_document(lengths, width, seed):
    corpus = corpus_of(lengths)
    rows = data.Packed(corpus, range(len(lengths)), width, seed)
    assert len(rows) == sum(lengths) // width
    seen = []
    for number in range(len(rows)):
        row = rows[number]
        seen += list(row["tokens"])
        owner = np.searchsorted(corpus.bounds, row["tokens"], side="right")
        # segments change exactly where documents do
        np.testing.assert_array_equal(np.diff(row["segments"]) == 0, np.diff(owner) == 0)
    assert len(set(seen)) == len(seen) == len(rows) * width


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20), st.sampled_from([(), (BOS,), (BOS, 7)])
)
def test_windows_lie_within_a_document_and_do_not_overlap(lengths, width, before):
    """Each begins with the tokens that the tokenizer puts before a text."""
    corpus, piece = corpus_of(lengths, before=before), width - len(before)
    rows = Windows(corpus, range(len(lengths)), width)
    assert len(rows) == (sum(length // piece for length in lengths) if piece > 0 else 0)
    tokens = [rows[number]["tokens"] for number in range(len(rows))]
    for row, document, offset in zip(tokens, rows.documents, rows.offsets, strict=True):
        text = corpus.document(document)[len(before) :]
        assert tuple(row[: len(before)]) == before
        np.testing.assert_array_equal(row[len(before) :], text[offset : offset + piece])
    assert len({token for row in tokens for token in row[len(before) :]}) == len(rows) * piece


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20), st.integers(0, 5))
def test_packed_documents_end_with_eos(lengths, width, seed):
    rows = data.Packed(corpus_of(lengths, before=[BOS], eos=EOS), range(len(lengths)), width, seed)
    total = sum(lengths) + 2 * len(lengths)
    assert len(rows) == total // width
    laid = np.concatenate([rows[number]["tokens"] for number in range(len(rows))] or [[]])
    assert set(laid[1:][laid[:-1] == EOS]) <= {BOS}
    assert not set(laid[1:][laid[:-1] != EOS]) & {BOS}
    for number in range(len(rows)):  # an EOS belongs to the document that it ends
        row = rows[number]
        np.testing.assert_array_equal(np.diff(row["segments"]) == 1, (row["tokens"] == EOS)[:-1])


def test_a_million_documents_are_held_out_at_once():
    lengths = np.random.default_rng(0).integers(1, 50, 1_000_000)
    corpus = corpus_of([3], before=[])
    corpus.bounds = np.concatenate([[0], np.cumsum(lengths)])
    corpus.domains = (DomainTokens("a", 600_000, 0), DomainTokens("b", 400_000, 2))
    began = time.monotonic()
    kept, held = data.hold_out(corpus, 0.1, 20, seed=0)
    rows = Windows(corpus, kept, 16)
    lines = list(data.described(corpus, kept, held, rows, 16))
    assert time.monotonic() - began < 20
    assert len(kept) + len(held) == 1_000_000
    assert lengths[held].min() >= 20
    for part in (slice(0, 600_000), slice(600_000, None)):
        mine = held[(held >= part.start) & (held < (part.stop or 1_000_000))]
        assert lengths[mine].sum() == pytest.approx(0.1 * lengths[part].sum(), rel=1e-3)
    assert "shorter than a row" in lines[0]
    assert lines[1].endswith("left out: 2 documents without any text")


def test_what_is_used_and_dropped_adds_up():
    corpus = corpus_of([100, 10, 65], before=[BOS])
    kept, held = np.asarray([0, 1]), np.asarray([2])
    (line,) = data.described(corpus, kept, held, Windows(corpus, kept, 33), 33)
    assert line.split("; ") == [
        "data a: 3 documents, 178 tokens",
        "held out: 1 documents, 66 tokens",
        "in rows of 33: 1 documents, 96 tokens",
        "dropped, shorter than a row: 1 documents, 11 tokens",
        "dropped at the ends of documents, where no whole row fits: 4 tokens",
    ]


def test_an_epoch_takes_every_row_once_and_goes_on_exactly():
    rows = Windows(corpus_of([70]), [0], 7)
    taken = data.batches(rows, 4, seed=3)
    first = [next(taken)["tokens"] for _ in range(5)]  # two epochs of ten rows
    starts = [row[0] for batch in first for row in batch]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 70, 7))
    assert starts[:10] != starts[10:]
    state = json.loads(json.dumps(taken.get_state()))
    rest = [next(taken)["tokens"] for _ in range(3)]
    again = data.batches(rows, 4, seed=3)
    again.set_state(state)
    for expected in rest:
        np.testing.assert_array_equal(next(again)["tokens"], expected)


def test_whole_documents_of_each_domain_are_held_out():
    corpus = corpus_of([100, 10, 80, 90, 50, 60], ["a", "a", "a", "a", "b", "b"])
    kept, held = data.hold_out(corpus, 0.3, 40, seed=0)
    assert sorted([*kept, *held]) == list(range(6))
    of_a = [number for number in held if number < 4]
    assert corpus.lengths[of_a].sum() >= 0.3 * 280
    assert 1 not in held
    assert len([number for number in held if number > 3]) == 1
    assert [list(part) for part in data.hold_out(corpus, 0, 40, seed=0)] == [list(range(6)), []]
    with pytest.raises(ValueError, match=r"--data b: holding documents out .* one of at least 70 tokens"):
        data.hold_out(corpus, 0.3, 70, seed=0)
