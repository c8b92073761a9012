"""What a run leaves behind to be read: a JSON line a step, a plot at the end, TensorBoard or W&B where asked."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recyc_jax.config import LlamaConfig

Row = dict[str, Any]

PEAK_FLOPS = {  # dense bfloat16 operations a second, from the makers' data sheets
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The device's, or None where it isn't listed (a CPU, say)."""
    for name, peak in PEAK_FLOPS.items():
        if name in device_kind:
            return peak
    return None


def model_flops(config: LlamaConfig, length: int, tokens: int) -> float:
    """Operations of a training step over `tokens` tokens in rows of `length`, forward and backward, as MFU counts them:
    six a matrix parameter and token, and causal attention to everything (T / 2 keys a query on average, two products of
    2 * H operations, three times over). What is recomputed or spared is not counted, so the recycled forms' MFU can
    exceed the dense one's."""
    heads, dim = config.num_attention_heads * config.head_dim, config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    layer = 2 * dim * heads + 2 * dim * kv + 3 * dim * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.vocab_size * dim
    attention = config.num_hidden_layers * 12 * heads * length / 2
    return tokens * (6 * matrices + attention)


class Metrics:
    """`metrics.jsonl` of a run, and the sinks that were asked for."""

    def __init__(self, folder: Path, tensorboard: bool, wandb: str | None, configuration: Row) -> None:
        self.path = folder / "metrics.jsonl"
        self.rows: list[Row] = []
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if wandb is not None:
            import wandb as library

            self._wandb = library.init(project=wandb, dir=str(folder), config=configuration)

    def resume(self, step: int) -> None:
        """Keep the rows up to `step` (-1: none): what a killed run wrote after its last checkpoint is made again."""
        self.rows = []
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):  # the last line of a killed run may be cut short
                    row = json.loads(line)
                    if row["step"] <= step:
                        self.rows.append(row)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        draft.replace(self.path)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, on disk when this returns; each has `kind` and `step`."""
        new = list(rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
            file.flush()
            os.fsync(file.fileno())
        self.rows += new
        for row in new:
            prefix = row["kind"]
            if prefix == "evaluation":
                prefix += f"/{row['domain']}/last {row['new_tokens']} of {row['length']}/{row['policy']}"
            numbers = {
                f"{prefix}/{name}": value
                for name, value in row.items()
                if isinstance(value, (int, float)) and name != "step"
            }
            if self._tensorboard is not None:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(
                        name.replace(":", "_").replace("=", "_").replace(" ", "_"), value, row["step"]
                    )
            if self._wandb is not None:
                self._wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def plot(path: Path, rows: list[Row]) -> None:
    """The loss by step, and held-out perplexity by step under each policy."""
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
        lines.setdefault(label, {}).setdefault(row["step"], []).append(row["nll"])
    for label, by_step in lines.items():
        right.plot(list(by_step), [sum(nlls) / len(nlls) for nlls in by_step.values()], marker="o", label=label)
    right.set_xlabel("step")
    right.set_ylabel("held-out loss, mean over domains")
    if evaluations:
        right.legend(fontsize=7 if len(lines) < 8 else 5)
    figure.savefig(path, dpi=120)
