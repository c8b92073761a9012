"""Compiles all programs, writes a JSON line per program, and prints the table of docs/results/tpu.md. Takes hours on
one core; an interrupted run resumes.

    JAX_PLATFORMS=cpu python tests/tpu/matrix.py docs/results/tpu_aot.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import aot


def programs() -> list[tuple]:
    """The programs to compile, as (machine, model, program, length, batch, layers)."""
    wanted = []
    for model, machine in (
        ("llama-3.2-1b", "v5e"),
        ("llama-3.2-1b", "v6e"),
        ("llama-3.1-8b", "v5e 2x4"),
        ("llama-3.1-8b", "v6e 2x2"),
        ("llama-3.1-70b", "v5p 4x4x4"),
        ("qwen3-8b", "v6e 2x2"),
        ("gemma-3-12b", "v6e 2x2"),
    ):
        batch = aot.MACHINES[machine].data
        for length in (32768, 131072):
            wanted += [(machine, model, name, length, batch, 2) for name in ("prefill", *aot.POLICIES)]
    for model, machine in (
        ("llama-3.2-1b", "v5e 2x4, training"),
        ("llama-3.2-1b", "v6e 2x2, training"),
        ("llama-3.1-8b", "v5e 2x4, training"),
        ("llama-3.1-8b", "v5e 4x4, training"),
        ("llama-3.1-70b", "v5p 4x4x4, training"),
    ):
        wanted += [(machine, model, form, 8192, 1, 0) for form in ("paper", "strided")]
    return wanted


def table(out: Path) -> str:
    """The rows as a Markdown table; faults are checked again."""
    head = (
        "model",
        "chips",
        "program",
        "length",
        "batch",
        "peak GiB a chip",
        "temporaries MiB",
        "collectives",
        "fault",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    fields = {field.name for field in dataclasses.fields(aot.Report)}
    for line in out.read_text().splitlines():
        row = json.loads(line)
        machine, model, program, length, batch, _ = row["asked"]
        kind = "training, " if "training" in machine else ""
        start = f"| {model} | {machine.removesuffix(', training')} | {kind}{program} | {length} | {batch} "
        if "peak" not in row:
            lines.append(f"{start}| - | - | - | {row['fault']} |")
            continue
        report = aot.Report(**{name: value for name, value in row.items() if name in fields})
        try:
            report.check(aot.MACHINES[machine])
            fault = ""
        except AssertionError as error:
            fault = str(error)
        collectives = ", ".join(f"{count} {name}" for name, count in report.collectives.items())
        lines.append(f"{start}| {report.peak():.2f} | {report.temporary / 2**20:.0f} | {collectives} | {fault} |")
    return "\n".join(lines)


def main(out: Path) -> int:
    done = {tuple(json.loads(line)["asked"]) for line in out.read_text().splitlines()} if out.exists() else set()
    for asked in programs():
        if asked in done:
            continue
        machine, model, program, length, batch, layers = asked
        try:
            if layers:
                report = aot.decoding(machine, model, program, length, batch=batch, layers=layers)
            else:
                report = aot.training_step(machine, model, program, length)
            row = dataclasses.asdict(report) | {"peak": round(report.peak(), 2)}
            try:
                report.check(aot.MACHINES[machine])
            except AssertionError as fault:
                row["fault"] = str(fault)
        except Exception as error:  # a compiler error is a result too
            row = {"fault": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        with out.open("a") as file:
            file.write(json.dumps({"asked": asked} | row) + "\n")
        print(asked, row.get("peak"), row.get("fault", ""), flush=True)
    print(table(out))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
