"""What all commands share: checks of flags, exit statuses, progress bars, and the facts at the head of a report."""

from __future__ import annotations

import dataclasses
import io
import locale
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from recyc_jax.commands import files, hosts, locks, together

if TYPE_CHECKING:
    from recyc_jax.policies.registry import MakePolicy

KnownPolicies: TypeAlias = "Mapping[str, MakePolicy] | None"
"""The methods that policy strings may name, by name; None: the registered methods."""


@together.end_together
def run(
    prepare: Callable[[Any], Callable[[], int | None]],
    config: Any,
    when_interrupted: str,
    join: Callable[[], None] = hosts.join_named,
) -> int:
    """Prepare and run a command; returns the exit status.

    `join` connects to the run's other processes, if there are any. `prepare` checks all input, up to and including the
    loading of weights, and returns a function that does the rest and may return a status. A ValueError or OSError from
    `join` or `prepare` is a user error: its message is printed on one line, and the status is 2. A full disk gives
    status 1, Ctrl-C status 130; both print the message `when_interrupted`. If one of several processes does not
    succeed, all of them end.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model's answer may have what the terminal's encoding has not
        sys.stdout.reconfigure(errors="replace")
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            join()
            go = prepare(config)
        except (ValueError, OSError) as error:
            together.note(error, 2)
            print(f"error: {_one_line(error)}", file=sys.stderr)
            return 2
        try:
            status = go()
        except Exception as error:
            if not files.no_space(error):
                raise
            together.note("no space left to write", 1)
            print(f"error: no space left to write ({_first_line(error)}); {when_interrupted}", file=sys.stderr)
            return 1
    except BrokenPipeError:  # whoever read the output has what they want, as with `head`
        together.note("its output is no longer read", 128 + signal.SIGPIPE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        together.note("interrupted", 130)
        print(f"interrupted; {when_interrupted}", file=sys.stderr)
        return 130
    finally:
        locks.release()
        _interrupted.clear()
        signal.signal(signal.SIGINT, before)
    return status or 0


def _one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    advice = _of_locale() if isinstance(error, UnicodeError) else ""
    return " ".join(str(error).split("\n")) + advice or type(error).__name__


def _of_locale() -> str:
    """What to do about text that the locale's encoding does not have; nothing where that is UTF-8."""
    encoding = locale.getpreferredencoding(False)
    is_utf_8 = encoding.lower().replace("-", "") == "utf8"
    return "" if is_utf_8 else f" in this locale's encoding, {encoding}: set PYTHONUTF8=1"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


_interrupted: list[int] = []


def _interrupt(number: int, frame: Any) -> None:
    _interrupted.append(number)
    raise KeyboardInterrupt


def heed_interrupt() -> None:
    """Raise KeyboardInterrupt again if an earlier one was lost: Python drops exceptions raised in a finalizer or a
    library's callback. Long loops call this regularly."""
    if _interrupted:
        raise KeyboardInterrupt


def split(flag: str, text: str) -> list[str]:
    """The items of a comma-separated flag, without duplicates. Raises ValueError if there are none."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{flag} is empty")
    return list(dict.fromkeys(items))


def lengths(text: str) -> list[int]:
    """The total lengths in tokens that `--lengths` names. Raises ValueError for anything but positive integers."""
    found = []
    for item in split("--lengths", text):
        if not item.isdecimal() or int(item) < 1:
            raise ValueError(f"--lengths: {item!r} is not a positive whole number")
        found.append(int(item))
    return found


def check_texts(**texts: str | None) -> None:
    """Raise ValueError, naming the flag, for text with bytes that the locale's encoding does not have."""
    for name, text in texts.items():
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: character {error.start} is no text{_of_locale()}") from None


def check_counts(**counts: int) -> None:
    """Raise ValueError, naming the flag, for a number below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")


def check_policies(policies: Sequence[str], lengths: Sequence[int], known: KnownPolicies = None) -> None:
    """Raise ValueError if `--policies` is empty, names a policy twice, or holds a string that is no valid policy at one
    of the lengths."""
    from recyc_jax.policies.registry import POLICIES, parse_policy

    if not policies:
        raise ValueError("--policies: name at least one policy")
    for policy in policies:
        for length in lengths:
            parse_policy(policy, length, known or POLICIES)
    if len(set(policies)) < len(policies):
        raise ValueError("--policies names a policy twice")


def check_context(lengths: Sequence[int], context: int, allow_beyond: bool) -> None:
    """Raise ValueError for a length beyond the model's context, unless `allow_beyond`."""
    for length in lengths:
        if length > context and not allow_beyond:
            raise ValueError(
                f"--lengths {length} exceeds the model's context of {context} tokens; pass --allow-beyond-context to run "
                "it all the same"
            )


def dtype_name(dtype: str) -> str:
    """The dtype that `--dtype` selects on this backend; "auto" is float32 on CPU, bfloat16 elsewhere."""
    import jax

    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return usual if dtype == "auto" else dtype


def progress(on_stderr: bool = False) -> Any:
    """A progress bar with counts, elapsed time and remaining time."""
    from rich import console
    from rich import progress as rich

    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("left:"),
        rich.TimeRemainingColumn(elapsed_when_finished=False, compact=False),
        console=console.Console(stderr=on_stderr),
    )


def facts(config: Any, command: str, sources: Mapping[str, str], **more: str) -> dict[str, str]:
    """The facts at the head of a report: model, sources, device, versions and the command."""
    from importlib import metadata

    import jax

    import recyc_jax

    device = jax.devices()[0]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "transformers"))
    versions = f"recyc_jax {recyc_jax.__version__}, {versions}"
    return {
        "model": config.model,
        **sources,
        **more,
        "device": f"{device.platform}, {device.device_kind}",
        "versions": versions,
        "batch size": str(config.batch_size),
        "seed": str(config.seed),
        "command": "`" + shlex.join(["python", "-m", command, *_given(config)]) + "`",
    }


def _given(config: Any) -> list[str]:
    """The flags that differ from their defaults, as command-line arguments."""
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flags.append("--" + field.name.replace("_", "-"))
            if not isinstance(value, bool):
                flags += map(str, value) if isinstance(value, tuple) else [str(value)]
    return flags


def budgets(policies: Sequence[str], lengths: Sequence[int], known: KnownPolicies = None) -> Iterator[str]:
    """A line for each policy and length: the policy's budget in entries and as a fraction of the total length."""
    from recyc_jax.policies.registry import POLICIES, parse_policy

    for policy in policies:
        for length in lengths:
            budget = getattr(parse_policy(policy, length, known or POLICIES), "budget", None)
            if budget is not None:
                yield f"`{policy}` at {length}: {budget} entries a partial step, {budget / length:.4g} of the length"
