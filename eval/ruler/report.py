"""The results of a RULER run: tables on the terminal, summary.json, a plot and a Markdown report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.ruler.scoring import found, mean_and_error, mean_of_tasks, paired
from eval.ruler.tasks.registry import LONG_TASKS, TASKS
from eval.tables import letters, markdown_legend, markdown_table, number, ordered, print_table
from recyc_jax.commands.files import write_text
from recyc_jax.commands.plotting import plot
from recyc_jax.commands.run_log import Row

Summary = list[dict[str, Any]]


def summarise(rows: Sequence[Row], policies: Sequence[str]) -> Summary:
    """One row per length, task and policy, in this order; scores and their standard errors are in percent.

    `difference` is the score minus that of full attention on the same samples, None if `full` was not run.
    `effective_stride` is the number of decode steps per full step, with full steps averaged over layers; None if there
    was no full step.
    """
    cells: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["task"], row["policy"]), []).append(row)
    summary = []
    order = {task: place for place, task in enumerate(TASKS)}
    for key in sorted(cells, key=lambda key: (key[0], order[key[1]], policies.index(key[2]))):
        (length, task, policy), cell = key, cells[key]
        mean, error = mean_and_error([row["score"] for row in cell])
        full = {row["index"]: row["score"] for row in cells.get((length, task, "full"), [])}
        both = [row for row in cell if row["index"] in full]
        gap, gap_error = math.nan, math.nan
        if both:
            gap, gap_error = paired([row["score"] for row in both], [full[row["index"]] for row in both])
        full_steps = sum(row["full_steps"] for row in cell)
        summary.append(
            {
                "policy": policy,
                "task": task,
                "length": length,
                "score": round(mean, 2),
                "n": len(cell),
                "stderr": number(error),
                "difference": number(gap),
                "difference_stderr": number(gap_error),
                "effective_stride": number(sum(row["steps"] for row in cell) / full_steps if full_steps else math.nan),
                "steps": sum(row["steps"] for row in cell),
                "nulls": sum(not row["prediction"] for row in cell),
                "seconds": round(sum(row["seconds"] for row in cell), 2),
                **({"by_place": _by_place(cell)} if task in LONG_TASKS else {}),
            }
        )
    return summary


PARTS = 4
"""The parts of a long answer that are scored apart."""


def _by_place(cell: Sequence[Row]) -> list[float]:
    """The percentage of references found, by quarter of the answer: in long answers, errors that accumulate show."""
    parts: list[list[bool]] = [[] for _ in range(PARTS)]
    for row in cell:
        for place, is_found in enumerate(found(row["prediction"], row["references"])):
            parts[place * PARTS // len(row["references"])].append(is_found)
    return [round(100 * statistics.fmean(part), 1) if part else math.nan for part in parts]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _grid(summary: Summary, length: int) -> tuple[dict[str, str], list[list[str]]]:
    """The policies at one length with their letters, and the rows of the table: one row per task, one column per
    policy, and the plain mean over tasks as the last row."""
    at_length = [row for row in summary if row["length"] == length]
    tasks, policies = ordered(at_length, "task"), ordered(at_length, "policy")
    cells = {(row["task"], row["policy"]): row for row in at_length}
    body = [[task, *(_cell(cells.get((task, policy))) for policy in policies)] for task in tasks]
    means = ["mean"]
    for policy in policies:
        scores = [cells[task, policy]["score"] for task in tasks if (task, policy) in cells]
        means.append(f"{statistics.fmean(scores):.1f}" if len(scores) == len(tasks) else "-")
    return letters(policies), [*body, means]


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['score']:.1f}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.1f}")


def _differences(summary: Summary, length: int) -> list[list[str]]:
    """One row per policy except full: the mean over tasks of the paired differences from full attention, its 95%
    interval, and the effective stride."""
    at_length = [row for row in summary if row["length"] == length]
    body = []
    for policy in ordered(at_length, "policy"):
        rows = [row for row in at_length if row["policy"] == policy]
        if policy == "full" or any(row["difference"] is None for row in rows):
            continue
        gap, error = mean_of_tasks([(row["difference"], _or_nan(row["difference_stderr"])) for row in rows])
        interval = "-" if math.isnan(error) else f"{gap - 1.96 * error:.1f} to {gap + 1.96 * error:.1f}"
        full_steps = sum(row["steps"] / row["effective_stride"] for row in rows if row["effective_stride"])
        stride = f"{sum(row['steps'] for row in rows) / full_steps:.1f}" if full_steps else "-"
        body.append([f"`{policy}`", f"{gap:.1f}", interval, stride])
    return body


def _places(summary: Summary, length: int) -> dict[str, list[list[str]]]:
    """For each task with long answers, the scores by place: one row per policy."""
    tables: dict[str, list[list[str]]] = {}
    for row in summary:
        if row["length"] == length and "by_place" in row:
            scores = [f"{score:.1f}" for score in row["by_place"]]
            tables.setdefault(row["task"], []).append([f"`{row['policy']}`", *scores])
    return tables


def print_tables(summary: Summary) -> None:
    """Print one table per length."""
    for length in ordered(summary, "length"):
        named, body = _grid(summary, length)
        title = f"RULER at {length} tokens: score ± standard error, percent"
        print_table(title, ["task", *named.values()], body, named, last_apart=True)


def write(
    folder: Path, summary: Summary, facts: Mapping[str, str], budgets: Sequence[str], notes: Sequence[str]
) -> Path:
    """Write summary.json, plot.png and report.md to `folder`; returns the path of the report."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    lines = ["# RULER", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for note in notes:
        lines += [f"> {note}", ""]
    lines += [
        "Scores are percent ± standard error over samples; the mean is the plain mean of the tasks. Differences from"
    ]
    lines += [
        "full attention are paired, sample by sample. The effective stride is decode steps per full step, averaged"
    ]
    lines += ["over layers.", ""]
    for length in ordered(summary, "length"):
        named, body = _grid(summary, length)
        heading = ["task", *named.values()]
        counts = sorted({row["n"] for row in summary if row["length"] == length})
        tasks = len(body) - 1
        names = {row["task"] for row in summary if row["length"] == length}
        of = "" if names & LONG_TASKS.keys() else " of 13"
        lines += [f"## {length} tokens", "", f"{tasks} tasks{of}, {' or '.join(map(str, counts))} samples each.", ""]
        lines += [*markdown_table(heading, body), "", *markdown_legend(named), ""]
        for task, places in _places(summary, length).items():
            heading = [f"{task}, by quarter of the answer", *(str(part + 1) for part in range(PARTS))]
            lines += [*markdown_table(heading, places), ""]
        differences = _differences(summary, length)
        if differences:
            heading = ["mean of the tasks", "difference from full", "95% interval", "effective stride"]
            lines += [*markdown_table(heading, differences), ""]
    lines += ["## Budgets", "", *(f"- {budget}" for budget in budgets), "", "![scores](plot.png)", ""]
    lines += ["Time spent decoding (first compilations included, prefill not), in seconds:", ""]
    for policy in ordered(summary, "policy"):
        lines.append(f"- `{policy}`: {sum(row['seconds'] for row in summary if row['policy'] == policy):.0f}")
    report = folder / "report.md"
    write_text(report, "\n".join(lines) + "\n")
    _plot(folder / "plot.png", summary)
    return report


