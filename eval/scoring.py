"""RULER's scores: substring matches of the references in the newly generated text alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def clean(prediction: str) -> str:
    """The prediction as the reference scores it: control characters become newlines, the ends are stripped."""
    return "".join("\n" if char < " " else char for char in prediction.strip()).strip()


def score(prediction: str, references: Sequence[str], metric: str) -> float:
    """The fraction of references found (`metric="all"`, with partial credit) or whether any is (`"part"`), in 0..1.

    Plain case-insensitive substrings without word boundaries, as in the reference.
    """
    found = [reference.lower() in prediction.lower() for reference in references]
    return float(any(found)) if metric == "part" else sum(found) / len(found)


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, in percent; the error of a single sample is nan."""
    mean = 100 * statistics.fmean(scores)
    if len(scores) < 2:
        return mean, math.nan
    return mean, 100 * statistics.stdev(scores) / math.sqrt(len(scores))


def paired(scores: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the difference from a baseline on the same samples, in percent."""
    return mean_and_error([score - base for score, base in zip(scores, baseline, strict=True)])


def mean_of_tasks(cells: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The plain mean of several tasks' means, and its standard error, the tasks' samples being independent."""
    means, errors = zip(*cells, strict=True)
    return statistics.fmean(means), math.sqrt(sum(error**2 for error in errors)) / len(cells)
