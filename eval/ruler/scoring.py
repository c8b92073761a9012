"""RULER's scores: references found as substrings of the generated text (without the prompt)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def clean(prediction: str) -> str:
    """The prediction as NVIDIA/RULER scores it: control characters become newlines, and both ends are stripped."""
    return "".join("\n" if char < " " else char for char in prediction.strip()).strip()


def score(prediction: str, references: Sequence[str], metric: str) -> float:
    """The score in 0..1: the fraction of references found (`metric="all"`), or 1 if any is found (`"part"`).

    References match as case-insensitive substrings without word boundaries, as in NVIDIA/RULER.
    """
    there = found(prediction, references)
    return float(any(there)) if metric == "part" else sum(there) / len(there)


def found(prediction: str, references: Sequence[str]) -> list[bool]:
    """Which references are in the prediction, as `score` finds them."""
    return [reference.lower() in prediction.lower() for reference in references]


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, in percent; the error of a single sample is NaN."""
    mean = 100 * statistics.fmean(scores)
    if len(scores) < 2:
        return mean, math.nan
    return mean, 100 * statistics.stdev(scores) / math.sqrt(len(scores))


def paired(scores: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """The mean difference from a baseline on the same samples, and its standard error, in percent."""
    return mean_and_error([score - base for score, base in zip(scores, baseline, strict=True)])


def mean_of_tasks(cells: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The plain mean of the tasks' means, and its standard error, from the (mean, error) of each task. Samples of
    different tasks are independent."""
    means, errors = zip(*cells, strict=True)
    return statistics.fmean(means), math.sqrt(sum(error**2 for error in errors)) / len(cells)
