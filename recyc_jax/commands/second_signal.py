"""SIGINT and SIGTERM that arrive while the main thread is inside C++: in a collective, a compilation, or the wait for
other processes. Python runs its handlers only between bytecodes of the main thread, so a thread of our own reads every
signal's number from a pipe, and ends the process where the handlers could not."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)
_PATIENCE, _HURRY = 10.0, 0.3  # seconds that what comes before the end may take: at a first and at a second signal
_before_end: list[Callable[[int], None]] = []
_armed: list[int] = []  # the pipe's end that signals are written to


def at_once(number: int, frame: Any) -> None:
    """A handler for signals whose first arrival is to end the process. It does nothing itself: the thread sees which
    handler a signal has."""


def before_end(call: Callable[[int], None]) -> None:
    """Have `call(number)` called in a thread before a signal ends the process."""
    _before_end.append(call)


def arm() -> bool:
    """From now on, the second SIGINT or SIGTERM ends the process at once, and so does the first whose handler is
    `at_once`; the status is 128 and the signal's number. Returns False if that was so before, or if this is not the
    main thread, which alone can arrange it."""
    if _armed or threading.current_thread() is not threading.main_thread():
        return False
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    _armed.append(writes)
    threading.Thread(target=_heed, args=(reads,), name="second signal", daemon=True).start()
    return True


def disarm() -> None:
    """Undo `arm`."""
    signal.set_wakeup_fd(-1)
    os.close(_armed.pop())  # ends the thread


@contextlib.contextmanager
def armed() -> Iterator[None]:
    """Within the block, the process is armed."""
    newly = arm()
    try:
        yield
    finally:
        if newly:
            disarm()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within the block, the first SIGINT or SIGTERM ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with armed():
        before = {number: signal.signal(number, at_once) for number in _ENDING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _heed(reads: int) -> None:
    count = 0
    while data := os.read(reads, 64):
        for number in data:
            if number not in _ENDING:
                continue
            count += 1
            if count > 1:
                _end(number, _HURRY)
            elif signal.getsignal(number) is at_once:  # in a thread, so that a second signal is still heard
                threading.Thread(target=_end, args=(number, _PATIENCE), daemon=True).start()
    os.close(reads)


def _end(number: int, seconds: float) -> None:
    # not through sys.stderr, whose lock the main thread may hold, and not if the write would wait
    if select.select([], [2], [], 0)[1]:
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: ended at once\n".encode())
    for call in _before_end:
        caller = threading.Thread(target=call, args=(number,), daemon=True)
        caller.start()
        caller.join(seconds)
    os._exit(128 + number)
