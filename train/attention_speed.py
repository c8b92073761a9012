"""Time and memory of one layer's attention in training, recycled against dense: `python -m train.attention_speed`.

Runs the forward and backward pass of the attention, with the recomputation that `train.continued_pretrain` does, on
random queries, keys and values. Memory is what the compiled program allocates in addition to its inputs and outputs.
Writes OUT/training_attention.jsonl.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax.commands import command_line, files, json_lines, measuring
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    import jax

FORMS = ("dense", "cudnn", "strided", "paper")
Implementation = Literal["auto", "reference", "cudnn", "pallas"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure one layer's attention in training. The default heads are those of Llama-3.2-1B."""

    lengths: str = "4096,8192,16384,32768"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    batch_size: int = 1
    stride: int = 50
    budget: int = 2048
    """Keys that a selection keeps; capped at a quarter of the length."""
    forms: str = "dense,cudnn,strided,paper"
    """Comma-separated: dense (plain JAX, in blocks), cudnn (GPU), strided, paper."""
    implementation: Implementation = "auto"
    """Of strided and paper; values as in `train.continued_pretrain --attention`."""
    repeats: int = 3
    profile: bool = False
    """GPU: also record each kernel's time."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    out: Path = Path("results/training_attention")


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m train.attention_speed", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    from recyc_jax.commands import backends

    lengths = command_line.lengths(config.lengths)
    check_forms(config.forms)
    command_line.check_counts(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        batch_size=config.batch_size,
        stride=config.stride,
        budget=config.budget,
        repeats=config.repeats,
    )
    if config.heads % config.kv_heads:
        raise ValueError(f"--heads {config.heads} is no multiple of --kv-heads {config.kv_heads}")
    if config.stride >= min(lengths):
        raise ValueError(f"--stride {config.stride} leaves no context of --lengths {min(lengths)}")
    backends.select(config.backend)
    forms = usable_forms(config.forms, config.dtype)
    check_profile(config.profile)
    implementation = recycles_by(config.implementation, config.dtype, config.head_dim)
    files.writable_folder("--out", config.out)
    return lambda: _measure(config, lengths, forms, implementation)


def _measure(config: Config, lengths: list[int], forms: list[str], implementation: str) -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    file = config.out / "training_attention.jsonl"
    device = jax.devices()[0]
    table = Table(title=f"a layer's attention in training, {device.device_kind}")
    for name in ("length", "form", "ms forward", "ms with backward", "GiB beside in- and outputs"):
        table.add_column(name, justify="right")
    with json_lines.appending(file) as add:
        for length in lengths:
            for form in forms:
                command_line.heed_interrupt()
                row = _row(config, length, form, implementation)
                add(row | {"device": device.device_kind, "jax": jax.__version__})
                values = (row["forward_ms"], row["step_ms"], row["temp_gib"])
                print(
                    f"{length} {form}: {values[0]} ms forward, {values[1]} ms with backward, {values[2]} GiB",
                    flush=True,
                )
                if "kernels" in row:
                    print(measuring.describe_profile(row["kernels"]), flush=True)
                table.add_row(str(length), form, *map(str, values))
    Console().print(table)
    print(f"{file} holds the results")


def form_of(form: str, length: int, stride: int, budget: int, implementation: str) -> Callable[..., jax.Array]:
    """The attention function (q, k, v) -> out of the form of that name; recycled forms use `implementation`."""
    from recyc_jax import training_implementations
    from recyc_jax.attention.whole_sequence import Recycle

    if form in ("dense", "cudnn"):
        attend = training_implementations.attention({"dense": "reference", "cudnn": "cudnn"}[form], None)
    else:
        recycle = Recycle(1, stride, budget) if form == "strided" else Recycle(length - stride, stride + 1, budget)
        attend = training_implementations.attention(implementation, recycle)
    return lambda q, k, v: attend(q, k, v, None)


def recycles_by(implementation: str, dtype: str, head_dim: int) -> str:
    """The implementation of the recycled forms. Raises ValueError if this device cannot run it."""
    from recyc_jax import training_implementations

    return training_implementations.choose(
        "--implementation", implementation, True, command_line.dtype_name(dtype), head_dim, False
    )


def usable_forms(text: str, dtype: str) -> list[str]:
    """The forms that --forms names, without those that need a GPU where there is none. Raises ValueError for a dtype
    that a form does not support."""
    import jax

    forms = command_line.split("--forms", text)
    if "cudnn" in forms and jax.default_backend() != "gpu":
        print("cudnn is left out: it needs a GPU", flush=True)
        forms.remove("cudnn")
    if "cudnn" in forms and command_line.dtype_name(dtype) == "float32":
        raise ValueError("--dtype float32: the form cudnn needs bfloat16; leave it out of --forms")
    return forms


def check_profile(asked: bool) -> None:
    """Raise ValueError if a profile is asked for and JAX does not run on a GPU."""
    import jax

    if asked and jax.default_backend() != "gpu":
        raise ValueError(f"--profile reads a GPU's profile; JAX runs on {jax.default_backend()}")


def check_forms(text: str) -> None:
    """Raise ValueError for an unknown form."""
    for form in command_line.split("--forms", text):
        if form not in FORMS:
            raise ValueError(f"--forms: {form!r} is unknown; there is {', '.join(FORMS)}")


def _row(config: Config, length: int, form: str, implementation: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    budget = min(config.budget, length // 4)
    attend = form_of(form, length, config.stride, budget, implementation)
    dtype = jnp.dtype(command_line.dtype_name(config.dtype))
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(config.batch_size, length, count, config.head_dim) for count in (config.heads, *2 * [config.kv_heads])]
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    weights = jax.random.normal(keys[3], shapes[0], dtype)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum((attend(q, k, v) * weights).astype(jnp.float32))

    forward = jax.jit(attend).lower(q, k, v).compile()
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    memory = step.memory_analysis()
    kernels = measuring.profile(lambda: step(q, k, v)) if config.profile else []
    return {
        "length": length,
        "form": form,
        "implementation": {"dense": "reference", "cudnn": "cudnn"}.get(form, implementation),
        "batch_size": config.batch_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "stride": config.stride,
        "budget": budget,
        "dtype": str(dtype),
        "forward_ms": round(measuring.median_ms(lambda: forward(q, k, v), config.repeats), 3),
        "step_ms": round(measuring.median_ms(lambda: step(q, k, v), config.repeats), 3),
        "temp_gib": None if memory is None else round(memory.temp_size_in_bytes / 2**30, 3),
        **({"kernels": kernels} if kernels else {}),
    }


if __name__ == "__main__":
    sys.exit(main())