@plot
def _plot(path: Path, summary: Summary) -> None:
    """Plot the mean score against length, one line per policy; with a single length, bars by task and policy."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    lengths, policies, tasks = (ordered(summary, name) for name in ("length", "policy", "task"))
    figure = Figure(figsize=(8, 4 + 0.18 * len(policies)), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)
    cells = {(row["policy"], row["task"], row["length"]): row for row in summary}
    if len(lengths) > 1:
        for policy in policies:
            points = []
            for length in sorted(lengths):
                found = [cells[policy, task, length]["score"] for task in tasks if (policy, task, length) in cells]
                if found:
                    points.append((length, statistics.fmean(found)))
            axes.plot(*zip(*points, strict=True), marker="o", label=policy)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(lengths), [str(length) for length in sorted(lengths)])
        axes.set_xlabel("total length, tokens")
        axes.set_ylabel(f"mean score of {len(tasks)} tasks, percent")
    else:
        width = 0.8 / len(policies)
        for place, policy in enumerate(policies):
            found = [cells.get((policy, task, lengths[0])) for task in tasks]
            axes.bar(
                [at + place * width for at in range(len(tasks))],
                [cell["score"] if cell else 0 for cell in found],
                width,
                yerr=[cell["stderr"] or 0 if cell else 0 for cell in found],
                label=policy,
            )
        axes.set_xticks([at + 0.4 - width / 2 for at in range(len(tasks))], tasks, rotation=20, ha="right")
        axes.set_ylabel(f"score at {lengths[0]} tokens, percent")
    axes.set_ylim(0, 105)
    figure.legend(loc="outside lower left", fontsize=7)
    figure.savefig(path, dpi=120)
