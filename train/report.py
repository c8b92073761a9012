"""What continued pretraining changed, as tables: `python -m train.report results/off results/strided`.

For each run folder the first and the last evaluation of its metrics.jsonl, policy by policy, over all domains' windows:
losses in nats a token, what training changed, how much more than full attention's the loss is, before and after, and how
much more than the first run's it is after, where both measured the same windows. Errors are standard errors over windows,
of differences that of the paired ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

Losses = dict[tuple[int, int, str], list[float]]  # each window's, by length, tokens and policy
HEADINGS = ("run", "policy", "perplexity before", "after", "change, nats", "above full before", "after")
SAME = 0.01
"""Nats by which the losses of one window before training may differ between runs: by the order of a device's sums."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare evaluations before and after training."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that `train.continued_pretrain` wrote."""


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
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
    """Markdown: a table for each length and number of tokens measured. Raises ValueError for a run without a first or
    another evaluation."""
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
            perplexities = [f"{math.exp(statistics.fmean(each)):.3f}" for each in (losses, later)]
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
    """How much more a run loses after training than the first one; "-" where their windows differ."""
    before, after = (ends.get(measure, []) for ends in first)
    same = len(before) == len(losses) and all(
        math.isclose(one, other, rel_tol=0, abs_tol=SAME) for one, other in zip(before, losses, strict=True)
    )
    return _signed([mine - other for mine, other in zip(later, after, strict=True)]) if same else "-"


def _ends(run: Path) -> tuple[Losses, Losses]:
    """The first and the last evaluation."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{run}/metrics.jsonl: {error.strerror}") from None
    rows = [row for row in map(json.loads, lines) if row["kind"] == "evaluation"]
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
    # numpy's takes numbers that are not finite, as those of a run gone wrong
    error = f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.4f}{error}"


if __name__ == "__main__":
    sys.exit(main())
