"""Windows of documents, on which perplexity is measured."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recyc_jax.commands import corpus as token_files
from recyc_jax.commands.documents import Domain
from recyc_jax.loading import fetch


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of one document."""

    domain: str
    length: int
    index: int
    document: str
    offset: int  # tokens of the document's text before the window
    tokens: tuple[int, ...]  # those that the tokenizer puts before a text, such as BOS, come first

    @property
    def key(self) -> tuple[str, int, int]:
        """What identifies a window in a run."""
        return self.domain, self.length, self.index

    @property
    def digest(self) -> str:
        """12 hex digits of a SHA-256 of the tokens."""
        return hashlib.sha256(np.asarray(self.tokens, np.int64).tobytes()).hexdigest()[:12]


def windows(
    domains: list[Domain],
    lengths: list[int],
    tokenizer: Any,
    *,
    count: int,
    skip: int,
    seed: int,
    vocabulary: int | None = None,
) -> tuple[list[Window], list[str]]:
    """At most `count` windows per domain and length, after the first `skip`, from the non-overlapping windows of all
    documents in a random order that depends on `seed`; and a note for each domain and length that has fewer. Raises
    ValueError for a domain without a window, and for ids beyond the model's `vocabulary` (None: any)."""
    with _token_folder() as folder:
        corpus = token_files.tokenize(domains, tokenizer, folder)
        if vocabulary is not None and corpus.largest >= vocabulary:
            raise ValueError(
                f"the tokenizer makes the id {corpus.largest}, beyond the model's vocabulary of {vocabulary}"
            )
        return _windows(corpus, lengths, count=count, skip=skip, seed=seed)


@contextmanager
def _token_folder() -> Iterator[Path]:
    """The cache folder for tokens; a temporary one where that cannot be written."""
    folder = fetch.cache_dir() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
    else:
        yield folder


def _windows(
    corpus: token_files.Corpus, lengths: list[int], *, count: int, skip: int, seed: int
) -> tuple[list[Window], list[str]]:
    found, notes, names = [], [], corpus.names()
    for domain in corpus.domains:
        for length in lengths:
            rows = token_files.Windows(corpus, corpus.numbers(domain.name), length)
            if not len(rows):
                raise ValueError(f"--domains: no document of {domain.name} has {length} tokens")
            order = list(range(len(rows)))
            random.Random(f"{seed} {domain.name} {length}").shuffle(order)
            if len(order) <= skip:
                has = f"it has {len(order)} sequences of {length} tokens"
                raise ValueError(f"--skip {skip} leaves nothing of {domain.name}: {has}")
            chosen = range(skip, min(skip + count, len(order)))
            for index in chosen:
                row = order[index]
                tokens = tuple(rows[row]["tokens"].tolist())
                document = names[rows.documents[row]]
                found.append(Window(domain.name, length, index, document, int(rows.offsets[row]), tokens))
            if len(chosen) < count:
                notes.append(f"{domain.name} has {len(chosen)} sequences of {length} tokens, not {count}")
    return found, notes
