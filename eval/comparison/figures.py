"""Figures of a comparison: score against the tokens that a step reads, and against the steps per full step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.comparison.tables import Point
from recyc_jax.commands.plotting import plot


@plot
def tokens_read(path: Path, points: Sequence[Point], length: int) -> None:
    """One line per method and stride, over budgets; full attention as a dashed line."""
    _draw(path, points, _family, lambda point: point.tokens, f"cached tokens read per step, of {length} (log scale)")


@plot
def strides(path: Path, points: Sequence[Point], length: int) -> None:
    """One line per method and budget, over strides, of the methods that take full steps."""
    some = [point for point in points if point.stride is not None and point.policy.period is not None]
    some += [point for point in points if point.text == "full"]
    _draw(path, some, _by_budget, lambda point: point.stride or 1.0, "decode steps per full step (log scale)")


def _family(point: Point) -> str:
    """What the points of a line have in common: the policy string without its budget."""
    name, _, options = point.text.partition(":")
    rest = ",".join(option for option in options.split(",") if not option.startswith("budget="))
    return f"{name}:{rest}" if rest else name


def _by_budget(point: Point) -> str:
    name, _, options = point.text.partition(":")
    rest = [option for option in options.split(",") if option.partition("=")[0] not in ("budget", "stride")]
    return ", ".join([name, f"{getattr(point.policy, 'budget', 'all')} tokens", *rest])


def _draw(
    path: Path, points: Sequence[Point], line_of: Callable[[Point], str], place: Callable[[Point], float], label: str
) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes: Any = figure.subplots()
    lines: dict[str, list[Point]] = {}
    for point in points:
        if point.text == "full":
            axes.axhline(point.score, color="black", linestyle="--", label="full attention")
        else:
            lines.setdefault(line_of(point), []).append(point)
    styles = {"lookahead": ("o", "-"), "recycled": ("s", "-"), "quest": ("^", ":"), "top_k": ("v", ":")}
    axes.set_prop_cycle(color=colormaps["tab20"].colors if len(lines) > 10 else colormaps["tab10"].colors)
    for name, some in lines.items():
        some = sorted(some, key=place)
        marker, line = styles.get(name.partition(":")[0].partition(",")[0], ("x", "-"))
        x, y = [place(point) for point in some], [point.score for point in some]
        error = [1.96 * point.error for point in some]
        axes.errorbar(x, y, yerr=error, marker=marker, linestyle=line, capsize=2, label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.set_ylabel("mean score, percent (95% intervals)")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=120)
