"""How much attention a recycled set still covers, step by step: `python -m eval.attention_overlap`.

Full attention decodes the continuation of a prompt. At every step and in every layer, the command records how much of
the attention probability falls on each of several sets: sets that were chosen at the prompt's last token and have added
every new token since, as between two refreshes; StreamingLLM's set; and the best set of the same size for that step.
For policies with the similarity schedule it also counts how often each layer refreshes. Writes OUT/overlap.json and
figures."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax.commands import command_line, files
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    from eval.attention_overlap.probe import Probe
    from recyc_jax.loading.pretrained import PretrainedLM


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure how much attention recycled sets cover at each step after their choice."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    sources: str = "novels,ruler:niah_single_3"
    """Comma-separated: domains of eval.language_modeling (continued by their own text), ruler:TASK (continued by full
    attention's answer)."""
    length: int = 1024
    """Total length in tokens: prompt and continuation."""
    new_tokens: int = 64
    """Tokens of the continuation."""
    sequences: int = 4
    """Prompts per source."""
    sets: tuple[str, ...] = (
        "snapkv:budget=0.125",
        "snapkv:budget=0.125,lookahead=9",
        "snapkv:budget=0.125,lookahead=49",
        "streaming_llm:budget=0.125",
    )
    """Sets to follow: snapkv and streaming_llm policies of the same budget, separated by spaces."""
    schedules: tuple[str, ...] = ("recycled:budget=0.125,check_every=5,threshold=0.82",)
    """recycled policies with check_every and threshold, whose effective stride is measured per layer."""
    seed: int = 42
    out: Path = Path("results/attention_overlap")
    batch_size: int = 4
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"
    allow_beyond_context: bool = False
    """Allow a length beyond the model's context length."""


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.attention_overlap", args=args)
    return command_line.run(_prepare, config, "nothing was written")


def _prepare(config: Config) -> Callable[[], None]:
    """Do everything up to and including the loading of weights; returns a function that does the rest."""
    from eval.attention_overlap.probe import Probe
    from recyc_jax.commands import backends
    from recyc_jax.loading import pretrained, weights

    candidates, schedules = _policies(config)
    command_line.check_counts(
        sequences=config.sequences, batch_size=config.batch_size, new_tokens=config.new_tokens - 1
    )
    if config.new_tokens >= config.length:
        raise ValueError(f"--new-tokens {config.new_tokens} leaves no prompt of --length {config.length}")
    backends.select(config.backend)
    folder, model_config, tokenizer = pretrained.open_checkpoint(config.model)
    if not model_config.full_layers:
        raise ValueError(
            f"--model {config.model}: every layer has a sliding window, so there is no attention to compare"
        )
    command_line.check_context([config.length], model_config.max_position_embeddings, config.allow_beyond_context)
    prompts = {
        source: _prompts(config, source, tokenizer) for source in command_line.split("--sources", config.sources)
    }
    import jax.numpy as jnp

    dtype = command_line.dtype_name(config.dtype)
    files.writable_folder("--out", config.out)
    params = weights.load_params(folder, model_config, jnp.dtype(dtype))
    lm = pretrained.PretrainedLM(params, model_config, tokenizer)
    return lambda: _measure(config, lm, prompts, Probe(candidates, config.new_tokens - 1), schedules, dtype)


def _policies(config: Config) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import recyc_jax as rj
    from recyc_jax.policies.snapkv import SnapKV
    from recyc_jax.policies.streaming_llm import StreamingLLM

    candidates = tuple(rj.parse_policy(text, config.length) for text in config.sets)
    for text, policy in zip(config.sets, candidates, strict=True):
        if not isinstance(policy, SnapKV | StreamingLLM):
            raise ValueError(f"--sets {text}: only snapkv and streaming_llm sets can be followed")
    if len({policy.budget for policy in candidates}) != 1:
        raise ValueError("--sets: name at least one set, all of the same budget")
    schedules = {text: rj.parse_policy(text, config.length) for text in config.schedules}
    for text, policy in schedules.items():
        if not (isinstance(policy, rj.RecycledAttention) and isinstance(policy.schedule, rj.QuerySimilarity)):
            raise ValueError(f"--schedules {text}: name recycled policies with check_every and threshold")
    return candidates, schedules


def _prompts(config: Config, source: str, tokenizer: Any) -> list[tuple[list[int], list[int] | None]]:
    """Pairs of a prompt and its continuation, which is None where full attention generates it."""
    from eval.language_modeling.windows import windows
    from eval.ruler import cells
    from eval.ruler.config import Config as RulerConfig

    if not source.startswith("ruler:"):
        from recyc_jax.commands import documents

        domains = [documents.load(source)]
        found, _ = windows(domains, [config.length], tokenizer, count=config.sequences, skip=0, seed=config.seed)
        cut = config.length - config.new_tokens
        return [(list(window.tokens[:cut]), list(window.tokens[cut:])) for window in found]
    task = source.removeprefix("ruler:")
    like = RulerConfig(tasks=task, lengths=str(config.length), samples=config.sequences, seed=config.seed)
    return [(ids, None) for ids in cells.prompts(like, tokenizer)]


def _measure(
    config: Config, lm: PretrainedLM, prompts: Any, probe: Probe, schedules: dict[str, Any], dtype: str
) -> None:
    import numpy as np

    import recyc_jax as rj
    from eval.attention_overlap import figures
    from recyc_jax.commands.files import write_text

    covered: dict[str, Any] = {}
    strides: dict[str, dict[str, list[float | None]]] = {name: {} for name in schedules}
    total = len(prompts) * (1 + len(schedules))
    with command_line.progress() as progress:
        bar = progress.add_task("following sets", total=total)
        for source, some in prompts.items():
            layers, full_steps = [], {name: [] for name in schedules}
            for at in range(0, len(some), config.batch_size):
                command_line.heed_interrupt()
                batch = some[at : at + config.batch_size]
                state = rj.prefill(
                    lm.params,
                    lm.config,
                    [ids for ids, _ in batch],
                    policies=[probe, *schedules.values()],
                    max_new_tokens=config.new_tokens,
                    allow_beyond_context=True,  # `command_line.check_context` has checked it
                )
                if batch[0][1] is None:
                    out, state = rj.decode(lm.params, lm.config, state, policy=rj.FullAttention(), eos_ids=())
                    following = np.asarray(out.tokens)
                else:
                    following = np.asarray([ids for _, ids in batch], np.int32)
                scores, state = rj.score_after(lm.params, lm.config, state, following, policy=probe)
                layers.append(np.stack([layer.covered for layer in scores.states], axis=1))  # [B, L, M, C + 1]
                progress.advance(bar, len(batch) / len(some))
                for name, policy in schedules.items():
                    scores, state = rj.score_after(lm.params, lm.config, state, following, policy=policy)
                    full_steps[name].append(np.asarray(scores.full_steps))
                    progress.advance(bar, len(batch) / len(some))
            covered[source] = np.concatenate(layers).mean(axis=0)  # [L, M, C + 1]
            for name in schedules:
                taken = np.concatenate(full_steps[name]).sum(axis=0)
                steps = (config.new_tokens - 1) * len(some)
                strides[name][source] = [round(steps / count, 2) if count else None for count in taken.tolist()]
    names = [*config.sets, figures.IDEAL]
    result = {
        "facts": command_line.facts(config, "eval.attention_overlap", {"dtype": dtype}),
        "covered": {
            source: {name: np.round(values[..., place], 4).tolist() for place, name in enumerate(names)}
            for source, values in covered.items()
        },
        "effective_strides": strides,
    }
    write_text(config.out / "overlap.json", json.dumps(result) + "\n")
    figures.plot_covered(config.out / "overlap.png", covered, names)
    figures.plot_layers(config.out / "overlap_layers.png", covered, names)
    if schedules:
        figures.plot_strides(config.out / "strides.png", strides)
    _print(covered, names, strides)
    print(f"{config.out / 'overlap.json'} and the figures beside it hold the results")


def _print(covered: dict[str, Any], names: list[str], strides: dict[str, dict[str, list[float | None]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for source, values in covered.items():
        mean = 100 * values.mean(axis=0)  # [M, C + 1]
        marks = [step for step in (1, 2, 5, 10, 20, 50, 100, 200) if step <= mean.shape[0]]
        table = Table(title=f"{source}: percent of full attention on each set, by steps since it was chosen")
        table.add_column("set")
        for step in marks:
            table.add_column(str(step), justify="right")
        for place, name in enumerate(names):
            table.add_row(name, *(f"{mean[step - 1, place]:.1f}" for step in marks))
        console.print(table)
    for name, by_source in strides.items():
        for source, layers in by_source.items():
            console.print(f"{name} on {source}, effective stride by layer: {layers}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
