"""A run's metrics: a JSON line per step and evaluation, and TensorBoard or W&B if asked for."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recyc_jax.config import LlamaConfig

Row = dict[str, Any]

PEAK_FLOPS = {  # dense bfloat16 operations per second, from the vendors' data sheets
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
    """The peak bfloat16 operations per second of a device; None for a device that is not listed (such as a CPU)."""
    for name, peak in PEAK_FLOPS.items():
        if name in device_kind:
            return peak
    return None


def model_flops(config: LlamaConfig, length: int, tokens: int) -> float:
    """Operations of a training step over `tokens` tokens in rows of `length`, forward and backward, as MFU counts them:
    six per matrix parameter and token, plus causal attention to everything, or to the window (length / 2 keys per query
    on average without one; two products of 2 * head_dim operations each, times three for forward and backward).
    Recomputation adds nothing to the count and recycling takes nothing off, so the MFU of the recycled forms can exceed
    that of the dense form."""
    heads, dim = config.num_attention_heads * config.head_dim, config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    layer = 2 * dim * heads + 2 * dim * kv + 3 * dim * config.intermediate_size
    matrices = config.num_hidden_layers * layer + config.vocab_size * dim
    full, window = len(config.full_layers), config.sliding_window or 0
    seen_in_window = length / 2 if window >= length else window - window**2 / (2 * length)
    seen = full * length / 2 + (config.num_hidden_layers - full) * seen_in_window
    attention = 12 * heads * seen
    return tokens * (6 * matrices + attention)


class Metrics:
    """Writes a run's `metrics.jsonl`, and logs to TensorBoard and W&B if asked."""

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
        """Read the rows up to `step` (-1: none) and drop later ones: the steps after a checkpoint are taken again."""
        self.rows = []
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):
                with contextlib.suppress(ValueError):  # the last line of a killed run may be truncated
                    row = json.loads(line)
                    if row["step"] <= step:
                        self.rows.append(row)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        draft.replace(self.path)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, each with `kind` and `step`; they are on disk when this returns."""
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
