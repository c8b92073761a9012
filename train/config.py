"""The flags of `python -m train.continued_pretrain`, presets and config files, and the checks that need only flags."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recyc_jax.commands import command_line, files
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    from recyc_jax.attention.whole_sequence import Recycle

PRESETS = Path(__file__).parent / "presets"


@dataclasses.dataclass(frozen=True)
class Config:
    """Continue pretraining with recycled attention active.

    --preset NAME (available: paper) and --config FILE (a YAML file with these names) set several flags at once; flags
    on the command line override them."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    data: str = "novels,essays,latex"
    """Comma-separated: novels, essays, latex (texts of Debian packages); NAME=PATH or NAME=PATH:COLUMN (a text,
    JSON-lines or parquet file, or a folder of them); NAME=glob:PATTERN; NAME=DATASET or
    NAME=DATASET:CONFIG:SPLIT:COLUMN on the hub."""
    out: Path = Path("results/continued_pretrain")
    """Output folder; a run resumes from checkpoints of the same configuration in it, to more --steps too."""

    recycle: Literal["paper", "strided", "off"] = "paper"
    """paper: the last STRIDE tokens of a row attend to the BUDGET keys that the token before them selects, and to one
    another. strided: every STRIDE-th token attends to everything before it and selects keys for the tokens after it.
    off: ordinary training."""
    stride: int = 50
    budget: int | float = 0.125
    """Keys that a selection keeps: a count, or (with a decimal point) a fraction of --length."""
    pool: int = 7
    lookahead: int = 0
    evict: bool = False
    """strided: each new token replaces the lowest-ranked key, as in decoding."""
    dense_prefix: int = 1
    """strided: the first token that selects, counted from 1; the tokens before it attend causally."""
    length: int = 512
    """Tokens per row."""
    pack: bool = True
    """Only with --recycle off: fill rows with several documents, EOS between them, distinguished in attention,
    positions and loss; --no-pack: one document per row, as the recycled forms always have it."""

    batch_size: int = 4
    """Rows per step, over all devices."""
    accumulate: int = 1
    """Gradient accumulation: parts of a step's batch, computed one after the other."""
    steps: int = 16
    """Training steps; 0: as many as EPOCHS takes."""
    epochs: float = 1.0
    learning_rate: float | None = None
    """Default: 2e-5 for AdamW. Adafactor's rate is relative: an update's size is the rate times the root mean square of
    the parameter; default: 1e-3."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of AdamW's first moment."""
    z_loss: float = 0.0
    max_bad_steps: int = 5
    """Training ends after this many steps in a row without a finite loss and gradients; such steps change nothing."""
    seed: int = 42

    held_out: float = 0.1
    """Fraction of each domain's tokens, in whole documents, held out for evaluation; 0: no evaluation."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    eval_policies: tuple[str, ...] = ("full", "recycled:budget=0.125,stride=10", "snapkv:budget=0.125")
    """Decoding policies, separated by spaces."""
    eval_lengths: tuple[int, ...] = ()
    """Tokens per evaluation window, one or more numbers; default: LENGTH. Shorter windows are the ends of the longest,
    so the same tokens are measured with less context."""
    eval_new_tokens: tuple[int, ...] = (50,)
    """Last tokens of each window, decoded one at a time, that perplexity is measured on; one or more numbers."""
    eval_sequences: int = 8
    """Windows per domain."""
    eval_batch_size: int = 8

    save_every: int = 0
    """Steps between checkpoints; 0: only --save-minutes counts. The last step is always saved. A checkpoint takes 12
    bytes a parameter with AdamW."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; 0: only --save-every counts."""
    keep: int = 3
    """Checkpoints to keep."""
    export: bool = True
    """Write the trained model to OUT/model in Hugging Face layout, in --export-dtype."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    log_every: int = 10
    """Steps between progress lines if the output is not a terminal."""
    tensorboard: bool = False
    """Also write OUT/tensorboard (needs tensorboardX)."""
    wandb: str | None = None
    """Also log to this W&B project (needs wandb)."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; parameters stay float32. auto: bfloat16 on accelerators, float32 on CPU."""
    remat: Literal["full", "dots", "none"] = "full"
    """Recomputed in the backward pass: full: all but attention; dots: all but attention and matrix products; none."""
    attention: Literal["auto", "reference", "cudnn", "pallas"] = "auto"
    """reference: plain JAX. cudnn: cuDNN's causal attention; recycled forms in plain JAX. pallas: cuDNN's causal
    attention; recycled forms in our kernels. auto: the last of these that GPU, dtype and rows allow."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are split over."""
    tensor: int = 1
    """Devices that heads and features are split over. The batch is split over all other devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for runs of several processes."""
    processes: int | None = None
    process_id: int | None = None
    cluster: bool = False
    """Several processes, found through the cluster's settings (Slurm, TPU pods)."""
    backend: Backend = "auto"
    deterministic: bool = False
    """GPU: use only kernels that give the same bits each time, so that a resumed run does too."""

    dry_run: bool = False
    """Print mesh, sizes and memory, and end before arrays are allocated."""
    force: bool = False
    """Resume from checkpoints of another model, other data, another recycled form or other settings of the optimizer;
    each difference is printed. Shapes and dtypes of parameters must be the same all the same."""
    allow_beyond_context: bool = False
    """Allow lengths beyond the model's context length."""


