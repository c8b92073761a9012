"""Reading and writing the commands' files."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: complete or not at all."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()


def read_text(flag: str, path: Path) -> str:
    """The text of a user's file. Raises ValueError, naming flag and file, if it cannot be read as UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} {path}: not UTF-8 text ({error})") from None


def fingerprint(path: Path) -> str:
    """The first 12 hex digits of a file's SHA-256, which distinguish versions of a text in reports and in resumed
    runs."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def writable_folder(flag: str, folder: Path) -> Path:
    """Create the folder if needed, and return it. Raises ValueError, naming the flag, if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {folder}: {error.strerror}") from None
    return folder
