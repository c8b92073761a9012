"""Locks on results folders: two runs never write to one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_held: list[int] = []
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of file systems without flock


def claim(file: Path, folder: Path) -> None:
    """Create the file if need be and lock it until `release`, or until the process ends. Raises ValueError, naming the
    folder of `--out`, if another run holds the lock. On a file system without locks a line says so instead."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # stays open: closing the file would release the lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"--out {folder}: another run is writing there") from None
    except OSError as error:
        os.close(lock)
        if error.errno not in _WITHOUT_LOCKS:
            raise
        print(
            f"WARNING: the file system of {folder} has no locks: make sure that no other run writes there",
            file=sys.stderr,
            flush=True,
        )
        return
    _held.append(lock)


@contextlib.contextmanager
def waiting(file: Path, meanwhile: str) -> Iterator[None]:
    """Hold the lock of a file within the block; prints `meanwhile` once if another process holds it and has to be
    waited for. On a file system without locks the block runs all the same."""
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        said = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    print(f"waits: {meanwhile}", file=sys.stderr, flush=True)
                said = True
                time.sleep(0.2)  # not a blocking flock, which some file systems do not interrupt for signals
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                break
        yield
    finally:
        os.close(lock)


def release() -> None:
    """Release all locks of this process."""
    while _held:
        os.close(_held.pop())
