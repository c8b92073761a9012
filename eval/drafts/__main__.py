"""Lossless decoding, timed and counted: `python -m eval.drafts`.

With the shape of a model: the time of a round (drafts, the pass over them, and in some rounds the choice of the next set)
with random weights, beside a full step; and what a token costs where a pass gives so many (`--tokens-per-pass`). Random
weights keep few drafts, which changes the tokens of a round and not its time.

With `--text`: a real model continues windows of a text under full attention and under each policy; the tokens, the drafts
that were kept, and the times of the whole batch, which waits for its slowest row."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax.commands import command_line, files
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig
    from recyc_jax.loading.pretrained import PretrainedLM
    from recyc_jax.policies.lossless import Lossless


@dataclasses.dataclass(frozen=True)
class Config:
    """Time rounds of drafts, or continue texts by them."""

    model: str = "smollm2-135m"
    """A model shape by name or a folder with a config.json, as in `eval.speed`; with --text a model, as in `eval.ruler`."""
    batch: int = 1
    length: int = 2048
    """Tokens of the context."""
    policies: tuple[str, ...] = ("lookahead:budget=512,draft=8",)
    tokens_per_pass: float = 7.0
    """Without --text: the tokens that a pass gives, the one after the kept drafts included."""
    text: Path | None = None
    """A text, of which windows of --length tokens, as far apart as can be, are the batch's rows."""
    new_tokens: int = 160
    """With --text."""
    estimate: bool = False
    """Run nothing; print from bytes, for growing contexts, what a token costs on `--device` and where drafts pay."""
    device: Literal["v5e", "v5p", "v6e", "h100", "h200"] = "h100"
    """With --estimate."""
    repeats: int = 5
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    seed: int = 0
    out: Path = Path("results/drafts")


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.drafts", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    counts = ("batch", "length", "new_tokens", "repeats")
    command_line.check_counts(**{name: getattr(config, name) for name in counts})
    command_line.check_policies(config.policies, [config.length])
    from recyc_jax import shapes
    from recyc_jax.policies.lossless import Lossless
    from recyc_jax.policies.registry import parse_policy

    policies = [parse_policy(text, config.length) for text in config.policies]
    drafting = [policy for policy in policies if isinstance(policy, Lossless)]
    if len(drafting) < len(policies):
        raise ValueError("--policies must all draft, such as lookahead:budget=512,draft=8; full is timed beside them")
    if not config.tokens_per_pass >= 1:
        raise ValueError(f"--tokens-per-pass {config.tokens_per_pass:g} must be at least 1")
    if config.estimate:
        shape = shapes.named_shape(config.model)
        return lambda: _estimate(config, shape, drafting)
    from recyc_jax.commands import backends

    backends.select(config.backend)
    files.writable_folder("--out", config.out)
    if config.text is None:
        shape = shapes.named_shape(config.model)
        command_line.check_context([config.length], shape.max_position_embeddings, False)
        return lambda: _time_rounds(config, shape, drafting)
    if not config.text.is_file():
        raise ValueError(f"--text {config.text}: no such file")
    import jax.numpy as jnp

    from recyc_jax.loading.pretrained import load_pretrained

    lm = load_pretrained(config.model, jnp.dtype(command_line.dtype_name(config.dtype)))
    total = config.length + config.new_tokens
    command_line.check_context([total], lm.config.max_position_embeddings, False)
    ids = lm.tokenizer(config.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < config.length:
        raise ValueError(f"--text {config.text} has {len(ids)} tokens: --length {config.length} asks for more")
    return lambda: _continue(config, lm, drafting, ids)


def _estimate(config: Config, shape: LlamaConfig, policies: list[Lossless]) -> None:
    """Times by the bytes of 16-bit weights and caches, and what layers take beside reading them, as the loop counts."""
    import recyc_jax as rj
    from eval.speed import roofline
    from eval.tables import print_table
    from recyc_jax.pacing import OVERHEAD, PASS_COST

    device, body = roofline.DEVICES[config.device], []
    beside = shape.num_hidden_layers * OVERHEAD / (device.gigabytes_per_second * device.reached * 1e6)
    for policy in policies:
        length = 1024
        while length <= shape.max_position_embeddings:
            every = roofline.estimate(shape, rj.FullAttention(), config.batch, length, device.copies)
            full = every.milliseconds(device) + beside
            draft = roofline.estimate(shape, policy.drafter, config.batch, length, device.copies).partial
            assert draft is not None
            token = policy.draft_length * (draft.milliseconds(device) + beside) + PASS_COST * full
            token /= config.tokens_per_pass
            body.append([str(policy), str(length), f"{full:.2f}", f"{token:.2f}", f"{full / token:.2f}"])
            length *= 2
    title = f"ms a token by bytes and layers, {config.model}, batch {config.batch}, {config.device}"
    title += f", {config.tokens_per_pass:g} tokens a pass"
    print_table(title, ["policy", "length", "full", "drafted", "x full"], body, {}, keys=2)


def _facts(config: Config) -> dict[str, Any]:
    import jax

    names = ("model", "batch", "length")
    return {name: getattr(config, name) for name in names} | {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _time_rounds(config: Config, shape: LlamaConfig, policies: list[Lossless]) -> None:
    import jax
    import jax.numpy as jnp

    import recyc_jax as rj
    from recyc_jax.commands import json_lines, measuring

    dtype = jnp.dtype(command_line.dtype_name(config.dtype))
    made = jax.eval_shape(lambda: rj.init_params(shape, jax.random.key(0), dtype))
    params = measuring.random_like(made, config.seed, 0.02)
    held = config.length - 1

    def full_ms() -> float:
        full, took = rj.FullAttention(), {}
        state = measuring.filled(shape, params, full, config.batch, held, 41, None)
        for steps in (1, 41, 1, 41):  # the first two compile
            began = time.perf_counter()
            out, state = rj.decode(params, shape, state, policy=full, max_new_tokens=steps, eos_ids=())
            jax.block_until_ready(out.tokens)
            took[steps] = time.perf_counter() - began
        return 1000 * (took[41] - took[1]) / 40

    with json_lines.appending(config.out / "rounds.jsonl") as add:
        full = full_ms()
        print(f"a full step: {full:.3f} ms", flush=True)
        for policy in policies:
            command_line.heed_interrupt()
            row, mean = {"full_ms": full}, _round_ms(config, shape, params, policy, refreshes=True)
            if policy.refresh_every > 1:
                row |= {"with_refresh_ms": mean, "without_refresh_ms": _round_ms(config, shape, params, policy, False)}
                rounds = math.ceil(policy.refresh_every / config.tokens_per_pass)  # from one refresh to the next
                mean = row["without_refresh_ms"] + (mean - row["without_refresh_ms"]) / rounds
            token = mean / config.tokens_per_pass
            row |= {
                "round_ms": mean,
                "tokens_per_pass": config.tokens_per_pass,
                "token_ms": token,
                "times_full": full / token,
            }
            row = {name: round(value, 4) for name, value in row.items()}
            print(f"{policy}: " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            add({"policy": str(policy), "dtype": str(dtype), **_facts(config), **row})


def _round_ms(config: Config, shape: LlamaConfig, params: Any, policy: Lossless, refreshes: bool) -> float:
    """The time of a round with a whole draft, which `refreshes` the kept sets or does not. Without refreshes it is a bound
    on a CPU, where a draft step gathers as many slots as could be new."""
    import jax
    import jax.numpy as jnp

    from recyc_jax.commands import measuring
    from recyc_jax.generation import advance
    from recyc_jax.generation_loop import Stretch

    rounds = 8
    room = (config.repeats + 1) * rounds * (policy.draft_length + 1)
    policy = dataclasses.replace(policy, adapt=False, refresh_every=1 if refreshes else room)
    options: dict[str, Any] = dict(policy=policy, eos_ids=(), rewind=False)
    state = measuring.filled(shape, params, policy, config.batch, config.length - 1 + room, room, None)
    _, state = advance(params, shape, state, max_new_tokens=1, **options)
    last, took = jnp.full(config.batch, 2**30, jnp.int32), []
    for _ in range(config.repeats + 1):  # the first time compiles
        began = time.perf_counter()
        count = rounds * (policy.draft_length + 1)
        out, state = advance(
            params, shape, state, max_new_tokens=count, stretch=Stretch(1, rounds), last=last, **options
        )
        jax.block_until_ready(out.tokens)
        took.append(1000 * (time.perf_counter() - began) / rounds)
    return sorted(took[1:])[config.repeats // 2]


def _continue(config: Config, lm: PretrainedLM, policies: list[Lossless], ids: list[int]) -> None:
    import jax
    import numpy as np

    import recyc_jax as rj
    from recyc_jax.commands import json_lines

    begins = np.linspace(0, len(ids) - config.length, config.batch).astype(int)
    windows = [ids[begin : begin + config.length] for begin in begins]
    named: Any = ("full", *policies)
    state = rj.prefill(lm.params, lm.config, windows, policies=named, max_new_tokens=config.new_tokens)
    full_tokens: Any = None
    full_s = 0.0
    with json_lines.appending(config.out / "texts.jsonl") as add:
        for policy in named:
            command_line.heed_interrupt()
            took = []
            for _ in range(2):  # the first time compiles
                began = time.perf_counter()
                out, state = rj.decode(lm.params, lm.config, state, policy=policy, eos_ids=())
                tokens = np.asarray(jax.block_until_ready(out.tokens))
                took.append(time.perf_counter() - began)
            row: dict[str, Any] = {"policy": str(policy), "seconds": round(took[1], 4)}
            if full_tokens is None:
                full_tokens, full_s = tokens, took[1]
            else:
                passes = np.asarray(out.full_steps[:, 0])
                row["times_full"] = round(full_s / took[1], 3)
                row["rows_equal"] = int(np.sum(np.all(tokens == full_tokens, axis=1)))
                row["tokens_per_pass"] = np.round((config.new_tokens - 1) / np.maximum(passes, 1), 3).tolist()
                assert isinstance(out, rj.LosslessGeneration)
                row |= {"drafted": np.asarray(out.drafted).tolist(), "accepted": np.asarray(out.accepted).tolist()}
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            add({**_facts(config), "text": str(config.text), "new_tokens": config.new_tokens, **row})


if __name__ == "__main__":
    sys.exit(main())