def with_files(arguments: list[str]) -> list[str]:
    """The arguments with --preset and --config replaced by the flags that their files set, placed before all others:
    settings from a file are parsed and checked like flags, and flags given on the command line override them."""
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
    """The settings of a preset or a config file. Raises ValueError that says what is wrong with the file."""
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
    if values.get("recycle") is False:  # YAML reads `off` as False
        values["recycle"] = "off"
    return values


def check(config: Config) -> None:
    """Raise ValueError, naming the flag, for errors that can be found from flags alone."""
    command_line.check_counts(
        length=config.length,
        stride=config.stride,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        keep=config.keep,
        max_bad_steps=config.max_bad_steps,
        fsdp=config.fsdp,
        tensor=config.tensor,
        dense_prefix=config.dense_prefix,
        eval_sequences=config.eval_sequences,
        eval_batch_size=config.eval_batch_size,
        log_every=config.log_every,
    )
    for name, value in (
        ("warmup-steps", config.warmup_steps),
        ("save-every", config.save_every),
        ("eval-every", config.eval_every),
        ("steps", config.steps),
    ):
        if value < 0:
            raise ValueError(f"--{name} {value} must not be negative")
    for name, number in (
        ("learning-rate", learning_rate(config)),
        ("save-minutes", config.save_minutes),
        ("weight-decay", config.weight_decay),
        ("clip", config.clip),
        ("z-loss", config.z_loss),
        ("epochs", config.epochs),
    ):
        if not 0 <= number < float("inf"):
            raise ValueError(f"--{name} {number} must be a number of at least 0")
    if config.steps and config.epochs != 1:
        raise ValueError(f"--epochs {config.epochs} needs --steps 0: --steps {config.steps} says how many to take")
    if config.optimizer == "adafactor" and config.weight_decay:
        raise ValueError(f"--weight-decay {config.weight_decay} goes with --optimizer adamw alone")
    if not 0 <= config.held_out < 1:
        raise ValueError(f"--held-out {config.held_out} must lie in 0..1")
    if config.length < 2:
        raise ValueError(f"--length {config.length} must be at least 2: a row's first token predicts the second")
    recycle_of(config)
    if config.held_out:
        lengths = eval_lengths(config)
        command_line.check_policies(config.eval_policies, lengths)
        if not config.eval_new_tokens or min(config.eval_new_tokens) < 1:
            raise ValueError("--eval-new-tokens must be one number of at least 1, or several")
        if max(config.eval_new_tokens) >= min(lengths):
            raise ValueError(
                f"--eval-new-tokens {max(config.eval_new_tokens)} leaves no context of --eval-lengths {min(lengths)}"
            )
    if config.batch_size % config.accumulate:
        raise ValueError(f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}")
    given = [value is not None for value in (config.coordinator, config.processes, config.process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process-id belong together")
    for flag, library in ((config.tensorboard, "tensorboardX"), (config.wandb is not None, "wandb")):
        if flag and not _installed(library):
            raise ValueError(f"--{library.lower().rstrip('x')} needs the package {library}: pip install {library}")
    files.writable_folder("--out", config.out)
    from recyc_jax.loading import export

    model = config.out / "model"
    try:
        strange = config.export and model.exists() and not export.may_replace(model)
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}") from None
    if strange:
        raise ValueError(f"--out {config.out}: {model} holds something else than a model, which --export would replace")


def learning_rate(config: Config) -> float:
    """The highest learning rate: the one given, or the optimizer's default."""
    if config.learning_rate is not None:
        return config.learning_rate
    return {"adamw": 2e-5, "adafactor": 1e-3}[config.optimizer]


def _installed(library: str) -> bool:
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError:
        return False
    return True


def eval_lengths(config: Config) -> list[int]:
    """The lengths of evaluation windows, longest first."""
    return sorted(set(config.eval_lengths or (config.length,)), reverse=True)


def recycle_of(config: Config) -> Recycle | None:
    """The form that --recycle names; None for ordinary training. Raises ValueError for settings that do not fit the
    form or --length."""
    from recyc_jax import FixedStride, RecycledAttention
    from recyc_jax.attention.whole_sequence import Recycle

    if config.recycle == "off":
        return None
    budget = config.budget
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"--budget {budget}: a fraction must lie in 0..1; a count has no point")
        budget = max(1, int(budget * config.length))
    # making the policy checks its arguments
    policy = RecycledAttention(budget, FixedStride(config.stride), config.pool, config.lookahead, config.evict)
    selection = policy.budget, policy.pool, config.lookahead
    if config.recycle == "strided":
        if config.dense_prefix >= config.length:
            raise ValueError(f"--dense-prefix {config.dense_prefix} leaves nothing of --length {config.length}")
        return Recycle(config.dense_prefix, config.stride, *selection, evict=config.evict)
    if config.evict or config.dense_prefix != 1:
        raise ValueError("--evict and --dense-prefix belong to --recycle strided; the paper's form has neither")
    if config.stride >= config.length:
        raise ValueError(f"--stride {config.stride} leaves no context of --length {config.length}")
    return Recycle(config.length - config.stride, config.stride + 1, *selection)
