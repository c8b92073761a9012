"""The plot of a run: training loss by step, and held-out loss by step and policy."""

from __future__ import annotations

import math
from pathlib import Path

from recyc_jax.commands import plotting
from train.metrics import Row


@plotting.plot
def plot(path: Path, rows: list[Row]) -> None:
    """Plot to `path` the training loss by step, and the held-out loss (mean over domains) by step and policy."""
    from matplotlib.figure import Figure

    steps = [row for row in rows if row["kind"] == "train" and row["loss"] is not None]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["step"] for row in steps], [row["loss"] for row in steps], linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("training loss, nats a token")
    several = len({(row["length"], row["new_tokens"]) for row in evaluations}) > 1
    lines: dict[str, dict[int, list[float]]] = {}
    for row in evaluations:
        label = row["policy"] + (f", last {row['new_tokens']} of {row['length']}" if several else "")
        lines.setdefault(label, {}).setdefault(row["step"], []).append(math.nan if row["nll"] is None else row["nll"])
    for label, by_step in lines.items():
        right.plot(list(by_step), [sum(nlls) / len(nlls) for nlls in by_step.values()], marker="o", label=label)
    right.set_xlabel("step")
    right.set_ylabel("held-out loss, mean over domains")
    if evaluations:
        right.legend(fontsize=7 if len(lines) < 8 else 5)
    figure.savefig(path, dpi=120)
