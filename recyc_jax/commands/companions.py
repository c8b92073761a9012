"""The processes of a run end together. Each says regularly, through the key-value store of JAX's coordination service,
that it is alive, that it is done, or why it ends early; and each ends, with one line, once another one has failed or is
silent. Threads do this, because the main thread may be inside a collective that the failed process never joins.

A process that ends early does so by `os._exit`: JAX's own way out waits for the other processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from typing import Any, NamedTuple, NoReturn

from recyc_jax.commands import second_signal
from recyc_jax.commands.relay import Relay

BEAT = 1.0  # seconds between a process's messages; longer in large runs
SILENT = 20.0  # seconds without a new message after which a process is held dead
SUSPECT = 8.0  # the same when communication with it has failed
LINGER = 5.0  # seconds that process 0, which hosts the store, waits for the others to read why it ends
TELLING = 3.0  # seconds for telling the others
CLOSING = 15.0  # seconds for JAX's shutdown once all processes are done
_BROKEN = re.compile(
    r"^(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|DATA_LOSS): |gloo|nccl",
    re.IGNORECASE | re.MULTILINE,
)
_FOLDER = "recyc_jax/processes"
_DONE = "done"


class End(NamedTuple):
    """Why the run ends early: the process that is at fault, the exit status, and the reason as a predicate."""

    process: int
    status: int
    reason: str

    def line(self) -> str:
        resumes = "" if self.status == 2 else "; the same command, started again in every process, resumes"
        return f"error: process {self.process} {self.reason}{resumes}"


class _Other:
    """What is known of another process."""

    def __init__(self) -> None:
        self.message = ""
        self.silent = 0.0  # seconds, counted while this process could have read a new message
        self.end: Any = None

    def heard(self, message: str, passed: float) -> None:
        if message == self.message:
            self.silent += passed
        else:
            self.message, self.silent = message, 0.0
            self.end = json.loads(message)[1]


class Watch:
    """What this process knows of the others and tells them."""

    def __init__(self, store: Any, process: int, processes: int, relay: Relay | None) -> None:
        self.store, self.process, self.relay = store, process, relay
        self.others = {number: _Other() for number in range(processes) if number != process}
        self.beat = BEAT + processes / 64  # each process reads all messages at each beat
        self.limit = SILENT
        self.end: End | str | None = None  # what this process says about its own end
        self.said: End | str | None = None  # what of it the others can read
        self.complaint: End | None = None
        self.unanswered = 0.0  # seconds since the store answered
        self.status: int | None = None  # what this process ends with once all are done
        self.over, self.wake, self.ending = threading.Event(), threading.Event(), threading.Lock()
        self.threads = [
            threading.Thread(target=target, name="companions", daemon=True) for target in (self.talk, self.judge)
        ]

    # --- the two threads ---------------------------------------------------------------------------------------------

    def talk(self) -> None:
        """Say that this process lives, and read what the others say. A call may hang if the store's host is gone."""
        beats, before = 0, time.monotonic()
        while not self.over.is_set():
            beats, end = beats + 1, self.end
            with contextlib.suppress(Exception):  # the store does not answer: the judge counts the seconds
                self.store.key_value_set(f"{_FOLDER}/{self.process}", json.dumps([beats, end]), allow_overwrite=True)
                found = {key.rpartition("/")[2]: text for key, text in self.store.key_value_dir_get(_FOLDER)}
                passed = min(time.monotonic() - before, 2 * self.beat)  # not what this process itself was stopped for
                before = time.monotonic()
                for number, other in self.others.items():
                    other.heard(found.get(str(number), ""), passed)
                self.said, self.unanswered = end, 0.0
            self.wake.wait(self.beat)
            self.wake.clear()

    def judge(self) -> None:
        """End this process if another one has failed. Time is counted in ticks: this process may have been stopped."""
        tick, closing = 0.25, 0.0
        while not self.over.wait(tick):
            self.unanswered += tick
            if self.status is not None:
                closing += tick
                if closing > CLOSING:  # everything is done and written
                    leave(self.status)
            elif (end := self.verdict()) is not None:
                self.end_early(end, end.line())

    def cut_off(self) -> bool:
        """Whether process 0, and with it the store, is gone."""
        return self.relay is not None and self.relay.lost

    def verdict(self) -> End | None:
        told = [End(*other.end) for other in self.others.values() if isinstance(other.end, list)]
        if told:
            return told[0]
        if self.cut_off() or (self.process and self.unanswered > self.limit):
            return End(0, 1, "no longer answers")
        silent = [number for number, other in self.others.items() if other.silent > self.limit and not other.end]
        return End(silent[0], 1, "no longer answers") if silent else None

    # --- the end -----------------------------------------------------------------------------------------------------

    def say(self, end: End | str, seconds: float) -> None:
        """Tell the others about this process's end, for so many seconds at most."""
        self.end = end
        until = time.monotonic() + seconds
        while self.said != end and time.monotonic() < until and not self.cut_off():
            self.wake.set()
            time.sleep(0.02)

    def end_early(self, end: End, line: str | None = None) -> NoReturn:
        """Tell the others why, and end this process."""
        if not self.ending.acquire(blocking=False):  # another thread is at it
            time.sleep(2 * (TELLING + LINGER))
        if line is not None:
            print(line, file=sys.stderr, flush=True)
        self.tell(end)
        leave(end.status)

    def tell(self, end: End) -> None:
        """Tell the others why this process ends. As their store ends with it, process 0 waits until they have read
        that."""
        self.say(end, TELLING)
        until = time.monotonic() + (0.0 if self.process else LINGER)
        while time.monotonic() < until and not all(
            other.end or number == end.process or other.silent > SUSPECT for number, other in self.others.items()
        ):
            time.sleep(0.05)

    def give_others_time(self, error: BaseException | None) -> None:
        """If communication with another process failed, wait for the judge to find out which one: it then ends this
        process."""
        if _is_communication(error):
            self.limit = SUSPECT
            time.sleep(SUSPECT + 3 * self.beat)

    def finish(self, status: int) -> int:
        """Wait until all processes are done, and disconnect from them; returns `status`. If this one has failed and the
        others are not about to be done too, tell them and end it."""
        with second_signal.ending_at_once():
            self.say(_DONE, TELLING)
            failed, began = 0 < status < 128, time.monotonic()
            while not all(other.end == _DONE for other in self.others.values()):
                time.sleep(0.05)
                if failed and time.monotonic() - began > SUSPECT:
                    self.end_early(End(self.process, status, f"ended with status {status}"))
            self.status = status
            if self.relay is not None:
                self.relay.release()
            import jax

            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()
            self.over.set()
            self.wake.set()
            for thread in self.threads:
                thread.join(TELLING)
        return status


def _is_communication(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, may be that of a collective or of the coordination service. JAX
    raises these as several types; their messages begin with a status or name the library."""
    while error is not None:
        if _BROKEN.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave(status: int) -> NoReturn:
    """End this process without JAX's way out."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)
