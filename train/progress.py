"""Display of a run's progress."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def shown(taken: int, steps: int, log_every: int, is_first: bool) -> Iterator[Any]:
    """Yields a function that shows the metrics of a step: in a progress bar on a terminal, otherwise in a line every
    `log_every` steps. Only the first process shows anything."""
    from rich.console import Console

    from recyc_jax.commands import command_line

    def described(row: dict[str, Any]) -> str:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        mfu = f", MFU {100 * row['mfu']:.1f}%" if "mfu" in row else ""
        return f"loss {loss}, {row['tokens_per_second']:,.0f} tokens/s{mfu}"

    if not is_first:
        yield lambda row: None
    elif Console().is_terminal:
        with command_line.progress() as bar:
            task = bar.add_task("training", total=steps, completed=taken)
            yield lambda row: bar.update(task, completed=row["step"], description=described(row))
    else:
        began = time.monotonic()

        def line(row: dict[str, Any]) -> None:
            if row["step"] % log_every == 0 or row["step"] == steps:
                rate = (time.monotonic() - began) / (row["step"] - taken)
                print(
                    f"step {row['step']}/{steps}: {described(row)}, {rate * (steps - row['step']):.0f} s left",
                    flush=True,
                )

        yield line
