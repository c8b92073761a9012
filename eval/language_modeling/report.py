"""The results of a language-modelling run: tables on the terminal, summary.json, a plot and a Markdown report."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.tables import letters, markdown_legend, markdown_table, number, ordered, print_table
from recyc_jax.commands import numbers
from recyc_jax.commands.files import write_text
from recyc_jax.commands.plotting import plot
from recyc_jax.commands.run_log import Row

Summary = list[dict[str, Any]]


def summarise(rows: Sequence[Row], policies: Sequence[str]) -> Summary:
    """One row per length, domain and policy, in this order.

    `nll` is the mean over sequences of the mean negative log-probability of their tokens, in nats per token, with its
    standard error over sequences; `perplexity` is its exponential. `difference` is `nll` minus that of full attention
    on the same sequences, with its paired standard error: 0.01 is 1% more perplexity.
    """
    cells: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["length"], row["domain"], row["policy"]), []).append(row)
    domains = ordered(rows, "domain")
    summary = []
    for key in sorted(cells, key=lambda key: (key[0], domains.index(key[1]), policies.index(key[2]))):
        (length, domain, policy), cell = key, cells[key]
        nll, error = _mean_and_error([_loss(row) for row in cell])
        full = {row["index"]: _loss(row) for row in cells.get((length, domain, "full"), [])}
        gaps = [_loss(row) - full[row["index"]] for row in cell if row["index"] in full]
        gap, gap_error = _mean_and_error(gaps) if gaps else (math.nan, math.nan)
        full_steps = sum(row["full_steps"] for row in cell)
        summary.append(
            {
                "policy": policy,
                "domain": domain,
                "length": length,
                "perplexity": numbers.finite(numbers.perplexity(nll), 3),
                "n": len(cell),
                "nll": numbers.finite(nll, 5),
                "nll_stderr": number(error, 5),
                "difference": number(gap, 5),
                "difference_stderr": number(gap_error, 5),
                "effective_stride": number(sum(row["steps"] for row in cell) / full_steps if full_steps else math.nan),
                "seconds": round(sum(row["seconds"] for row in cell), 2),
            }
        )
    return summary


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _loss(row: Row) -> float:
    """A sequence's loss; infinite where it was not finite, which JSON does not have."""
    return math.inf if row["nll"] is None else row["nll"]


def grid(summary: Summary, length: int) -> tuple[list[str], dict[str, str], list[list[str]]]:
    """The domains and the policies (with their letters) at one length, and the rows of its table: one row per policy
    with, for each domain, the perplexity and the paired difference from full attention with its 95% interval (in
    thousandths of a nat), and the effective stride."""
    at_length = [row for row in summary if row["length"] == length]
    domains, policies = ordered(at_length, "domain"), ordered(at_length, "policy")
    named = letters(policies)
    cells = {(row["policy"], row["domain"]): row for row in at_length}
    body = []
    for policy in policies:
        line = [named[policy]]
        for domain in domains:
            row = cells.get((policy, domain))
            line += ["-", "-"] if row is None else [numbers.shown(row["perplexity"], 2), _difference(row)]
        strides = [row["effective_stride"] for row in at_length if row["policy"] == policy]
        known = [stride for stride in strides if stride is not None]
        line.append(f"{statistics.harmonic_mean(known):.1f}" if len(known) == len(strides) else "-")
        body.append(line)
    return domains, named, body


def _difference(row: Mapping[str, Any]) -> str:
    if row["difference"] is None or row["policy"] == "full":
        return "-"
    interval = "" if row["difference_stderr"] is None else f" ± {1960 * row['difference_stderr']:.1f}"
    return f"{1000 * row['difference']:+.1f}{interval}"


def print_tables(summary: Summary) -> None:
    """Print one table per length."""
    for length in ordered(summary, "length"):
        domains, named, body = grid(summary, length)
        title = f"perplexity at {length} tokens; difference from full attention in 0.001 nats, 95% interval"
        heading = ["policy", *(name for domain in domains for name in (domain, "difference")), "effective stride"]
        print_table(title, heading, body, named)


def write(
    folder: Path, summary: Summary, facts: Mapping[str, str], budgets: Sequence[str], notes: Sequence[str]
) -> Path:
    """Write summary.json, plot.png and report.md to `folder`; returns the path of the report."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    lines = ["# Perplexity", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for note in notes:
        lines += [f"> {note}", ""]
    lines += [
        "Differences from full attention are paired, sequence by sequence, in thousandths of a nat a token with 95%"
    ]
    lines += ["intervals: +10 is 1% more perplexity. The effective stride is decode steps per full step.", ""]
    for length in ordered(summary, "length"):
        domains, named, body = grid(summary, length)
        counts = ", ".join(
            f"{domain} {max(row['n'] for row in summary if (row['length'], row['domain']) == (length, domain))}"
            for domain in domains
        )
        heading = ["policy", *(name for domain in domains for name in (domain, "difference")), "effective stride"]
        lines += [f"## {length} tokens", "", f"Sequences: {counts}.", "", *markdown_table(heading, body), ""]
        lines += [*markdown_legend(named), ""]
    lines += ["## Budgets", "", *(f"- {budget}" for budget in budgets), "", "![perplexity](plot.png)", ""]
    report = folder / "report.md"
    write_text(report, "\n".join(lines) + "\n")
    _plot(folder / "plot.png", summary)
    return report


@plot
def _plot(path: Path, summary: Summary) -> None:
    """Plot by how many percent each policy exceeds full attention's perplexity, one panel per length; if full attention
    was not run, plot perplexities."""
    from matplotlib.figure import Figure

    lengths, policies, domains = (ordered(summary, name) for name in ("length", "policy", "domain"))
    has_full = any(row["difference"] is not None for row in summary)
    shown = [policy for policy in policies if policy != "full"] if has_full and len(policies) > 1 else policies
    figure = Figure(figsize=(8, 1 + 0.32 * len(shown) * len(lengths) + 0.8 * len(lengths)), layout="constrained")
    height = 0.8 / len(domains)
    for axes, length in zip(figure.subplots(len(lengths), 1, squeeze=False)[:, 0], lengths, strict=True):
        cells = {(row["policy"], row["domain"]): row for row in summary if row["length"] == length}
        for number_, domain in enumerate(domains):
            values, errors = [], []
            for policy in shown:
                row = cells.get((policy, domain))
                relative = row is not None and has_full and row["difference"] is not None
                values.append(
                    100 * math.expm1(row["difference"]) if row and relative else row["perplexity"] or 0 if row else 0
                )
                errors.append(196 * (row["difference_stderr"] or 0) if row and relative else 0)
            at = [place + number_ * height for place in range(len(shown))]
            axes.barh(at, values, height, xerr=errors, label=domain)
        axes.set_yticks([place + 0.4 - height / 2 for place in range(len(shown))], shown, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(f"{length} tokens", fontsize=9)
        axes.set_xlabel("more perplexity than full attention, percent" if has_full else "perplexity")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
