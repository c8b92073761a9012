"""A results folder from which an interrupted run resumes: one JSON row per sample, appended as soon as the sample is
scored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recyc_jax.commands import hosts, locks
from recyc_jax.commands.files import write_text

Row = dict[str, Any]
Item = TypeVar("Item")


class RunLog:
    """Rows in `results.jsonl`, and the configuration of the run in `config.json`. The fields `key` identify a row.

    Raises ValueError if the folder cannot be written, is in use by another process, or holds an invalid row or rows of
    another configuration. A last line that a kill truncated is dropped, and its sample is evaluated again.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any], key: Sequence[str]) -> None:
        self.path = folder / "results.jsonl"
        self._key = tuple(key)

        def claim_and_read() -> list[Row]:
            try:
                self._claim(folder, dict(configuration))
                return self._read()
            except OSError as error:
                raise ValueError(f"--out {folder}: {error.strerror}") from None

        self.rows = hosts.from_first(claim_and_read)
        self._seen = {self._id(row) for row in self.rows}

    def __contains__(self, identity: tuple[Any, ...]) -> bool:
        return identity in self._seen

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

    def _claim(self, folder: Path, configuration: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        locks.claim(self.path, folder)
        file = folder / "config.json"
        if self.path.stat().st_size == 0:  # without rows, a different configuration may be replaced
            write_text(file, json.dumps(configuration, indent=2) + "\n")
            return
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"--out {folder}: results.jsonl is there without its config.json") from None
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"{file} holds no configuration; delete the folder or choose another --out")
        for name in configuration | before:
            was, now = before.get(name), configuration.get(name)
            if was != now:
                raise ValueError(
                    f"--out {folder} holds another configuration: {name} was {was!r} and is {now!r} now; choose another "
                    "--out or delete the folder"
                )

    def _read(self) -> list[Row]:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        rows = []
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):  # not splitlines: JSON strings may hold U+2028
            try:
                row = json.loads(line)
                self._id(row)
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}:{number} is no result; delete the line or choose another --out"
                ) from None
            rows.append(row)
        return rows


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
