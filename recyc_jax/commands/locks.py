"""Locks on results folders: two runs never write to one folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_held: list[int] = []


def claim(file: Path, folder: Path) -> None:
    """Create the file if need be and lock it until `release`, or until the process ends. Raises ValueError, naming the
    folder of `--out`, if another run holds the lock."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT)  # stays open: closing the file would release the lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"--out {folder}: another run is writing there") from None
    _held.append(lock)


def release() -> None:
    """Release all locks of this process."""
    while _held:
        os.close(_held.pop())
