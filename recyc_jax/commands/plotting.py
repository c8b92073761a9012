"""Figures of results. What cannot be drawn costs the figure alone: results are written before."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec

P = ParamSpec("P")


def plot(draw: Callable[Concatenate[Path, P], None]) -> Callable[Concatenate[Path, P], None]:
    """Decorates a function that imports matplotlib and writes a figure to a path, its first argument: where that fails,
    the function prints a line instead."""

    @functools.wraps(draw)
    def drawn(path: Path, *args: P.args, **kwargs: P.kwargs) -> None:
        before = os.environ.get("MPLBACKEND")
        # matplotlib refuses to be imported where this names a back end that is not installed, as notebooks' kernels do
        os.environ["MPLBACKEND"] = "agg"
        try:
            draw(path, *args, **kwargs)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"WARNING: {path} was not drawn: {reason}", file=sys.stderr, flush=True)
        finally:
            if before is None:
                del os.environ["MPLBACKEND"]
            else:
                os.environ["MPLBACKEND"] = before

    return drawn
