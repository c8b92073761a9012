"""What a decode step costs under each policy: `python -m eval.speed`.

Measured on the device at hand, with the bytes that a step must read and the least time that takes at the bandwidth of a
copy on the same device; or, with `--estimate`, reckoned for a device that need not be there. Weights are random and the
cache is filled with random keys and values: neither changes what a step reads. (A GPU's choosing takes longer where
many scores are alike: `attention/select_gpu.py`.)
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from eval import command, measuring
from eval.backend import Backend

if TYPE_CHECKING:
    from eval.roofline import Device
    from recyc_jax import LlamaConfig
    from recyc_jax.policies.base import Policy

STEPS = 40
"""Decode steps that are timed, or as many more as make whole periods."""
GAIN = 1.1
"""Recycling pays, for the warnings, where full attention's step takes this many times the mean step."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure decode steps, or estimate them."""

    model: str = "smollm2-135m"
    """A shape: smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b; or a folder with a config.json."""
    batch: int = 1
    lengths: str = "2048,4096,8192"
    """Total lengths, comma-separated: what the cache holds while the steps are taken."""
    policies: tuple[str, ...] = ("full", "recycled:budget=512,stride=10", "recycled:budget=512,stride=50")
    estimate: bool = False
    """Run nothing: say what the steps take at least on `--device`, and from where on recycling pays."""
    device: Literal["v5e", "v5p", "v6e", "h100", "h200"] = "h100"
    """With --estimate: the kind of chip."""
    chips: int = 1
    """With --estimate: how many share the model evenly. What they tell each other is not counted."""
    bandwidth: float | None = None
    """With --estimate: GB/s that a chip reaches. Default: what a copy was seen to reach, else the vendor's figure."""
    prefill: bool = False
    """Read a prompt of each length too, and say what that takes; else the cache is filled with random numbers."""
    repeats: int = 5
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    implementation: Literal["auto", "reference", "pallas"] = "auto"
    seed: int = 0
    allow_beyond_context: bool = False
    out: Path = Path("results/speed")


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(Config, prog="python -m eval.speed", args=args)
    return command.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    lengths = command.lengths(config.lengths)
    command.check_counts(batch=config.batch, repeats=config.repeats, chips=config.chips)
    command.check_policies(config.policies, lengths)
    model = shape(config.model)
    command.check_context(lengths, model.max_position_embeddings, config.allow_beyond_context)
    if config.bandwidth is not None and not config.bandwidth > 0:
        raise ValueError(f"--bandwidth {config.bandwidth} must be above 0 GB/s")
    if config.estimate:
        return lambda: _estimate(config, model, lengths)
    for flag in ("device", "chips", "bandwidth"):
        if getattr(config, flag) != next(f.default for f in dataclasses.fields(config) if f.name == flag):
            raise ValueError(f"--{flag} goes with --estimate; without it the device at hand is measured")
    from eval import backend
    from recyc_jax.attention import api

    backend.select(config.backend)
    api.resolve(None if config.implementation == "auto" else config.implementation)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}") from None
    return lambda: _measure(config, model, lengths)


def shape(name: str) -> LlamaConfig:
    """The config that `--model` names. Raises ValueError where there is none."""
    from recyc_jax import LlamaConfig
    from recyc_jax.shapes import SHAPES

    if name in SHAPES:
        return SHAPES[name]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(f"--model {name!r} is no known shape ({', '.join(SHAPES)}) and no folder with a config.json")
    try:
        return LlamaConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"--model {name}: config.json is not JSON ({error})") from None


# --- estimate --------------------------------------------------------------------------------------------------------


