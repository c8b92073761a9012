"""Continue the training of a Llama-family checkpoint with recycled attention active: `python -m train.continued_pretrain`.

Without flags it continues SmolLM2 on freely packaged texts in a short run; `--preset paper` is the paper's recipe
(section 5). A run can be killed at any moment and goes on from its last checkpoint with the same command. Writes to OUT:
checkpoints/, metrics.jsonl, loss.png and model/, the result in Hugging Face layout.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from eval import command
from eval.backend import Backend

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class Config:
    """Continue pretraining with recycled attention active.

    Before these flags come --preset NAME (there is: paper) and --config FILE, a YAML file of the same names; flags given
    beside them win.
    """

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    data: str = "novels,essays,latex"
    """Comma-separated: novels, essays, latex (texts of Debian packages), NAME=PATH (a text, JSON-lines or parquet file, or
    a folder of texts), NAME=DATASET or NAME=DATASET:CONFIG:SPLIT on the hub."""
    out: Path = Path("results/continued_pretrain")
    """A folder; one that holds checkpoints of the same configuration is gone on with."""

    recycle: Literal["paper", "strided", "off"] = "paper"
    """paper: the last STRIDE tokens of a row attend to the BUDGET keys that the token before them selects, and to one
    another. strided: every STRIDE-th token attends to everything and selects for those after it. off: ordinary training."""
    stride: int = 50
    budget: int | float = 0.125
    """Keys that a selection keeps: a count, or with a point a fraction of --length."""
    pool: int = 7
    lookahead: int = 0
    evict: bool = False
    """strided: each new token takes the place of the lowest-ranked key, as in decoding."""
    dense_prefix: int = 1
    """strided: the first token that selects; those before it attend causally."""
    length: int = 512
    """Tokens of a row."""
    pack: bool = True
    """off: fill rows with several documents, told apart. The recycled forms take one document a row."""

    batch_size: int = 4
    """Rows of a step, over all devices."""
    accumulate: int = 1
    """Parts that a step's batch is worked on in, one after the other."""
    steps: int = 16
    """Steps to take; 0: those of EPOCHS."""
    epochs: float = 1.0
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    """The gradient's largest norm; 0 leaves it."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """AdamW's first moment."""
    z_loss: float = 0.0
    max_bad_steps: int = 5
    """Give up after so many steps in a row whose loss or gradients are not finite; such a step changes nothing."""
    seed: int = 42

    held_out: float = 0.1
    """The share of each domain's tokens, in whole documents, that is kept for evaluation; 0 for no evaluation."""
    eval_every: int = 0
    """Steps between evaluations; 0: before the first step and after the last one."""
    eval_policies: tuple[str, ...] = ("full", "recycled:budget=0.125,stride=10", "snapkv:budget=0.125")
    """Policies of decoding, separated by spaces."""
    eval_lengths: tuple[int, ...] = ()
    """Tokens of an evaluated window, or several numbers; unset, LENGTH. Shorter windows are the ends of the longest, so the
    same tokens are measured with less before them."""
    eval_new_tokens: tuple[int, ...] = (50,)
    """The last tokens of each, decoded one at a time: what perplexity is measured on. Or several numbers."""
    eval_sequences: int = 8
    """Windows of each domain."""
    eval_batch_size: int = 8

    save_every: int = 5
    keep: int = 3
    """Checkpoints to keep."""
    export: bool = True
    """Write the result to OUT/model in Hugging Face layout, in --export-dtype."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    log_every: int = 10
    """Steps between lines where the output is no terminal."""
    tensorboard: bool = False
    """Also write OUT/tensorboard (needs tensorboardX)."""
    wandb: str | None = None
    """Also log to this W&B project (needs wandb)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; parameters and optimizer stay float32. auto: bfloat16 on accelerators, float32 on CPU."""
    remat: Literal["full", "dots", "none"] = "full"
    """Computed again for the gradient: a layer but for its attention; but for its matrix products too; or nothing."""
    attention: Literal["auto", "reference", "cudnn", "pallas"] = "auto"
    """reference: plain JAX. cudnn: cuDNN's causal attention, recycled in plain JAX. pallas: cuDNN's, recycled by kernels.
    auto: the last of these that GPU, dtype and rows allow."""
    fsdp: int = 1
    """Devices that parameters are split over."""
    tensor: int = 1
    """Devices that heads and features are split over; the others share the batch."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes."""
    processes: int | None = None
    process_id: int | None = None
    cluster: bool = False
    """Several processes that a cluster's own settings tell of (Slurm, TPU pods)."""
    backend: Backend = "auto"
    deterministic: bool = False
    """GPU: only kernels that give the same bits each time, so that a resumed run does."""

    dry_run: bool = False
    """Print mesh, sizes and memory, and end before anything is allocated."""
    force: bool = False
    """Go on with checkpoints of another model, data or settings."""
    allow_beyond_context: bool = False
    """Allow lengths beyond the model's context."""


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        arguments = _with_files(sys.argv[1:] if args is None else args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = tyro.cli(Config, prog="python -m train.continued_pretrain", args=arguments)
    status = 0

    def prepare(config: Config) -> Callable[[], None]:
        go = _prepare(config)

        def run() -> None:
            nonlocal status
            status = go()

        return run

    # the loop has its own way to be interrupted; this is for the time before it
    return command.run(prepare, config, "nothing was trained yet") or status


def _with_files(arguments: list[str]) -> list[str]:
    """The arguments with --preset and --config replaced by the flags that those files stand for, ahead of all others:
    what a file says is read and checked as a flag is, and a flag given beside it wins."""
    rest: list[str] = []
    values: dict[str, Any] = {}
    left = iter(arguments)
    for argument in left:
        name, given, value = argument.partition("=")
        if name in ("--preset", "--config"):
            values |= _read(name, value if given else next(left, ""))
        else:
            rest.append(argument)
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return flags + rest


def _read(name: str, value: str) -> dict[str, Any]:
    """The settings of a preset or a file. Raises ValueError naming what is wrong with it."""
    import yaml

    path = PRESETS / f"{value}.yaml" if name == "--preset" else Path(value)
    if not path.is_file():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.yaml")))
        raise ValueError(f"{name} {value!r}: " + (f"there is {known}" if name == "--preset" else "no such file"))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold names and values")
    values = {str(key).replace("-", "_"): value for key, value in values.items() if value is not None}
    for key in values.keys() - {field.name for field in dataclasses.fields(Config)}:
        raise ValueError(f"{path}: {key!r} is no setting")
    if values.get("recycle") is False:  # YAML's off
        values["recycle"] = "off"
    return values


def _prepare(config: Config) -> Callable[[], int]:
    """Everything up to and including the loading of weights; what is left to do is returned."""
    from train import plan

    plan.check(config)
    if config.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    plan.connect(config)
    made = plan.make(config)
    if config.dry_run:
        return lambda: plan.describe(made)
    return plan.open_run(made)


if __name__ == "__main__":
    sys.exit(main())
