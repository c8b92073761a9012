"""Training rows: tokenized documents on disk, cut into rows, in an order that can be resumed at any row.

Whole documents are held out for evaluation. A row is a window of one document, or, if packed, a piece of all documents
laid end to end, with segment numbers. Grain does the shuffling, epochs and batches: its iterator state is a number
that stays exact however far grain has read ahead."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recyc_jax.commands.documents import Domain

Tokens = np.ndarray


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenized documents, one after the other."""

    tokens: Tokens  # uint32 [all tokens]
    bounds: Tokens  # int64 [documents + 1]: the start of each document, and the end of the last
    domains: tuple[str, ...]  # of each document
    names: tuple[str, ...]
    fingerprint: str

    def document(self, number: int) -> Tokens:
        return self.tokens[self.bounds[number] : self.bounds[number + 1]]

    @property
    def lengths(self) -> Tokens:
        return np.diff(self.bounds)


def tokenize(domains: Sequence[Domain], tokenizer: Any, cache: Path) -> Corpus:
    """The domains' documents, tokenized; the tokens are stored in the folder `cache` and read from there the next time.
    Raises ValueError if the stored file is truncated."""
    from rich.progress import track

    documents = [(domain.name, document) for domain in domains for document in domain.documents]
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for domain, document in documents:
        digest.update(f"\0{domain}\0{document.name}\0".encode())
        digest.update(document.text.encode())
    fingerprint = digest.hexdigest()[:16]
    file, bounds_file = cache / f"tokens-{fingerprint}.bin", cache / f"tokens-{fingerprint}.json"
    if not bounds_file.is_file():  # written last: its presence means that both files are complete
        cache.mkdir(parents=True, exist_ok=True)
        bounds = [0]
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        with draft.open("wb") as out:
            for start in track(range(0, len(documents), 64), "tokenizing", transient=True):
                batch = [document.text for _, document in documents[start : start + 64]]
                for encoded in tokenizer.backend_tokenizer.encode_batch(batch):
                    out.write(np.asarray(encoded.ids, np.uint32).tobytes())
                    bounds.append(bounds[-1] + len(encoded.ids))
        draft.replace(file)
        draft.write_text(json.dumps(bounds))
        draft.replace(bounds_file)
    bounds = np.asarray(json.loads(bounds_file.read_text()), np.int64)
    tokens = np.memmap(file, np.uint32, "r") if bounds[-1] else np.zeros(0, np.uint32)
    if tokens.size != bounds[-1]:
        raise ValueError(f"{file}: cut short; delete it to have it made again")
    return Corpus(
        tokens, bounds, tuple(domain for domain, _ in documents), tuple(doc.name for _, doc in documents), fingerprint
    )


def hold_out(corpus: Corpus, share: float, least: int, seed: int) -> tuple[list[int], list[int]]:
    """The documents to train on, and those held out: from each domain, whole documents of at least `least` tokens, in
    random order, until they hold `share` of its tokens or one document is left to train on. Raises ValueError for a
    domain with fewer than two documents or none of that length."""
    if share == 0:
        return list(range(len(corpus.names))), []
    held: list[int] = []
    for domain in dict.fromkeys(corpus.domains):
        mine = [number for number, name in enumerate(corpus.domains) if name == domain]
        able = [number for number in mine if corpus.lengths[number] >= least]
        random.Random(f"{seed} {domain}").shuffle(able)
        wanted, found = share * corpus.lengths[mine].sum(), 0
        if not able or len(mine) < 2:
            raise ValueError(
                f"--data {domain}: holding documents out for evaluation needs two or more, one of at least {least} tokens "
                f"(--eval-lengths); it has {len(mine)}, the longest of {max(corpus.lengths[mine])}"
            )
        for number in able[: len(mine) - 1]:
            held.append(number)
            found += corpus.lengths[number]
            if found >= wanted:
                break
    return [number for number in range(len(corpus.names)) if number not in set(held)], sorted(held)


class Windows:
    """Rows of `length` tokens, each from one document; a shorter rest at the end of a document is dropped."""

    def __init__(self, corpus: Corpus, documents: Sequence[int], length: int) -> None:
        self._tokens, self._length = corpus.tokens, length
        starts = [
            np.arange(corpus.bounds[number], corpus.bounds[number + 1] - length + 1, length) for number in documents
        ]
        self._starts = np.concatenate(starts) if starts else np.zeros(0, np.int64)
        self.documents = np.repeat(np.asarray(documents, np.int64), [len(each) for each in starts])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        start = self._starts[index]
        return {"tokens": np.asarray(self._tokens[start : start + self._length], np.int32)}


class Packed:
    """Rows of `length` tokens cut from all documents laid end to end in random order; `segments` numbers the documents
    of each row from 1. The tokens after the last whole row are dropped."""

    def __init__(self, corpus: Corpus, documents: Sequence[int], length: int, seed: int) -> None:
        order = list(documents)
        random.Random(f"{seed} packing").shuffle(order)
        self._corpus, self._length = corpus, length
        self._order = np.asarray(order, np.int64)
        self._ends = np.cumsum(corpus.lengths[self._order]) if order else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) // self._length if len(self._ends) else 0

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        at, end = int(index) * self._length, (int(index) + 1) * self._length
        if at < 0 or end > self._ends[-1]:
            raise IndexError(index)
        pieces, segments = [], []
        number = int(np.searchsorted(self._ends, at, side="right"))
        while at < end:
            document = self._order[number]
            stop = min(end, int(self._ends[number]))
            first = self._corpus.bounds[document + 1] - (self._ends[number] - at)
            pieces.append(self._corpus.tokens[first : first + stop - at])
            segments.append(np.full(stop - at, len(segments) + 1, np.int32))
            at, number = stop, number + 1
        return {
            "tokens": np.concatenate(pieces).astype(np.int32),
            "segments": np.concatenate(segments),
        }


def batches(rows: Any, batch_size: int, seed: int) -> Any:
    """An endless grain iterator over batches of rows. Each epoch takes every row once, in a new random order; a batch
    may span two epochs. `get_state` and `set_state` are exact."""
    import grain

    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(None)
    return iter(order.batch(batch_size, drop_remainder=True).to_iter_dataset(grain.ReadOptions(num_threads=1)))