def _estimate(config: Config, model: LlamaConfig, lengths: list[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    from eval import roofline
    from recyc_jax.policies.registry import parse_policy

    device = roofline.DEVICES[config.device]
    if config.bandwidth is not None:
        device = dataclasses.replace(device, gigabytes_per_second=config.bandwidth, reached=1.0)
    table = Table(title=f"least ms a step, {config.model}, batch {config.batch}, {config.chips} x {device.name}")
    for name in ("length", "policy", "full", "partial", "mean", "tokens/s", "x full"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for length in lengths:
        for text in config.policies:
            policy = parse_policy(text, length)
            found = roofline.estimate(model, policy, config.batch, length, device.copies)
            steps = [step and step.milliseconds(device, config.chips) for step in (found.full, found.partial)]
            mean = found.milliseconds(device, config.chips)
            gain = _gain(model, policy, config.batch, length, device)
            speeds = (f"{1000 * config.batch / mean:.0f}", f"{gain:.2f}")
            table.add_row(str(length), text, *("-" if ms is None else f"{ms:.3f}" for ms in (*steps, mean)), *speeds)
    Console(width=max(100, Console().width)).print(table)
    reached = device.gigabytes_per_second * device.reached
    print(
        f"at {reached:.0f} GB/s and {device.tera_operations:.0f} TFLOP/s a chip, bfloat16; the most that is possible,"
    )
    print("not a prediction: launches, softmax, selection and what chips tell each other come on top")
    for line in _advice(config, model, lengths, device):
        print(line)


def _gain(model: LlamaConfig, policy: Policy, batch: int, length: int, device: Device) -> float:
    """Full attention's least step time over the policy's mean."""
    from eval import roofline
    from recyc_jax import FullAttention

    full, own = (
        roofline.estimate(model, one, batch, length, device.copies).milliseconds(device)
        for one in (FullAttention(), policy)
    )
    return full / own


def _advice(config: Config, model: LlamaConfig, lengths: list[int], device: Device) -> Iterator[str]:
    """From which length and batch on recycling pays, and what does not fit."""
    from eval import roofline
    from recyc_jax import RecycledAttention
    from recyc_jax.policies.registry import parse_policy

    for text in config.policies:
        policy = parse_policy(text, max(lengths))
        if not isinstance(policy, RecycledAttention):
            continue

        def by_length(length: int, text: str = text) -> float:
            return _gain(model, parse_policy(text, length), config.batch, length, device)

        def by_batch(batch: int, policy: Policy = policy) -> float:
            return _gain(model, policy, batch, max(lengths), device)

        length = roofline.first_that_gains(range(1024, 2**21, 1024), by_length, GAIN)
        batch = roofline.first_that_gains(range(1, 1025), by_batch, GAIN)
        from_length = f"from {length} tokens on" if length else "at no length"
        from_batch = f"from batch {batch} on" if batch else "at no batch"
        yield (
            f"{text}: {GAIN} times as fast as full attention {from_length} at batch {config.batch}; "
            f"{from_batch} at {max(lengths)} tokens"
        )
    weights = roofline.weight_bytes(model)[0]
    for length in lengths:
        held = (weights + config.batch * length * roofline.token_bytes(model)) / 1e9
        if held > device.gigabytes * config.chips:
            yield (
                f"warning: weights and cache take {held:.1f} GB at {length} tokens; "
                f"{config.chips} x {device.name} have {device.gigabytes * config.chips:.0f}"
            )


# --- measure ---------------------------------------------------------------------------------------------------------


def _measure(config: Config, model: LlamaConfig, lengths: list[int]) -> None:
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
    params = measuring.random_like(
        jax.eval_shape(lambda: rj.init_params(model, jax.random.key(0), dtype)), config.seed, 0.02
    )
    table = Table(title=f"ms a step, {config.model}, batch {config.batch}, {dtype}, {kind}")
    for name in ("length", "policy", "full", "partial", "mean", "floor", "% of floor", "tokens/s", "x full"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    file, measured = config.out / "speed.jsonl", []
    implementation = None if config.implementation == "auto" else config.implementation
    with file.open("w", encoding="utf-8") as rows:
        for length in lengths:
            full_ms, known = None, {}
            prefill_ms = None
            if config.prefill:
                prefill_ms = _prefill_ms(config, model, params, length, implementation)
                print(f"{length} prefill: {prefill_ms} ms", flush=True)
            for text in _full_first(config.policies):
                command.heed_interrupt()
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
                rows.write(json.dumps(row) + "\n")
                rows.flush()
                measured.append(row)
                names = (
                    "full_ms",
                    "partial_ms",
                    "mean_ms",
                    "floor_ms",
                    "percent_of_floor",
                    "tokens_per_s",
                    "times_full",
                )
                values = ["-" if row[name] is None else str(row[name]) for name in names]
                table.add_row(str(length), text, *values)
                print(f"{length} {text}: {row['mean_ms']} ms a step, {row['compile_s']} s to compile", flush=True)
                if row["times_full"] is not None and text != "full" and row["times_full"] < 1:
                    print(f"warning: {text} gains nothing at {length} tokens and batch {config.batch}: see --estimate")
    Console(width=max(110, Console().width)).print(table)
    plot = config.out / "speed.png"
    _plot(plot, measured, f"{config.model}, batch {config.batch}, {dtype}, {kind}")
    print(f"{file} and {plot} hold the results")


def _plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Mean ms a step against the context's length, a line a policy; dashed, its floor: the time that its bytes take."""
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


def _full_first(policies: tuple[str, ...]) -> list[str]:
    """Full attention is measured in any case, before what is compared with it."""
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
    import jax

    import recyc_jax as rj
    from eval import roofline
    from recyc_jax.attention import api

    implementation = None if config.implementation == "auto" else config.implementation
    copies = api.resolve(implementation).COPIES
    size = jax.tree.leaves(params)[0].dtype.itemsize
    found = roofline.estimate(model, policy, config.batch, length, copies, size)
    mean, compile_s, peak = _mean_ms(config, model, params, policy, length, implementation)
    full = mean if found.partial is None else None
    partial = mean if found.full is None else None
    if isinstance(policy, rj.RecycledAttention):
        # each kind of step: never refreshing, and by turns; at every step XLA would drop it, for no step reads the set
        alone, lookahead = rj.SnapKV(policy.budget), policy.lookahead
        lookahead = policy.period - 1 if lookahead == "auto" else lookahead
        by_turns = dataclasses.replace(policy, schedule=rj.FixedStride(2), lookahead=lookahead)
        partial, both = (
            _alone_ms(config, model, params, one, length, implementation, known) for one in (alone, by_turns)
        )
        full = round(2 * both - partial, 4)
    reads = [step.bytes if step else None for step in (found.full, found.partial)]
    device = roofline.Device("here", float("inf"), bandwidth, 0, 1.0)
    floor = found.milliseconds(device)
    return {
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
        "implementation": implementation,
    }


def _alone_ms(
    config: Config,
    model: LlamaConfig,
    params: Any,
    policy: Policy,
    length: int,
    implementation: str | None,
    known: dict[tuple[Policy, int], float],
) -> float:
    """ms a step, measured once for each policy and length."""
    if (policy, length) not in known:
        known[policy, length] = _mean_ms(config, model, params, policy, length, implementation)[0]
    return known[policy, length]


def _prefill_ms(config: Config, model: LlamaConfig, params: Any, length: int, implementation: str | None) -> float:
    """What reading a prompt of random tokens takes, compiled already."""
    import jax
    import numpy as np

    import recyc_jax as rj

    tokens = np.random.default_rng(config.seed).integers(0, model.vocab_size, (config.batch, length)).astype(np.int32)

    def run() -> Any:
        return rj.prefill(params, model, tokens, max_new_tokens=1, implementation=implementation).logits

    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    return round(1000 * (time.perf_counter() - began), 1)


def _mean_ms(
    config: Config, model: LlamaConfig, params: Any, policy: Policy, length: int, implementation: str | None
) -> tuple[float, float, int | None]:
    """(ms a step, seconds to compile, peak bytes where the device tells them) through the public `decode`.

    Two runs that differ by whole periods only: what a run takes before its first step cancels out.
    """
    import jax

    import recyc_jax as rj

    short = 1 + policy.period
    long = short + -(-STEPS // policy.period) * policy.period
    state = measuring.filled(model, params, policy, config.batch, length, long, implementation, config.seed)
    took, compile_s = {}, 0.0
    for steps in (short, long):

        def run(steps: int = steps) -> Any:
            nonlocal state
            out, state = rj.decode(
                params,
                model,
                state,
                policy=policy,
                max_new_tokens=steps,
                eos_ids=(),
                implementation=implementation,
            )
            return out.tokens

        began = time.perf_counter()
        jax.block_until_ready(run())
        first = time.perf_counter() - began
        took[steps] = measuring.median_ms(run, config.repeats)
        compile_s += max(0.0, first - took[steps] / 1000)
    stats = jax.devices()[0].memory_stats() or {}
    mean = (took[long] - took[short]) / (long - short)
    return round(mean, 4), round(compile_s, 1), stats.get("peak_bytes_in_use")


if __name__ == "__main__":
    sys.exit(main())
