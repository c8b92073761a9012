"""Windows of documents, on which perplexity is measured."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import sys
from typing import Any

from recyc_jax.commands.documents import Domain


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of one document."""

    domain: str
    length: int
    index: int
    document: str
    offset: int  # tokens before the window in its document
    tokens: tuple[int, ...]


def windows(
    domains: list[Domain], lengths: list[int], tokenizer: Any, *, count: int, skip: int, seed: int
) -> tuple[list[Window], list[str]]:
    """At most `count` windows per domain and length, after the first `skip`, from the non-overlapping windows of all
    documents in a random order that depends on `seed`; and a note for each domain and length that has fewer. Raises
    ValueError for a domain without a window."""
    from rich.progress import track

    tokenizer.model_max_length = sys.maxsize  # silences its warning about long texts
    found, notes = [], []
    for domain in domains:
        described = f"tokenizing {domain.name}"
        documents = [
            (document.name, tokenizer(document.text)["input_ids"])
            for document in track(domain.documents, described, transient=True)
        ]
        for length in lengths:
            candidates = [
                (name, offset, ids) for name, ids in documents for offset in range(0, len(ids) - length + 1, length)
            ]
            if not candidates:
                raise ValueError(f"--domains: no document of {domain.name} has {length} tokens")
            random.Random(f"{seed} {domain.name} {length}").shuffle(candidates)
            if len(candidates) <= skip:
                has = f"it has {len(candidates)} sequences of {length} tokens"
                raise ValueError(f"--skip {skip} leaves nothing of {domain.name}: {has}")
            chosen = range(skip, min(skip + count, len(candidates)))
            for index in chosen:
                name, offset, ids = candidates[index]
                tokens = tuple(ids[offset : offset + length])
                found.append(Window(domain.name, length, index, name, offset, tokens))
            if len(chosen) < count:
                notes.append(f"{domain.name} has {len(chosen)} sequences of {length} tokens, not {count}")
    return found, notes


def digest_of(windows: list[Window]) -> str:
    """The first 12 hex digits of the SHA-256 of all windows."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(repr(dataclasses.astuple(window)).encode())
    return digest.hexdigest()[:12]
