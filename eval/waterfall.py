"""Where a decode step's time goes, kernel by kernel: `python -m eval.waterfall`, on a GPU.

What is counted is a policy's period: `snapkv` reads a chosen set as recycled attention's partial step does,
`recycled:...,stride=2` takes a partial step and one that refreshes. Kernels that run less than once a period, such as those
that choose a set before the first step, are left out.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from eval import command, measuring, speed
from eval.backend import Backend

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig
    from recyc_jax.policies.base import Policy

STEPS = 10
HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Config:
    """Profile decode steps."""

    model: str = "smollm2-135m"
    """As `eval.speed` has it."""
    batch: int = 1
    length: int = 8192
    """Tokens in the cache."""
    policies: tuple[str, ...] = ("full", "snapkv:budget=512", "recycled:budget=512,stride=2")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    implementation: Literal["auto", "reference", "pallas"] = "auto"
    seed: int = 0
    out: Path = Path("results/waterfall")


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(Config, prog="python -m eval.waterfall", args=args)
    return command.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    command.check_counts(batch=config.batch, length=config.length)
    command.check_policies(config.policies, [config.length])
    shape = speed.shape(config.model)
    command.check_context([config.length], shape.max_position_embeddings, False)
    from eval import backend
    from recyc_jax.attention import api

    backend.select(config.backend)
    implementation = None if config.implementation == "auto" else config.implementation
    api.resolve(implementation)
    import jax

    if jax.default_backend() != "gpu":
        raise ValueError(f"eval.waterfall reads a GPU's profile; JAX runs on {jax.default_backend()}")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}") from None
    return lambda: _measure(config, shape, implementation)


def _measure(config: Config, shape: LlamaConfig, implementation: str | None) -> None:
    import jax
    import jax.numpy as jnp
    from rich.console import Console
    from rich.table import Table

    import recyc_jax as rj
    from recyc_jax.policies.registry import parse_policy

    dtype = jnp.dtype(command.dtype_name(config.dtype))
    bandwidth = measuring.copy_bandwidth()
    kind = jax.devices()[0].device_kind
    print(f"{kind}: a copy moves {bandwidth:.1f} GB/s", flush=True)
    shapes = jax.eval_shape(lambda: rj.init_params(shape, jax.random.key(0), dtype))
    params = measuring.random_like(shapes, config.seed, 0.02)
    with (config.out / "waterfall.jsonl").open("w", encoding="utf-8") as rows:
        for text in config.policies:
            command.heed_interrupt()
            policy = parse_policy(text, config.length)
            table = Table(title=f"{text}, {config.model}, batch {config.batch}, {config.length} tokens, {kind}")
            for name in ("kernel", "a period", "us each", "us a period", "MB each", "% of floor"):
                table.add_column(name, justify="left" if name == "kernel" else "right")
            for found in kernels(config, shape, params, policy, implementation):
                # XLA's products have one name; with our kernels the head's is the only one, once a step
                once = found["a_period"] == (policy.period if policy.decides else 1)
                is_head = found["kernel"].startswith("gemm_fusion_dot") and once
                size = _bytes(
                    HEAD if is_head else found["kernel"], shape, policy, config.batch, config.length, dtype.itemsize
                )
                share = None if size is None else round(100 * size / bandwidth / 1e3 / found["us"], 1)
                row = found | {"bytes": size, "percent_of_floor": share, "policy": text, "bandwidth_gb_s": bandwidth}
                row |= {"model": config.model, "batch": config.batch, "length": config.length, "device": kind}
                rows.write(json.dumps(row | {"jax": jax.__version__}) + "\n")
                times = (str(found["a_period"]), f"{found['us']:.2f}", f"{found['us'] * found['a_period']:.1f}")
                table.add_row(found["kernel"], *times, "" if size is None else f"{size / 1e6:.1f}", str(share or ""))
            Console(width=max(110, Console().width)).print(table)
    print(f"{config.out / 'waterfall.jsonl'} holds the results")


def kernels(
    config: Config, shape: LlamaConfig, params: Any, policy: Policy, implementation: str | None
) -> list[dict[str, Any]]:
    """Kernels of a period, with how often each runs in it and its mean microseconds, the costliest first. A policy that
    never decides has periods of a step."""
    import jax

    import recyc_jax as rj

    length = policy.period if policy.decides else 1
    steps = -(-STEPS // policy.period) * policy.period
    sizes = (config.batch, config.length, steps + 1)
    state = measuring.filled(shape, params, policy, *sizes, implementation, config.seed)

    def run() -> None:
        nonlocal state
        options: Any = {"policy": policy, "eos_ids": (), "implementation": implementation}
        out, state = rj.decode(params, shape, state, max_new_tokens=steps + 1, **options)
        jax.block_until_ready(out.tokens)

    found = [
        {"kernel": name, "a_period": len(times) * length // steps, "us": round(sum(times) / len(times), 3)}
        for name, times in measuring.kernel_times(run).items()
        if len(times) * length >= steps
    ]
    return sorted(found, key=lambda one: -one["us"] * one["a_period"])


def _bytes(kernel: str, shape: LlamaConfig, policy: Policy, batch: int, length: int, size: int) -> int | None:
    """What one of our kernels, or the head's product, must read; None for others, which read little."""
    heads, kv_heads, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    name = re.sub(r"_+\d+$", "", kernel) if not kernel.startswith("added_projection") else "added_projection"
    into = re.match(r"added_projection_(\d+)", kernel)
    budget = min(getattr(policy, "budget", length), length)
    known = {
        "heads_projections": shape.hidden_size * dim * (heads + 2 * kv_heads),
        "gated_projections": 2 * shape.hidden_size * shape.intermediate_size,
        "added_projection": shape.hidden_size * (int(into[1]) if into else 0),
        "full_attention": 2 * batch * kv_heads * dim * length,
        "recycled_attention": 2 * batch * kv_heads * dim * budget,
    }
    if name == HEAD:
        return shape.vocab_size * shape.hidden_size * size
    return known[name] * size if name in known else None


if __name__ == "__main__":
    sys.exit(main())
