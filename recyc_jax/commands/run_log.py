"""A results folder from which an interrupted run resumes: one JSON row per sample, appended as soon as the sample is
scored."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recyc_jax.commands import hosts, locks
from recyc_jax.commands.files import writable_folder, write_text

Row = dict[str, Any]
Item = TypeVar("Item")
_ADVICE = "choose another --out, or begin anew with --fresh"


class RunLog:
    """Rows in `results.jsonl`, and in `config.json` what all of them have in common. The fields `key` identify a row;
    its field `sample` is a digest of what was evaluated.

    A run grows: rows of further policies, tasks or samples are added to those that are there. Raises ValueError if the
    folder cannot be written, is in use by another process, or holds an invalid row or rows of another configuration;
    with `fresh`, such rows are put aside as `results-N.jsonl`. A last line that a kill truncated is dropped, and its
    sample is evaluated again.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any], key: Sequence[str], fresh: bool = False) -> None:
        self.path = folder / "results.jsonl"
        self._folder, self._key = folder, tuple(key)

        def claim_and_read() -> list[Row]:
            try:
                self._claim(dict(configuration), fresh)
                return self._read()
            except OSError as error:
                raise ValueError(f"--out {folder}: {error.strerror}") from None

        self.rows = hosts.from_first(claim_and_read)
        self._seen = {self._id(row) for row in self.rows}

    def check_samples(self, digest_of: Mapping[tuple[Any, ...], str]) -> None:
        """Raise ValueError if a row was made of another sample than the one of its key now. `digest_of` gives the
        samples' digests by key without the policy, which comes first in the key."""
        for row in self.rows:
            now = digest_of.get(self._id(row)[1:])
            if now is not None and row.get("sample") != now:
                which = ", ".join(f"{name} {row[name]}" for name in self._key[1:])
                raise ValueError(
                    f"--out {self._folder} holds results of other samples: those of {which} have changed; {_ADVICE}"
                )

    def __contains__(self, identity: tuple[Any, ...]) -> bool:
        return identity in self._seen

    def rows_of(self, policies: Sequence[str], asked: Container[tuple[Any, ...]]) -> list[Row]:
        """The rows of these policies whose key without the policy, which comes first in the key, is in `asked`."""
        return [row for row in self.rows if row["policy"] in policies and self._id(row)[1:] in asked]

    def append(self, rows: Iterable[Row]) -> None:
        """Add rows; they are on disk when this returns. Only the first process writes."""
        new = list(rows)
        if hosts.is_first():
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                file.flush()
                os.fsync(file.fileno())
        self.rows += new
        self._seen |= {self._id(row) for row in new}

    def _id(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def _claim(self, configuration: dict[str, Any], fresh: bool) -> None:
        folder = self._folder
        writable_folder("--out", folder)
        locks.claim(folder / ".lock", folder)
        file = folder / "config.json"
        self.path.touch()
        if fresh and self.path.stat().st_size:
            number = next(number for number in itertools.count(1) if not (folder / f"results-{number}.jsonl").exists())
            self.path.rename(folder / f"results-{number}.jsonl")
            self.path.touch()
        if self.path.stat().st_size == 0:  # without rows, a different configuration may be replaced
            write_text(file, json.dumps(configuration, indent=2) + "\n")
            return
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"--out {folder}: results.jsonl is there without its config.json; {_ADVICE}") from None
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{file} holds no configuration; {_ADVICE}")
        for name in configuration | before:
            was, now = before.get(name), configuration.get(name)
            if was != now:
                raise ValueError(
                    f"--out {folder} holds another configuration: {name} was {was!r} and is {now!r} now; {_ADVICE}"
                )

    def _read(self) -> list[Row]:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            print(f"{self.path}: the last line is torn and is measured again", file=sys.stderr, flush=True)
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        rows: dict[tuple[Any, ...], Row] = {}  # a row that is there twice counts once
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):  # not splitlines: JSON strings may hold U+2028
            try:
                row = json.loads(line)
                hash(self._id(row))
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(f"{self.path}:{number} is no result; delete the line, or {_ADVICE}") from None
            rows.setdefault(self._id(row), row)
        return list(rows.values())


def batches(
    log: RunLog, policies: Sequence[str], items: Sequence[Item], identity: Callable[[Item], tuple[Any, ...]], rows: int
) -> Iterator[tuple[tuple[str, ...], list[Item]]]:
    """The work that is not in the log yet: batches of at most `rows` items, each with the policies that all its items
    lack. `identity` gives an item's key in the log without the policy, which comes first in the key."""
    lacking: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        absent = tuple(policy for policy in policies if (policy, *identity(item)) not in log)
        if absent:
            lacking.setdefault(absent, []).append(item)
    for absent, some in lacking.items():
        for begin in range(0, len(some), rows):
            yield absent, some[begin : begin + rows]
