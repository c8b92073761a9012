"""Tables of what continued pretraining changed: `python -m train.report results/off results/strided`.

For each run folder and policy, the tables compare the first and the last evaluation in metrics.jsonl over the windows
of all domains: perplexity before and after, the change of the loss (nats per token), how far the loss is above full
attention's before and after, and how far it is above the first run's after training, if both runs measured the same
windows. Errors are standard errors over windows of the paired differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from recyc_jax.commands import json_lines, numbers

_FIELDS = {"step": int, "length": int, "new_tokens": int, "policy": str, "domain": str, "each": list}
Losses = dict[tuple[int, int, str], list[float]]  # the loss of each window, by (length, new_tokens, policy)
HEADINGS = ("run", "policy", "perplexity before", "after", "change, nats", "above full before", "after")
SAME = 0.01
"""Nats per token by which a window's loss before training may differ between runs, because devices sum in different
orders."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare evaluations before and after training."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that `train.continued_pretrain` wrote."""


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m train.report", args=args)
    try:
        if not config.runs:
            raise ValueError("name the folders of one or more runs")
        print(tables(config.runs))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def tables(runs: Sequence[Path]) -> str:
    """A Markdown table for each window length and number of measured tokens. Raises ValueError for a run without an
    evaluation before training and one after."""
    by_measure: dict[tuple[int, int], list[str]] = {}
    ends_of = {run: _ends(run) for run in runs}
    for run, (before, after) in ends_of.items():
        for (length, new_tokens, policy), losses in before.items():
            if (length, new_tokens, policy) not in after:
                raise ValueError(f"{run}: {policy} was measured before training and not after")
            later = after[length, new_tokens, policy]
            full = (length, new_tokens, "full")
            gaps = [
                _signed([mine - other for mine, other in zip(each, ends[full], strict=True)])
                if full in ends and policy != "full"
                else "-"
                for ends, each in ((before, losses), (after, later))
            ]
            change = _signed([new - old for new, old in zip(later, losses, strict=True)])
            means = [numbers.perplexity(statistics.fmean(each)) for each in (losses, later)]
            perplexities = [numbers.shown(numbers.finite(mean), 3) for mean in means]
            cells = [run.name, f"`{policy}`", *perplexities, change, *gaps]
            if len(runs) > 1:
                first = ends_of[runs[0]]
                cells.append("-" if run == runs[0] else _beside(first, (length, new_tokens, policy), losses, later))
            by_measure.setdefault((length, new_tokens), []).append(f"| {' | '.join(cells)} |")
    headings = [*HEADINGS, *([f"above {runs[0].name}, after"] if len(runs) > 1 else [])]
    head = [f"| {' | '.join(headings)} |", f"| --- | --- |{' ---: |' * (len(headings) - 2)}"]
    return "\n\n".join(
        "\n".join([f"The last {new_tokens} of {length} tokens:", "", *head, *lines])
        for (length, new_tokens), lines in sorted(by_measure.items())
    )


def _beside(
    first: tuple[Losses, Losses], measure: tuple[int, int, str], losses: list[float], later: list[float]
) -> str:
    """How far a run's loss after training is above the first run's; "-" if their windows differ."""
    before, after = (ends.get(measure, []) for ends in first)
    same = len(before) == len(losses) and all(
        math.isclose(one, other, rel_tol=0, abs_tol=SAME) for one, other in zip(before, losses, strict=True)
    )
    return _signed([mine - other for mine, other in zip(later, after, strict=True)]) if same else "-"


def _ends(run: Path) -> tuple[Losses, Losses]:
    """The losses of the first and of the last evaluation."""
    file = run / "metrics.jsonl"
    try:
        rows = [row for row in json_lines.read(file) if row.get("kind") == "evaluation"]
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    for row in rows:
        for name, kind in _FIELDS.items():
            if not isinstance(row.get(name), kind) or isinstance(row[name], bool):
                raise ValueError(f"{file}: an evaluation's {name} is {row.get(name)!r}: no metrics of training")
        if not row["each"] or not all(isinstance(loss, float | int) for loss in row["each"]):
            raise ValueError(f"{file}: an evaluation's each is {row['each']!r}: no metrics of training")
    steps = sorted({row["step"] for row in rows})
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(f"{run}: evaluations of steps {steps}; one before training and one after are needed")
    return _losses(rows, steps[0]), _losses(rows, steps[-1])


def _losses(rows: list[dict[str, Any]], step: int) -> Losses:
    found: dict[tuple[int, int, str], dict[str, list[float]]] = {}
    for row in rows:
        if row["step"] == step:  # a domain that was measured again counts once
            found.setdefault((row["length"], row["new_tokens"], row["policy"]), {})[row["domain"]] = row["each"]
    return {measure: list(itertools.chain(*domains.values())) for measure, domains in found.items()}


def _signed(values: Sequence[float]) -> str:
    # np.std, because statistics.stdev fails for the infinite or NaN losses of a diverged run
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{error}"


if __name__ == "__main__":
    sys.exit(main())
