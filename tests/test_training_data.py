"""Training data: packed rows, windows, epochs, and held-out documents."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train import data


def corpus_of(lengths, domains=None):
    bounds = np.cumsum([0, *lengths])
    names = tuple(f"document {number}" for number in range(len(lengths)))
    return data.Corpus(
        np.arange(bounds[-1], dtype=np.uint32), bounds, tuple(domains or ["a"] * len(lengths)), names, "print"
    )


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
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 20))
def test_windows_lie_within_a_document_and_do_not_overlap(lengths, width):
    corpus = corpus_of(lengths)
    rows = data.Windows(corpus, range(len(lengths)), width)
    assert len(rows) == sum(length // width for length in lengths)
    tokens = [rows[number]["tokens"] for number in range(len(rows))]
    for row, document in zip(tokens, rows.documents, strict=True):
        assert set(row) <= set(corpus.document(document))
    assert len({token for row in tokens for token in row}) == len(rows) * width


def test_an_epoch_takes_every_row_once_and_goes_on_exactly():
    rows = data.Windows(corpus_of([70]), [0], 7)
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
    assert sorted(kept + held) == list(range(6))
    of_a = [number for number in held if number < 4]
    assert corpus.lengths[of_a].sum() >= 0.3 * 280
    assert 1 not in held
    assert len([number for number in held if number > 3]) == 1
    assert data.hold_out(corpus, 0, 40, seed=0) == (list(range(6)), [])
    with pytest.raises(ValueError, match=r"--data b: holding documents out .* one of at least 70 tokens"):
        data.hold_out(corpus, 0.3, 70, seed=0)
