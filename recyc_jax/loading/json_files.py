"""Reading JSON files and JSON lines that users, trainers and killed processes wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, if it holds none. A byte-order mark is skipped."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(found).__name__}")
    return found
