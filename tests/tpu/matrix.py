"""The whole matrix, a JSON line a program, and the table of docs/results/tpu.md: hours of one core. It goes on where it
was stopped.

    JAX_PLATFORMS=cpu python tests/tpu/matrix.py docs/results/tpu_aot.jsonl
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import aot


def programs() -> list[tuple]:
    """(machine, model, program, length, batch, layers)"""
    wanted = []
    for model, machine in (
        ("llama-3.2-1b", "v5e"),
        ("llama-3.2-1b", "v6e"),
        ("llama-3.1-8b", "v5e 2x4"),
        ("llama-3.1-8b", "v6e 2x2"),
        ("llama-3.1-70b", "v5p 4x4x4"),
    ):
        batch = aot.MACHINES[machine].data
        for length in (32768, 131072):
            wanted += [(machine, model, name, length, batch, 2) for name in ("prefill", *aot.POLICIES)]
    for model, machine in (
        ("llama-3.2-1b", "v5e 2x4, training"),
        ("llama-3.2-1b", "v6e 2x2, training"),
        ("llama-3.1-8b", "v5e 2x4, training"),
        ("llama-3.1-70b", "v5p 4x4x4, training"),
    ):
        wanted += [(machine, model, form, 8192, 1, 0) for form in ("paper", "strided")]
    return wanted


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
        except Exception as error:  # what the compiler refuses is a result too
            row = {"fault": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        with out.open("a") as file:
            file.write(json.dumps({"asked": asked} | row) + "\n")
        print(asked, row.get("peak"), row.get("fault", ""), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
