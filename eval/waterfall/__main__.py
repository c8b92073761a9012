"""Time of each kernel in a decode step, on a GPU: `python -m eval.waterfall`.

Times are those of one period of a policy. A step of `snapkv` reads its set like a partial step of recycled attention;
a period of `recycled:...,stride=2` is one partial step and one step that refreshes. Kernels that run less than once per
period, such as those that choose a set before the first step, are left out."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax.commands import command_line, files
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig
    from recyc_jax.policies.base import Policy

STEPS = 10
HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Config:
    """Profile decode steps."""

    model: str = "smollm2-135m"
    """A model shape by name, or a folder with a config.json, as in `eval.speed`."""
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
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.waterfall", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    command_line.check_counts(batch=config.batch, length=config.length)
    command_line.check_policies(config.policies, [config.length])
    from recyc_jax import shapes

    shape = shapes.named_shape(config.model)
    command_line.check_context([config.length], shape.max_position_embeddings, False)
    from recyc_jax import implementations
    from recyc_jax.commands import backends

    backends.select(config.backend)
    implementation = None if config.implementation == "auto" else config.implementation
    implementations.resolve(implementation)
    import jax

    if jax.default_backend() != "gpu":
        raise ValueError(f"eval.waterfall reads a GPU's profile; JAX runs on {jax.default_backend()}")
    files.writable_folder("--out", config.out)
    return lambda: _measure(config, shape, implementation)


def _measure(config: Config, shape: LlamaConfig, implementation: str | None) -> None:
    import jax
    import jax.numpy as jnp

    import recyc_jax as rj
    from eval.tables import print_table
    from recyc_jax.commands import json_lines, measuring
    from recyc_jax.policies.registry import parse_policy

    dtype = jnp.dtype(command_line.dtype_name(config.dtype))
    bandwidth = measuring.copy_bandwidth()
    kind = jax.devices()[0].device_kind
    print(f"{kind}: a copy moves {bandwidth:.1f} GB/s", flush=True)
    shapes = jax.eval_shape(lambda: rj.init_params(shape, jax.random.key(0), dtype))
    params = measuring.random_like(shapes, config.seed, 0.02)
    with json_lines.appending(config.out / "waterfall.jsonl") as add:
        for text in config.policies:
            command_line.heed_interrupt()
            policy = parse_policy(text, config.length)
            body = []
            for found in kernels(config, shape, params, policy, implementation):
                # with our kernels, XLA computes only one matrix product per step: the output embedding's
                once = found["a_period"] == (policy.period or 1)
                is_head = found["kernel"].startswith("gemm_fusion_dot") and once
                size = bytes_read(
                    HEAD if is_head else found["kernel"], shape, policy, config.batch, config.length, dtype.itemsize
                )
                share = None if size is None else round(100 * size / bandwidth / 1e3 / found["us"], 1)
                row = found | {"bytes": size, "percent_of_floor": share, "policy": text, "bandwidth_gb_s": bandwidth}
                row |= {"model": config.model, "batch": config.batch, "length": config.length, "device": kind}
                add(row | {"jax": jax.__version__})
                times = (str(found["a_period"]), f"{found['us']:.2f}", f"{found['us'] * found['a_period']:.1f}")
                megabytes = "" if size is None else f"{size / 1e6:.1f}"
                body.append([found["kernel"], *times, megabytes, str(share or "")])
            title = f"{text}, {config.model}, batch {config.batch}, {config.length} tokens, {kind}"
            print_table(title, ["kernel", "a period", "us each", "us a period", "MB each", "% of floor"], body, {})
    print(f"{config.out / 'waterfall.jsonl'} holds the results")


def kernels(
    config: Config, shape: LlamaConfig, params: Any, policy: Policy, implementation: str | None
) -> list[dict[str, Any]]:
    """The kernels of a period, each with its runs per period (`a_period`) and mean microseconds per run (`us`), slowest
    in total first. For a policy without deciding steps, a period is one step."""
    import jax

    import recyc_jax as rj
    from recyc_jax.commands import measuring

    period = policy.period or 1
    steps = -(-STEPS // period) * period
    sizes = (config.batch, config.length, steps + 1)
    state = measuring.filled(shape, params, policy, *sizes, implementation, config.seed)

    def run() -> None:
        nonlocal state
        options: Any = {"policy": policy, "eos_ids": (), "implementation": implementation}
        out, state = rj.decode(params, shape, state, max_new_tokens=steps + 1, **options)
        jax.block_until_ready(out.tokens)

    found = [
        {"kernel": name, "a_period": len(times) * period // steps, "us": round(sum(times) / len(times), 3)}
        for name, times in measuring.kernel_times(run).items()
        if len(times) * period >= steps
    ]
    return sorted(found, key=lambda one: -one["us"] * one["a_period"])


def bytes_read(kernel: str, shape: LlamaConfig, policy: Policy, batch: int, length: int, size: int) -> int | None:
    """The bytes that one of our kernels, or the output embedding's matrix product (`HEAD`), must read; None for other
    kernels, which read little, and for the full attention of a model that has layers with a window too: both run in
    kernels of one name."""
    heads, kv_heads, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    name = re.sub(r"_+\d+$", "", kernel) if not kernel.startswith("added_projection") else "added_projection"
    into = re.match(r"added_projection_(\d+)", kernel)
    budget = min(getattr(policy, "budget", length), length)
    to_heads = shape.hidden_size * dim * (heads + 2 * kv_heads)
    known = {
        "heads_projections": to_heads,
        "projections": to_heads,  # where heads are finished by another kernel
        "gated_projections": 2 * shape.hidden_size * shape.intermediate_size,
        "added_projection": shape.hidden_size * (int(into[1]) if into else 0),
        "full_attention": 2 * batch * kv_heads * dim * length,
        "recycled_attention": 2 * batch * kv_heads * dim * budget,
    }
    if name == "full_attention" and shape.sliding_window is not None:
        return None
    if name == HEAD:
        return shape.vocab_size * shape.hidden_size * size
    return known[name] * size if name in known else None


if __name__ == "__main__":
    sys.exit(main())
