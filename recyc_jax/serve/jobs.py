"""What a client asked for, and how its answer grows."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from recyc_jax.spelling import Spelling

TOP = 20
"""The most likely tokens that are listed at most for each token."""


class Token(NamedTuple):
    """A token that was made."""

    id: int
    log_probability: float | None = None
    top: tuple[
        tuple[int, float], ...
    ] = ()  # the most likely tokens with their log-probabilities, if they are asked for


class Delta(NamedTuple):
    """What a job's answer grew by."""

    text: str
    tokens: list[Token]


class End(NamedTuple):
    """The answer has ended."""

    reason: str  # "stop" or "length"


class Failed(NamedTuple):
    """No more will come."""

    message: str
    status: int = 500  # of HTTP


Event = Delta | End | Failed


@dataclasses.dataclass(eq=False)
class Job:
    """A prompt to be answered."""

    ids: list[int]
    max_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = dataclasses.field(default_factory=lambda: secrets.randbits(32))
    stops: tuple[str, ...] = ()
    top: int | None = None  # the most likely tokens to list for each token; None: no log-probabilities
    emit: Callable[[Event], None] = lambda event: None
    made: int = 0  # tokens
    cached: int = 0  # tokens of the prompt that had been read for an earlier request
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.ended.set()

    def fail(self, message: str) -> None:
        """Say that no answer will come, if it has not ended."""
        if not self.ended.is_set():
            self.ended.set()
            self.emit(Failed(message))


class Answer:
    """The growing answer of a job: text is handed out once it cannot be the beginning of a stop string."""

    def __init__(self, job: Job, tokenizer: Any, eos_ids: tuple[int, ...]) -> None:
        self.job, self.ids = job, list[int]()
        self._spelling, self._eos_ids, self._held = Spelling(tokenizer), frozenset(eos_ids), ""

    def add(self, tokens: list[Token]) -> None:
        """Take the next tokens; those behind the answer's end are dropped."""
        text, taken, reason = "", list[Token](), None
        for token in tokens:
            if self.job.ended.is_set() or reason is not None:
                break
            self.ids.append(token.id)
            self.job.made += 1
            taken.append(token)
            if token.id in self._eos_ids:
                reason = "stop"
            elif self.job.made >= self.job.max_tokens:
                reason = "length"
            new, is_stopped = self._unheld(self._spelling.add([token.id], reason is not None), reason is not None)
            text += new
            reason = "stop" if is_stopped else reason
        if self.job.ended.is_set():
            return
        if text or taken:
            self.job.emit(Delta(text, taken))
        if reason is not None:
            self.job.ended.set()
            self.job.emit(End(reason))

    def _unheld(self, new: str, is_last: bool) -> tuple[str, bool]:
        """The text that can be handed out, and whether a stop string has come."""
        text, self._held = self._held + new, ""
        found = [place for place in map(text.find, self.job.stops) if place >= 0]
        if found:
            return text[: min(found)], True
        if is_last:
            return text, False
        held = max((_begun(text, stop) for stop in self.job.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False


def _begun(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
