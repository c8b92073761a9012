"""SIGTERM and SIGINT: remembered when they arrive, and acted on where the run can stop cleanly."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from recyc_jax.commands import command_line, second_signal


class Stop(Exception):  # noqa: N818 - not an error
    """The process was asked to end."""


class Asked:
    """Remembers the first signal that asks the process to end."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.number = self.number or number

    def look(self) -> None:
        """Raise Stop if any process of the run was asked to end. All processes call this at the same points, so they
        stop together."""
        number = self.number  # a signal that arrives during the allgather is left for the next call
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            number = int(np.max(multihost_utils.process_allgather(np.asarray(number or 0)))) or None
        if number is not None:
            self.number = number
            raise Stop


@contextlib.contextmanager
def listening() -> Iterator[Asked]:
    """Within the block, the first SIGTERM or SIGINT is remembered instead of ending the process; the second one ends it
    at once, wherever it is. Raises KeyboardInterrupt if an earlier one was lost."""
    command_line.heed_interrupt()
    asked = Asked()
    with second_signal.armed():
        before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield asked
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
