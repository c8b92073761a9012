"""What a command does so that its processes end together, if there are several (`companions.py`)."""

from __future__ import annotations

import atexit
import functools
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec

from recyc_jax.commands import second_signal
from recyc_jax.commands.companions import End, Watch
from recyc_jax.commands.relay import Relay

P = ParamSpec("P")
_watches: list[Watch] = []  # one at most


def watch(relay: Relay | None = None) -> None:
    """Begin to watch the other processes; called once they are connected. `relay` is what this process reaches the
    coordination service through, if anything. Without effect if this JAX has no key-value store to speak through."""
    try:
        from jax._src import distributed

        state = distributed.global_state
        store, process, processes = state.client, state.process_id, state.num_processes
        store.key_value_set, store.key_value_dir_get  # type: ignore[union-attr]  # noqa: B018
    except (ImportError, AttributeError):
        return
    if processes == 1 or _watches:
        return
    if relay is not None:
        relay.keep()
    made = Watch(store, process, processes, relay)
    _watches.append(made)
    for thread in made.threads:
        thread.start()
    atexit.register(_at_exit)
    second_signal.before_end(_tell_signal)
    second_signal.arm()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, second_signal.at_once)  # JAX has set a handler of its own beside Python's


def note(error: BaseException | str, status: int) -> None:
    """Say why this command is about to return `status` although it is not done. If another process is at fault, this
    process ends here, with a line that says so."""
    if _watches:
        if isinstance(error, BaseException):
            _watches[0].give_others_time(error)
            error = str(error)
        _watches[0].complaint = End(_watches[0].process, status, f"ended: {_first_line(error)}")


def end_together(command: Callable[P, int]) -> Callable[P, int]:
    """A command, which returns its exit status, whose processes end together: it returns when it is done in all of
    them. If it fails, or returns after `note`, this process tells the others and ends. In a run of one process it stays
    as it is."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            status = command(*args, **kwargs)
        except BaseException as error:
            if _watches:
                _fail(error)
            raise
        if _watches:
            if _watches[0].complaint is not None:
                _watches[0].end_early(_watches[0].complaint)
            return _watches[0].finish(status)
        return status

    return run


def _fail(error: BaseException) -> NoReturn:
    """Report the error that ends the command in this process, and tell the others."""
    made = _watches[0]
    made.give_others_time(error)
    traceback.print_exception(error)
    what = type(error).__name__ + (f": {_first_line(str(error))}" if str(error) else "")
    made.end_early(End(made.process, 1, f"failed: {what}"))


def _at_exit() -> None:
    """For programs that use `hosts.join` without a command: interpreters end together too."""
    made = _watches[0]
    if not made.over.is_set():
        error = getattr(sys, "last_value", None)  # what ended the main thread
        if error is not None:
            made.end_early(End(made.process, 1, f"failed: {type(error).__name__}"))
        made.finish(0)


def _tell_signal(number: int) -> None:
    made = _watches[0]
    if not made.over.is_set():
        made.tell(End(made.process, 128 + number, f"was ended by {signal.Signals(number).name}"))


def _first_line(text: str) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 300 else f"{line[:300]}..."
