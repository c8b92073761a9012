"""Time and memory of a layer's attention in training, recycled against dense: `python -m eval.training_attention`.

One layer's attention, forward and backward with what `train.continued_pretrain` recomputes, on random queries, keys and
values; memory is what the compiled program needs beside its inputs and outputs. Writes OUT/training_attention.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from eval import command
from eval.backend import Backend


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure a layer's attention in training. The defaults are the heads of Llama-3.2-1B."""

    lengths: str = "4096,8192,16384,32768"
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    batch_size: int = 1
    stride: int = 50
    budget: int = 2048
    """Keys that a selection keeps; at most a quarter of the length is taken."""
    forms: str = "dense,cudnn,strided,paper"
    """Comma-separated: dense (in blocks, plain JAX), cudnn (GPU), strided, paper."""
    repeats: int = 3
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    out: Path = Path("results/training_attention")


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(Config, prog="python -m eval.training_attention", args=args)
    return command.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    from eval import backend

    lengths = command.lengths(config.lengths)
    forms = command.split("--forms", config.forms)
    for form in forms:
        if form not in ("dense", "cudnn", "strided", "paper"):
            raise ValueError(f"--forms: {form!r} is unknown; there is dense, cudnn, strided, paper")
    command.check_counts(
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
    backend.select(config.backend)
    import jax

    if "cudnn" in forms and jax.default_backend() != "gpu":
        print("cudnn is left out: it needs a GPU", flush=True)
        forms.remove("cudnn")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}") from None
    return lambda: _measure(config, lengths, forms)


def _measure(config: Config, lengths: list[int], forms: list[str]) -> None:
    import jax
    from rich.console import Console
    from rich.table import Table

    file = config.out / "training_attention.jsonl"
    device = jax.devices()[0]
    table = Table(title=f"a layer's attention in training, {device.device_kind}")
    for name in ("length", "form", "ms forward", "ms with backward", "GiB beside in- and outputs"):
        table.add_column(name, justify="right")
    with file.open("w", encoding="utf-8") as rows:
        for length in lengths:
            for form in forms:
                command.heed_interrupt()
                row = _row(config, length, form)
                rows.write(json.dumps(row | {"device": device.device_kind, "jax": jax.__version__}) + "\n")
                rows.flush()
                values = (row["forward_ms"], row["step_ms"], row["temp_gib"])
                print(
                    f"{length} {form}: {values[0]} ms forward, {values[1]} ms with backward, {values[2]} GiB",
                    flush=True,
                )
                table.add_row(str(length), form, *map(str, values))
    Console().print(table)
    print(f"{file} holds the results")


def _row(config: Config, length: int, form: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from recyc_jax.attention import training
    from recyc_jax.attention.training import Recycle

    budget = min(config.budget, length // 4)
    attend: dict[str, Callable[..., jax.Array]] = {
        "dense": training.causal,
        "cudnn": training.causal_cudnn,
        "strided": lambda q, k, v: training.recycled(q, k, v, Recycle(1, config.stride, budget)),
        "paper": lambda q, k, v: training.recycled(
            q,
            k,
            v,
            Recycle(length - config.stride, config.stride + 1, budget),
            training.causal_cudnn if jax.default_backend() == "gpu" else training.causal,
        ),
    }
    dtype = jnp.dtype(command.dtype_name(config.dtype))
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(config.batch_size, length, count, config.head_dim) for count in (config.heads, *2 * [config.kv_heads])]
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=False))
    weights = jax.random.normal(keys[3], shapes[0], dtype)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum((attend[form](q, k, v) * weights).astype(jnp.float32))

    forward = jax.jit(attend[form]).lower(q, k, v).compile()
    step = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    memory = step.memory_analysis()
    return {
        "length": length,
        "form": form,
        "batch_size": config.batch_size,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "stride": config.stride,
        "budget": budget,
        "dtype": str(dtype),
        "forward_ms": _median_ms(forward, (q, k, v), config.repeats),
        "step_ms": _median_ms(step, (q, k, v), config.repeats),
        "temp_gib": None if memory is None else round(memory.temp_size_in_bytes / 2**30, 3),
    }


def _median_ms(program: Any, arguments: Any, repeats: int) -> float:
    import jax

    jax.block_until_ready(program(*arguments))  # warm
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    sys.exit(main())
