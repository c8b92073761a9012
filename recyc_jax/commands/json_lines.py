"""Files of JSON lines that commands append to, and that a kill may have torn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file. A torn last line is passed over with a word. Raises ValueError, naming file and line, for any
    other line that is no JSON object, and OSError if the file cannot be read."""
    data = path.read_bytes()
    rows = []
    lines = data.split(b"\n")  # not splitlines: JSON strings may hold U+2028
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it holds a {type(row).__name__}")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                print(f"{path}: the last line is torn and is passed over", file=sys.stderr, flush=True)
                break
            raise ValueError(f"{path}:{number} is no JSON object ({error})") from None
        rows.append(row)
    return rows


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Row], None]]:
    """Yields a function that adds a row to the file, which keeps its earlier ones; each row says when the command was
    `started`. A torn last line is cut off."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    with path.open("ab+") as file:
        file.seek(0)
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)

        def add(row: Row) -> None:
            file.write(json.dumps(row | {"started": started}).encode() + b"\n")
            file.flush()

        yield add
