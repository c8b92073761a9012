"""Reading and writing the commands' files."""

from __future__ import annotations

import errno
import re
import tempfile
import uuid
from pathlib import Path

from recyc_jax.commands import text_files
from recyc_jax.loading.digests import file_digest


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: complete or not at all."""
    # process ids repeat between containers on one disk
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def read_text(flag: str, path: Path) -> str:
    """The text of a user's file, without a byte-order mark. Raises ValueError, naming flag and file, if it cannot be
    read as UTF-8 text."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from None
    return text_files.decoded(data, f"{flag} {path}")


def fingerprint(path: Path) -> str:
    """The first 12 hex digits of a file's SHA-256, which distinguish versions of a text in reports and in resumed
    runs."""
    return file_digest(path)[:12]


def writable_folder(flag: str, folder: Path) -> Path:
    """Create the folder if needed, and return it. Raises ValueError, naming the flag, if it is an address such as
    gs://..., cannot be created or cannot be written to."""
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/", str(folder))
    if scheme:
        raise ValueError(
            f"{flag} {scheme[1]}://{str(folder)[scheme.end() :]}: results are written to a folder of this machine; mount "
            "the bucket, or copy the folder afterwards"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {folder}: {error.strerror}") from None
    return folder


def no_space(error: BaseException) -> bool:
    """Whether an error, or one that caused it, says that a disk or quota is full or a file grew too large."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(words in str(seen) for words in ("No space left", "File too large", "quota exceeded", "os error 28")):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
