"""Training rows: documents held out, packed rows, and an order that can be resumed at any row.

Whole documents are held out for evaluation. A row is a window of one document, or, if packed, a piece of all documents
laid end to end, with segment numbers. Grain does the shuffling, epochs and batches: its iterator state is a number
that stays exact however far grain has read ahead."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from recyc_jax.commands.corpus import Corpus, Windows


def hold_out(corpus: Corpus, share: float, least: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the documents to train on, and of those held out: from each domain, whole documents of at least
    `least` tokens, in random order, until they hold `share` of its tokens or one document is left to train on. Raises
    ValueError for a domain with fewer than two documents or none of that length."""
    lengths = corpus.lengths
    is_held = np.zeros(len(lengths), bool)
    for domain in corpus.domains if share else ():
        mine = corpus.numbers(domain.name)
        of_mine = lengths[mine.start : mine.stop]
        able = (mine.start + np.flatnonzero(of_mine >= least)).tolist()
        if not able or len(mine) < 2:
            raise ValueError(
                f"--data {domain.name}: holding documents out for evaluation needs two or more, one of at least {least} "
                f"tokens (--eval-lengths); it has {len(mine)}, the longest of {max(of_mine, default=0)}"
            )
        random.Random(f"{seed} {domain.name}").shuffle(able)
        able = able[: len(mine) - 1]
        reached = np.cumsum(lengths[able]) >= share * of_mine.sum()
        is_held[able[: int(np.argmax(reached)) + 1 if reached.any() else len(able)]] = True
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


class Packed:
    """Rows of `length` tokens cut from all documents laid end to end in random order, each followed by EOS if the
    tokenizer has one and does not add it itself; `segments` numbers the documents of each row from 1. The tokens after
    the last whole row are dropped."""

    def __init__(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int, seed: int) -> None:
        order = list(map(int, documents))
        random.Random(f"{seed} packing").shuffle(order)
        self._corpus, self._length = corpus, length
        self._order = np.asarray(order, np.int64)
        self._closing = [] if corpus.eos is None or corpus.eos in corpus.after else [corpus.eos]
        sizes = corpus.lengths[self._order] + len(self._closing) if order else np.zeros(0, np.int64)
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._length if len(self._ends) else 0

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        at, end = int(index) * self._length, (int(index) + 1) * self._length
        if at < 0 or not len(self._ends) or end > self._ends[-1]:
            raise IndexError(index)
        pieces, segments = [], []
        number = int(np.searchsorted(self._ends, at, side="right"))
        while at < end:
            begun = int(self._ends[number - 1]) if number else 0
            piece = self._piece(int(self._order[number]), at - begun, end - begun)
            pieces.append(piece)
            segments.append(np.full(len(piece), len(segments) + 1, np.int32))
            at, number = at + len(piece), number + 1
        return {"tokens": np.concatenate(pieces).astype(np.int32), "segments": np.concatenate(segments)}

    def _piece(self, document: int, begin: int, end: int) -> np.ndarray:
        """The tokens from `begin` to `end` of a document and its closing EOS, or to where they end."""
        tokens = self._corpus.document(document)
        closing = self._closing if end > len(tokens) else []
        return np.concatenate([tokens[begin:end].astype(np.int32), closing[max(0, begin - len(tokens)) :]])


def described(corpus: Corpus, kept: np.ndarray, held: np.ndarray, rows: Windows | Packed, length: int) -> Iterator[str]:
    """For each domain, a line that says how many of its documents and tokens are in rows, are held out, and are in
    neither and why; of packed rows, how many tokens of all are left over at the end."""
    lengths = corpus.lengths
    for domain in corpus.domains:
        mine = corpus.numbers(domain.name)
        train, out = (some[(some >= mine.start) & (some < mine.stop)] for some in (kept, held))
        parts = [f"data {domain.name}: {_counted(len(mine), lengths[mine.start : mine.stop].sum())}"]
        if len(out):
            parts.append(f"held out: {_counted(len(out), lengths[out].sum())}")
        if isinstance(rows, Windows):
            per_document = np.bincount(rows.documents[np.isin(rows.documents, train)] - mine.start, minlength=len(mine))
            taken = per_document[train - mine.start] * (length - len(corpus.before))
            short = train[taken == 0]
            parts.append(f"in rows of {length}: {_counted(len(train) - len(short), taken.sum())}")
            if len(short):
                parts.append(f"dropped, shorter than a row: {_counted(len(short), lengths[short].sum())}")
            specials = len(corpus.before) * (len(train) - len(short))
            rest = lengths[train].sum() - lengths[short].sum() - taken.sum() - specials
            if rest:
                parts.append(f"dropped at the ends of documents, where no whole row fits: {rest:,} tokens")
        if domain.empty:
            parts.append(f"left out: {domain.empty:,} documents without any text")
        yield "; ".join(parts)
    if isinstance(rows, Packed):
        yield f"in packed rows of {length}: {len(rows) * length:,} tokens, EOS between documents included"


def _counted(documents: int, tokens: int) -> str:
    return f"{documents:,} documents, {int(tokens):,} tokens"


def batches(rows: Any, batch_size: int, seed: int) -> Any:
    """An endless grain iterator over batches of rows. Each epoch takes every row once, in a new random order; a batch
    may span two epochs. `get_state` and `set_state` are exact."""
    import grain

    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    return iter(order.batch(batch_size, drop_remainder=True).to_iter_dataset(grain.ReadOptions(num_threads=1)))
