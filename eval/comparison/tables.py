"""Scores of policies over several tasks, and their paired differences from full attention."""

from __future__ import annotations

import dataclasses
import gzip
import json
import lzma
import math
from collections.abc import Sequence
from pathlib import Path

from eval.ruler.scoring import mean_and_error, mean_of_tasks, paired
from eval.ruler.tasks.niah import KINDS
from eval.ruler.tasks.registry import TASKS
from eval.speed import roofline
from eval.tables import markdown_table, ordered
from recyc_jax.commands.run_log import Row
from recyc_jax.config import LlamaConfig
from recyc_jax.policies.base import Policy
from recyc_jax.policies.registry import parse_policy


@dataclasses.dataclass(frozen=True)
class Results:
    """Scores in 0..1 by (length, policy, task) and sample, of the tasks that are compared."""

    scores: dict[tuple[int, str, str], dict[int, float]]
    strides: dict[tuple[int, str], float]  # decode steps per full step, where there were full steps
    tasks: list[str]
    lengths: list[int]
    policies: list[str]

    @classmethod
    def read(cls, paths: Sequence[Path], tasks: str) -> Results:
        """The rows of all files. Raises ValueError, naming the culprit, for a file that cannot be read, for rows that
        are none of `eval.ruler`, and where no row is of these tasks."""
        if not paths:
            raise ValueError("name one or more files of rows")
        rows = [row for path in paths for row in _rows(path)]
        present = ordered(rows, "task")
        wanted = {"niah": list(KINDS), "all": [task for task in TASKS if task in present]}.get(tasks)
        wanted = wanted or [task.strip() for task in tasks.split(",") if task.strip()]
        rows = [row for row in rows if row["task"] in wanted]
        if not rows:
            raise ValueError(f"--tasks {tasks}: there are only rows of {', '.join(present) or 'no task'}")
        scores: dict[tuple[int, str, str], dict[int, float]] = {}
        steps: dict[tuple[int, str], list[float]] = {}
        for row in rows:
            scores.setdefault((row["length"], row["policy"], row["task"]), {})[row["index"]] = row["score"]
            taken = steps.setdefault((row["length"], row["policy"]), [0.0, 0.0])
            taken[0], taken[1] = taken[0] + row["steps"], taken[1] + row["full_steps"]
        strides = {key: every / full for key, (every, full) in steps.items() if full}
        tasks_there = [task for task in wanted if task in present]
        return cls(scores, strides, tasks_there, sorted(set(ordered(rows, "length"))), ordered(rows, "policy"))

    def mean(self, length: int, policy: str) -> tuple[float, float] | None:
        """The mean over the tasks in percent, and its standard error; None unless all tasks are there."""
        cells = [self.scores.get((length, policy, task)) for task in self.tasks]
        if not all(cells):
            return None
        return mean_of_tasks([mean_and_error(list(cell.values())) for cell in cells if cell])

    def difference(self, length: int, policy: str) -> tuple[float, float] | None:
        """The mean over the tasks of the difference from full attention on the same samples, in percent, and its
        standard error; None unless all tasks are there."""
        pairs = []
        for task in self.tasks:
            mine, full = (self.scores.get((length, name, task), {}) for name in (policy, "full"))
            both = sorted(mine.keys() & full.keys())
            if not both:
                return None
            pairs.append(paired([mine[index] for index in both], [full[index] for index in both]))
        return mean_of_tasks(pairs)


@dataclasses.dataclass(frozen=True)
class Point:
    """A policy at one length."""

    text: str
    policy: Policy
    score: float
    error: float
    tokens: float  # read per step, full steps included
    stride: float | None  # steps per full step


def points(results: Results, length: int, shape: LlamaConfig) -> list[Point]:
    """The policies at a length that have all tasks."""
    found = []
    for text in results.policies:
        mean = results.mean(length, text)
        if mean is not None:
            policy, stride = parse_policy(text, length), results.strides.get((length, text))
            measured = stride if policy.period is not None and text != "full" else None
            found.append(Point(text, policy, *mean, roofline.tokens_read(shape, policy, length, measured), stride))
    return found


def markdown(results: Results, shape: LlamaConfig) -> str:
    """Tables of the means and differences by length, and of each task at each length."""
    lines = [
        "# Comparison",
        "",
        f"Mean of {', '.join(results.tasks)}. Percent ± standard error; differences are paired with full attention,"
        " sample by sample, with 95% intervals. Tokens read: keys and values per step, layer and head, full steps"
        " and what is read in order to choose included.",
        "",
    ]
    for length in results.lengths:
        body = []
        for point in points(results, length, shape):
            full, gap = results.mean(length, "full"), results.difference(length, point.text)
            of_full = f"{100 * point.score / full[0]:.1f}%" if full and full[0] else "-"
            counts = {len(results.scores[length, point.text, task]) for task in results.tasks}
            body.append(
                [
                    f"`{point.text}`",
                    f"{point.score:.1f} ± {point.error:.1f}",
                    of_full,
                    "-" if gap is None or point.text == "full" else f"{gap[0]:+.1f} ± {1.96 * gap[1]:.1f}",
                    f"{point.tokens:.0f}",
                    "-" if point.stride is None else f"{point.stride:.1f}",
                    " to ".join(str(count) for count in sorted({min(counts), max(counts)})),
                ]
            )
        heading = ["policy", "mean", "of full", "difference", "tokens read", "effective stride", "samples a task"]
        lines += [f"## {length} tokens", "", *markdown_table(heading, body), ""]
        body = [[f"`{text}`", *_by_task(results, length, text)] for text in results.policies]
        lines += [*markdown_table(["policy", *results.tasks], [row for row in body if set(row[1:]) != {"-"}]), ""]
    return "\n".join(lines)


def _by_task(results: Results, length: int, text: str) -> list[str]:
    cells = []
    for task in results.tasks:
        cell = results.scores.get((length, text, task))
        mean, error = mean_and_error(list(cell.values())) if cell else (math.nan, math.nan)
        cells.append("-" if not cell else f"{mean:.1f}" if math.isnan(error) else f"{mean:.1f} ± {error:.1f}")
    return cells


def _rows(path: Path) -> list[Row]:
    openers = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with openers.get(path.suffix, open)(path, "rb") as file:
            rows = [json.loads(line) for line in file.read().split(b"\n") if line.strip()]
    except (OSError, EOFError, lzma.LZMAError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    fields = {"policy", "task", "length", "index", "score", "steps", "full_steps"}
    if not all(isinstance(row, dict) and fields <= row.keys() for row in rows):
        raise ValueError(f"{path}: holds rows that eval.ruler does not write")
    return rows
