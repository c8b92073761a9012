"""Tokenized documents in a memory-mapped file that is built once, and windows of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recyc_jax.commands import locks
from recyc_jax.commands.documents import Document, Domain
from recyc_jax.loading import identity
from recyc_jax.loading.tokenizer import special_tokens

_BATCH_CHARACTERS = 1 << 22  # of text that is tokenized at once
_BATCH_DOCUMENTS = 256


class DomainTokens(NamedTuple):
    """A domain's place in a corpus."""

    name: str
    documents: int
    empty: int  # documents without any text, which are left out


class Files(NamedTuple):
    """The files of a corpus. The card is written last: where it is, the others are complete."""

    tokens: Path  # uint32, all documents one after the other
    bounds: Path  # where each document begins, and where the last one ends
    names: Path
    card: Path

    @classmethod
    def of(cls, folder: Path, stem: str) -> Files:
        return cls(*(folder / f"{stem}{suffix}" for suffix in (".bin", ".bounds.npy", ".names.jsonl", ".json")))


class Corpus:
    """Tokenized documents, one after the other, domain by domain. A document's tokens are those that the tokenizer
    makes of its text, with the special tokens that it adds."""

    def __init__(self, files: Files) -> None:
        """Raises ValueError if a file is missing or truncated."""
        self._files = files
        try:
            card = json.loads(files.card.read_text(encoding="utf-8"))
            self.bounds: np.ndarray = np.load(files.bounds)  # int64 [documents + 1]
            size = files.tokens.stat().st_size
            self.domains = tuple(DomainTokens(*each) for each in card["domains"])
            self.fingerprint: str = card[
                "digest"
            ]  # of tokens, bounds, special tokens, and the domains' names and sizes
            self.largest: int = card["largest"]  # the largest token id
            self.before: list[int] = card["before"]  # ids that the tokenizer puts before a text
            self.after: list[int] = card["after"]  # ids that it puts after a text
            self.eos: int | None = card["eos"]
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise ValueError(f"{files.card}: cannot be read ({error!r}); delete it to have it made again") from None
        if size != 4 * self.bounds[-1]:
            raise ValueError(f"{files.tokens}: cut short; delete {files.card.name} to have it made again")
        self.tokens: np.ndarray = np.memmap(files.tokens, np.uint32, "r") if size else np.zeros(0, np.uint32)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.bounds)

    def numbers(self, domain: str) -> range:
        """The numbers of a domain's documents."""
        begin = 0
        for each in self.domains:
            if each.name == domain:
                return range(begin, begin + each.documents)
            begin += each.documents
        raise KeyError(domain)

    def domain_of(self, number: int | np.integer) -> str:
        """The name of the domain that a document belongs to."""
        return next(each.name for each in self.domains if number in self.numbers(each.name))

    def document(self, number: int | np.integer) -> np.ndarray:
        """The tokens of a document."""
        return self.tokens[self.bounds[number] : self.bounds[number + 1]]

    def names(self) -> list[str]:
        """The documents' names."""
        with self._files.names.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def tokenize(domains: Sequence[Domain], tokenizer: Any, cache: Path) -> Corpus:
    """The domains' documents, tokenized. The tokens are kept in files of the folder `cache` that are named after what
    the documents and the tokenizer are, made by one process and read by all others and the next time. Raises ValueError
    for texts that cannot be read and for damaged files."""
    # 1: the version of the layout
    digest = hashlib.sha256(f"1 {identity.of_tokenizer(tokenizer)} {tokenizer.eos_token_id}".encode())
    for domain in domains:
        digest.update(f"\0{domain.name}\0{domain.fingerprint}".encode())
    files = Files.of(cache, f"tokens-{digest.hexdigest()[:16]}")
    if not files.card.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with locks.waiting(cache / ".lock", "another process tokenizes texts"):
            if not files.card.is_file():
                _build(domains, tokenizer, files)
    return Corpus(files)


def _build(domains: Sequence[Domain], tokenizer: Any, files: Files) -> None:
    """Write the files, which appear complete or not at all. What processes that were killed have left is removed: the
    caller holds the folder's lock."""
    for left in files.card.parent.glob(".tokens-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{files.card.stem}.", dir=files.card.parent) as draft:
        made = Files.of(Path(draft), "draft")
        _write(domains, tokenizer, made)
        for one, target in zip(made, files, strict=True):
            one.replace(target)


def _write(domains: Sequence[Domain], tokenizer: Any, files: Files) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bounds, described, largest, digest = [0], [], 0, hashlib.sha256()
    with (
        files.tokens.open("wb") as tokens,
        files.names.open("w", encoding="utf-8") as names,
        Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), transient=True) as progress,
    ):
        shown = progress.add_task("tokenizing")
        for domain in domains:
            count = 0
            for batch in _batches(domain.documents):
                for ids in encode(tokenizer, [document.text for document in batch]):
                    array = np.asarray(ids, np.uint32)
                    tokens.write(array.tobytes())
                    digest.update(array.tobytes())
                    bounds.append(bounds[-1] + len(ids))
                    largest = max(largest, max(ids, default=0))
                names.writelines(json.dumps(document.name) + "\n" for document in batch)
                count += len(batch)
                progress.update(shown, description=f"tokenizing {domain.name}: {count} documents, {bounds[-1]} tokens")
            described.append(DomainTokens(domain.name, count, domain.documents.empty))
    before, after = special_tokens(tokenizer)
    digest.update(np.asarray(bounds, np.int64).tobytes())
    digest.update(json.dumps([[each.name, each.documents] for each in described]).encode())
    digest.update(json.dumps([before, after, tokenizer.eos_token_id]).encode())
    np.save(files.bounds, np.asarray(bounds, np.int64))
    card = {
        "digest": digest.hexdigest()[:16],
        "domains": described,
        "largest": largest,
        "before": before,
        "after": after,
        "eos": tokenizer.eos_token_id,
    }
    files.card.write_text(json.dumps(card), encoding="utf-8")


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of each text, with the special tokens that the tokenizer adds, and without a warning about long texts."""
    return tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]


def _batches(documents: Any) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Windows:
    """Rows of `length` tokens, each from one document: the tokens that the tokenizer puts before a text (such as BOS),
    then a piece of the document. Pieces follow one another; a shorter rest at the end of a document is dropped."""

    def __init__(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> None:
        self._corpus, self._before = corpus, np.asarray(corpus.before, np.int32)
        self._piece = length - len(corpus.before)
        numbers = np.asarray(documents, np.int64)
        contents = corpus.lengths[numbers] - len(corpus.before) if len(numbers) else np.zeros(0, np.int64)
        counts = np.maximum(contents, 0) // self._piece if self._piece > 0 else np.zeros_like(contents)
        self.documents = np.repeat(numbers, counts)
        """The number of each row's document, int64 [rows]."""
        first = np.repeat(np.cumsum(counts) - counts, counts)
        self.offsets = (np.arange(len(self.documents)) - first) * self._piece
        """Tokens of the document's text before each row's piece, int64 [rows]."""

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        start = self._corpus.bounds[self.documents[index]] + len(self._before) + self.offsets[index]
        piece = self._corpus.tokens[start : start + self._piece].astype(np.int32)
        return {"tokens": np.concatenate([self._before, piece])}
