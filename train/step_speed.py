"""Time, MFU and memory of a whole training step, recycled against dense: `python -m train.step_speed`.

Runs the training step of `train.continued_pretrain` with random weights and tokens on one device: forward pass,
backward pass with recomputation, clipping, AdamW. MFU counts the operations of dense attention for every form
(`train/metrics.py`). Writes OUT/training_step.jsonl."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax.commands import command_line, files, json_lines, measuring
from recyc_jax.commands.backends import Backend
from train import attention_speed

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure training steps."""

    model: str = "llama-3.2-1b"
    """A model shape by name, or a folder with a config.json, as in `eval.speed`."""
    lengths: str = "8192,32768"
    tokens: int = 32768
    """Tokens per step: each length takes as many rows as fit into them, at least one."""
    stride: int = 50
    budget: int = 2048
    """Keys that a selection keeps; capped at a quarter of the length."""
    forms: str = "cudnn,strided"
    """Comma-separated: dense (plain JAX, in blocks), cudnn (GPU), strided, paper."""
    implementation: attention_speed.Implementation = "auto"
    """Of strided and paper; values as in `train.continued_pretrain --attention`."""
    remat: Literal["full", "dots", "none"] = "full"
    repeats: int = 3
    profile: bool = False
    """GPU: also record each kernel's time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    seed: int = 0
    out: Path = Path("results/training_step")


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m train.step_speed", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    from recyc_jax.commands import backends

    lengths = command_line.lengths(config.lengths)
    attention_speed.check_forms(config.forms)
    command_line.check_counts(tokens=config.tokens, stride=config.stride, budget=config.budget, repeats=config.repeats)
    if config.stride >= min(lengths):
        raise ValueError(f"--stride {config.stride} leaves no context of --lengths {min(lengths)}")
    from recyc_jax import shapes

    model = shapes.named_shape(config.model)
    backends.select(config.backend)
    forms = attention_speed.usable_forms(config.forms, config.dtype)
    attention_speed.check_profile(config.profile)
    implementation = attention_speed.recycles_by(config.implementation, config.dtype, model.head_dim)
    files.writable_folder("--out", config.out)
    return lambda: _measure(config, model, lengths, forms, implementation)


def _measure(config: Config, model: LlamaConfig, lengths: list[int], forms: list[str], implementation: str) -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    file, kind = config.out / "training_step.jsonl", jax.devices()[0].device_kind
    table = Table(title=f"a training step, {config.model}, {kind}")
    for name in ("length", "rows", "form", "ms", "tokens/s", "MFU", "GiB beside the state"):
        table.add_column(name, justify="right")
    with json_lines.appending(file) as add:
        for length in lengths:
            for form in forms:
                command_line.heed_interrupt()
                row = _row(config, model, length, form, implementation) | {"device": kind, "jax": jax.__version__}
                add(row)
                mfu = "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
                values = (length, row["rows"], form, row["step_ms"], row["tokens_per_s"], mfu, row["temp_gib"])
                print(f"{length} {form}: {row['step_ms']} ms a step, MFU {mfu}", flush=True)
                if "kernels" in row:
                    print(measuring.describe_profile(row["kernels"]), flush=True)
                table.add_row(*map(str, values))
    Console().print(table)
    print(f"{file} holds the results")


def _row(config: Config, model: LlamaConfig, length: int, form: str, implementation: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    import recyc_jax as rj
    from recyc_jax import sharding
    from train import forward, metrics, step
    from train.optimizer import Optimizer

    count, budget = max(1, config.tokens // length), min(config.budget, length // 4)
    attend = attention_speed.form_of(form, length, config.stride, budget, implementation)
    mesh = sharding.mesh(1, 1, 1, jax.devices()[:1])
    optimizer = Optimizer(1e-5, "constant", 0, 1, 0.1, 1.0, "adamw")
    dtype = jnp.dtype(command_line.dtype_name(config.dtype))

    def initial() -> step.TrainState:
        params = rj.init_params(model, jax.random.key(config.seed))
        return step.start(forward.stack_layers(params, model.num_hidden_layers), optimizer)

    state = jax.jit(initial)()
    tokens = jax.random.randint(jax.random.key(config.seed), (count, length), 0, model.vocab_size)
    taken = functools.partial(
        step.train_step,
        config=model,
        optimizer=optimizer,
        attention=step.attention_over(mesh, lambda q, k, v, segments: attend(q, k, v)),
        mesh=mesh,
        accumulate=1,
        compute_dtype=dtype,
        remat=config.remat,
        z_loss=0.0,
    )
    compiled = jax.jit(taken, donate_argnums=0).lower(state, {"tokens": tokens}).compile()
    memory = compiled.memory_analysis()

    def run() -> Any:
        nonlocal state
        state, numbers = compiled(state, {"tokens": tokens})
        return numbers["loss"]

    took = measuring.median_ms(run, config.repeats)
    kernels = measuring.profile(run) if config.profile else []
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    done = metrics.model_flops(model, length, count * length) / (took / 1000)
    return {
        "model": config.model,
        "length": length,
        "rows": count,
        "form": form,
        "implementation": {"dense": "reference", "cudnn": "cudnn"}.get(form, implementation),
        "stride": config.stride,
        "budget": budget,
        "remat": config.remat,
        "dtype": str(dtype),
        "step_ms": round(took, 2),
        "tokens_per_s": round(1000 * count * length / took),
        "mfu": None if peak is None else round(done / peak, 4),
        "temp_gib": None if memory is None else round(memory.temp_size_in_bytes / 2**30, 2),
        **({"kernels": kernels} if kernels else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
