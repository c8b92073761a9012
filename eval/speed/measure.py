"""`python -m eval.speed`: decode steps timed on this machine's device.

Weights, keys and values are random, which does not change what a step reads. (On a GPU, selection takes longer if many
scores are nearly equal: `kernels/gpu/top_slots.py`.)
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import recyc_jax as rj
from eval.speed import roofline
from eval.speed.config import Config
from eval.tables import letters, print_table
from recyc_jax import LlamaConfig, Policy, implementations, parse_policy, sharding
from recyc_jax.commands import command_line, json_lines, measuring
from recyc_jax.commands.plotting import plot

STEPS = 40
"""Decode steps that are timed, rounded up to whole periods."""
NEVER = 2**30
"""The stride of a policy without full steps."""
COLUMNS = {
    "full_ms": "full",
    "partial_ms": "partial",
    "mean_ms": "mean",
    "floor_ms": "floor",
    "percent_of_floor": "% of floor",
    "tokens_per_s": "tokens/s",
    "times_full": "x full",
}
"""The fields of a row that the printed table shows, and their headings."""


def measure(config: Config, model: LlamaConfig, lengths: list[int]) -> None:
    """Time every policy at every length; each row is added to those of earlier runs as soon as it is measured."""
    dtype = jnp.dtype(command_line.dtype_name(config.dtype))
    bandwidth = measuring.copy_bandwidth()
    kind = jax.devices()[0].device_kind
    print(f"{kind}: a copy moves {bandwidth:.1f} GB/s", flush=True)
    shapes = jax.eval_shape(lambda: rj.init_params(model, jax.random.key(0), dtype))
    mesh = jax.sharding.get_mesh()
    params = measuring.random_like(shapes, config.seed, 0.02, None if mesh.empty else sharding.shardings(shapes, mesh))
    file, measured = config.out / "speed.jsonl", []
    policies = _full_first(config.policies)
    with json_lines.appending(file) as add:
        for length in lengths:
            full_ms, known = None, {}
            prefill_ms = None
            if config.prefill:
                prefill_ms = _prefill_ms(config, model, params, length)
                print(f"{length} prefill: {prefill_ms} ms", flush=True)
            for text in policies:
                command_line.heed_interrupt()
                row = _row(config, model, params, parse_policy(text, length), length, bandwidth, known)
                full_ms = row["mean_ms"] if text == "full" else full_ms
                row["times_full"] = round(full_ms / row["mean_ms"], 3) if full_ms else None
                row |= {
                    "prefill_ms": prefill_ms,
                    "policy": text,
                    "model": config.model,
                    "device": kind,
                    "jax": jax.__version__,
                }
                add(row)
                measured.append(row)
                print(f"{length} {text}: {row['mean_ms']} ms a step, {row['compile_s']} s to compile", flush=True)
                if row["times_full"] is not None and text != "full" and row["times_full"] < 1:
                    print(f"warning: {text} gains nothing at {length} tokens and batch {config.batch}: see --estimate")
    named = letters(policies)
    body = [
        [str(row["length"]), named[row["policy"]], *("-" if row[name] is None else str(row[name]) for name in COLUMNS)]
        for row in measured
    ]
    title = f"ms a step, {config.model}, batch {config.batch}, {dtype}, {kind}"
    print_table(title, ["length", "policy", *COLUMNS.values()], body, named, keys=2)
    plot = config.out / "speed.png"
    _plot(plot, measured, title)
    print(f"{file} and {plot} hold the results")


def _full_first(policies: tuple[str, ...]) -> list[str]:
    """The policies with full attention first: it is always measured, because the others are compared with it."""
    return ["full", *(text for text in policies if text != "full")]


def _row(
    config: Config,
    model: LlamaConfig,
    params: Any,
    policy: Policy,
    length: int,
    bandwidth: float,
    known: dict[tuple[Policy, int], float],
) -> dict[str, Any]:
    copies = implementations.resolve(_implementation(config)).slots_last  # the TPU implementation copies kept sets
    size = jax.tree.leaves(params)[0].dtype.itemsize
    split, shares = sharding.split_of(config.batch), sharding.slot_shares()
    found = roofline.estimate(model, policy, split.rows, length, copies, size, shares)
    mean, compile_s, peak = mean_ms(config, model, params, policy, length)
    full = mean if found.partial is None else None
    partial = mean if found.full is None else None
    if isinstance(policy, rj.Lookahead | rj.RecycledAttention):
        # times of a partial and a full step, from a policy that never refreshes and one with a full step at every
        # second step; with stride 1 no step would read the set, and XLA would drop the refresh
        alone, by_turns = _with_few_and_many_full_steps(policy)
        partial, both = (_once(config, model, params, one, length, known) for one in (alone, by_turns))
        full = round(2 * both - partial, 4)
    reads = [step.bytes // split.tensor if step else None for step in (found.full, found.partial)]
    device = roofline.Device("here", float("inf"), bandwidth, 0, 1.0)
    floor = found.milliseconds(device) / split.tensor
    return {
        "rows_of_a_device": split.rows,
        "devices_of_a_row": split.tensor,
        "devices_of_a_cache": shares,
        "length": length,
        "batch": config.batch,
        "dtype": str(jax.tree.leaves(params)[0].dtype),
        "full_ms": full,
        "partial_ms": partial,
        "mean_ms": mean,
        "floor_ms": round(floor, 4),
        "percent_of_floor": round(100 * floor / mean, 1),
        "tokens_per_s": round(1000 * config.batch / mean, 1),
        "full_bytes": reads[0],
        "partial_bytes": reads[1],
        "bandwidth_gb_s": bandwidth,
        "peak_bytes": peak,
        "compile_s": compile_s,
        "implementation": _implementation(config),
    }


def _with_few_and_many_full_steps(policy: rj.Lookahead | rj.RecycledAttention) -> tuple[rj.Policy, rj.Policy]:
    """The policy without a full step, and with one at every second step; look-ahead stays as it is."""
    if isinstance(policy, rj.Lookahead):
        fixed = dataclasses.replace(policy, lookahead=policy.ahead)
        return dataclasses.replace(fixed, stride=NEVER), dataclasses.replace(fixed, stride=2)
    ahead = policy.period - 1 if policy.lookahead == "auto" else policy.lookahead
    return rj.SnapKV(policy.budget), dataclasses.replace(policy, schedule=rj.FixedStride(2), lookahead=ahead)


def _implementation(config: Config) -> str | None:
    return None if config.implementation == "auto" else config.implementation


def _once(
    config: Config,
    model: LlamaConfig,
    params: Any,
    policy: Policy,
    length: int,
    known: dict[tuple[Policy, int], float],
) -> float:
    """Milliseconds per step, measured once for each policy and length."""
    if (policy, length) not in known:
        known[policy, length] = mean_ms(config, model, params, policy, length)[0]
    return known[policy, length]


def _prefill_ms(config: Config, model: LlamaConfig, params: Any, length: int) -> float:
    """Milliseconds to prefill a prompt of random tokens, without compilation."""
    tokens = np.random.default_rng(config.seed).integers(0, model.vocab_size, (config.batch, length)).astype(np.int32)

    def run() -> Any:
        options: Any = {"max_new_tokens": 1, "allow_beyond_context": True, "implementation": _implementation(config)}
        return rj.prefill(params, model, tokens, **options).logits

    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    return round(1000 * (time.perf_counter() - began), 1)


def mean_ms(
    config: Config, model: LlamaConfig, params: Any, policy: Policy, length: int
) -> tuple[float, float, int | None]:
    """Milliseconds per step, seconds to compile, and peak bytes (if the device reports them) of the public `decode`.

    The time of a step comes from two runs that differ by whole periods, so what precedes the first step cancels out.
    """
    implementation = _implementation(config)
    period = policy.period or NEVER
    period = 10 if period == NEVER else period  # without deciding steps, all steps are alike
    short = 1 + period
    long = short + -(-STEPS // period) * period
    state = measuring.filled(model, params, policy, config.batch, length, long, implementation, config.seed)
    took, compile_s = {}, 0.0
    for steps in (short, long):

        def run(steps: int = steps) -> Any:
            nonlocal state
            options: Any = {"policy": policy, "eos_ids": (), "implementation": implementation}
            out, state = rj.decode(params, model, state, max_new_tokens=steps, **options)
            return out.tokens

        began = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - began
        took[steps] = measuring.median_ms(run, config.repeats)
        compile_s += max(0.0, first - took[steps] / 1000)
    stats = jax.devices()[0].memory_stats() or {}
    mean = (took[long] - took[short]) / (long - short)
    return round(mean, 4), round(compile_s, 1), stats.get("peak_bytes_in_use")


@plot
def _plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plot the mean milliseconds per step against the context length, one line per policy; dashed lines show the floor,
    the time in which a copy moves the same bytes."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, policy in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        points = [row for row in rows if row["policy"] == policy]
        lengths, color = [row["length"] for row in points], colormaps["tab20"](number % 20)
        axes.plot(lengths, [row["mean_ms"] for row in points], marker="o", color=color, label=policy)
        axes.plot(lengths, [row["floor_ms"] for row in points], linestyle="--", linewidth=1, color=color)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["length"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms a step (dashed: floor)")
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower left", fontsize=7)
    figure.savefig(path, dpi=120)
