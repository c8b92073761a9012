"""A folder of results that an interrupted run goes on with: one JSON row a sample, appended as soon as it is known."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import hosts

Row = dict[str, Any]


class RunLog:
    """Rows in `results.jsonl`, and the configuration that made them in `config.json`.

    Raises ValueError where the folder can't be written, is being written by another process, holds rows of another
    configuration, or holds a row that is none; a last line cut short by a kill is dropped and made again.
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
        """Add rows, on disk when this returns. Of several processes the first one writes."""
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
        self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT)  # never closed: locked until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ValueError(f"--out {folder}: another run is writing there") from None
        file = folder / "config.json"
        if self.path.stat().st_size == 0:  # nothing is lost, whatever was planned here before
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
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):  # not splitlines: JSON may hold U+2028 as it is
            try:
                row = json.loads(line)
                self._id(row)
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path}:{number} is no result; delete the line or choose another --out"
                ) from None
            rows.append(row)
        return rows


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
