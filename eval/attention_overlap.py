"""How much attention a recycled set still covers as steps pass: `python -m eval.attention_overlap`.

Full attention decodes the continuation of a prompt, and at every step the probability that falls on each candidate
set is noted, in every layer: sets that were chosen at the prompt's last token and have since taken in every new token, as
between two refreshes, beside StreamingLLM's and the best set of that size for that very step. For policies with the
similarity schedule it also counts how often each layer refreshes. Writes OUT/overlap.json and figures.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import flax.struct
import jax.numpy as jnp
import tyro
from jax import lax

from eval import command
from eval.backend import Backend
from recyc_jax.attention import reference
from recyc_jax.attention.api import Implementation
from recyc_jax.cache import Leaf
from recyc_jax.policies.base import LOOK_EVERY, Attended, Caches, Observed, Observes, Policy, Step
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM

if TYPE_CHECKING:
    from recyc_jax.pretrained import PretrainedLM

IDEAL = "best set of the step"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the attention that recycled sets cover, step by step since they were chosen."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    sources: str = "novels,ruler:niah_single_3"
    """Comma-separated: domains as of eval.language_modeling (their own text follows), ruler:TASK (full attention's
    answer follows)."""
    length: int = 1024
    """Total length: prompt and what follows."""
    new_tokens: int = 64
    """Tokens that follow the prompt."""
    sequences: int = 4
    """Prompts of each source."""
    sets: tuple[str, ...] = (
        "snapkv:budget=0.125",
        "snapkv:budget=0.125,lookahead=9",
        "snapkv:budget=0.125,lookahead=49",
        "streaming_llm:budget=0.125",
    )
    """snapkv and streaming_llm policies, separated by spaces, of one budget: the sets to follow."""
    schedules: tuple[str, ...] = ("recycled:budget=0.125,check_every=5,threshold=0.82",)
    """recycled policies with check_every and threshold: their layers' effective strides."""
    seed: int = 42
    out: Path = Path("results/attention_overlap")
    batch_size: int = 4
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"
    allow_beyond_context: bool = False
    """Allow a length beyond the model's context."""


# --- the probe -------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Followed:
    """One layer: the candidates' states, and what their sets have covered."""

    states: tuple[Any, ...]
    covered: Leaf  # float32 [B, M, C + 1]: probability, the mean over query heads; the best set's last


@dataclasses.dataclass(frozen=True)
class Probe(Policy):
    """Full attention that notes how much of its probability falls on the sets of other policies."""

    candidates: tuple[SnapKV | StreamingLLM, ...]
    steps: int

    @property
    def period(self) -> int:
        return LOOK_EVERY

    @property
    def observes(self) -> Observes:
        wanted = Observes()
        for policy in self.candidates:
            wanted |= policy.observes
        return wanted

    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[Followed, ...]:
        by_index = caches._replace(attention=reference)
        by_policy = [policy.start(observed, by_index) for policy in self.candidates]
        covered = jnp.zeros((caches.visible.shape[0], self.steps, len(self.candidates) + 1), jnp.float32)
        return tuple(Followed(states, covered) for states in zip(*by_policy, strict=True))

    def attend(self, attention: Implementation, step: Step, state: Followed) -> Attended:
        out, weights = attention.full_with_weights(step.q, step.keys, step.values, step.visible)
        shares, states = [], []
        for policy, candidate in zip(self.candidates, state.states, strict=True):
            if isinstance(policy, SnapKV):
                candidate = candidate.insert(step.slot)
                slots = candidate.slots
            else:
                slots = policy.slots(step.starts, step.length, step.keys.shape[2])
                slots = jnp.broadcast_to(slots[:, None], (slots.shape[0], step.keys.shape[1], slots.shape[1]))
            states.append(candidate)
            found = jnp.take_along_axis(weights, jnp.maximum(slots, 0)[:, :, None], axis=3)
            shares.append(jnp.where(slots[:, :, None] >= 0, found, 0))
        budget = min(self.candidates[0].budget, weights.shape[-1])
        shares.append(lax.top_k(jnp.mean(weights, axis=2, keepdims=True), budget)[0])
        now = jnp.stack([jnp.mean(jnp.sum(share, axis=-1), axis=(1, 2)) for share in shares], axis=-1)
        covered = lax.dynamic_update_slice_in_dim(state.covered, now[:, None], step.number - 1, axis=1)
        return Attended(out, Followed(tuple(states), covered), jnp.ones(step.q.shape[0], jnp.bool_))


# --- the command -----------------------------------------------------------------------------------------------------


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(Config, prog="python -m eval.attention_overlap", args=args)
    return command.run(_prepare, config, "nothing was written")


def _prepare(config: Config) -> Callable[[], None]:
    """Everything up to and including the loading of weights; what is left to do is returned."""
    from eval import backend
    from recyc_jax import pretrained

    candidates, schedules = _policies(config)
    command.check_counts(sequences=config.sequences, batch_size=config.batch_size, new_tokens=config.new_tokens - 1)
    if config.new_tokens >= config.length:
        raise ValueError(f"--new-tokens {config.new_tokens} leaves no prompt of --length {config.length}")
    backend.select(config.backend)
    folder = pretrained.resolve(config.model)
    model_config = pretrained.read_config(folder)
    command.check_context([config.length], model_config.max_position_embeddings, config.allow_beyond_context)
    tokenizer = pretrained.load_tokenizer(folder)
    prompts = {source: _prompts(config, source, tokenizer) for source in command.split("--sources", config.sources)}
    dtype = command.dtype_name(config.dtype)
    config.out.mkdir(parents=True, exist_ok=True)
    params = pretrained.load_params(folder, model_config, jnp.dtype(dtype))
    lm = pretrained.PretrainedLM(params, model_config, tokenizer)
    return lambda: _measure(config, lm, prompts, Probe(candidates, config.new_tokens - 1), schedules, dtype)


def _policies(config: Config) -> tuple[tuple[Any, ...], dict[str, Any]]:
    import recyc_jax as rj

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
    """Prompts and what follows them; None where full attention is to answer."""
    from eval import language_modeling, ruler

    if not source.startswith("ruler:"):
        from eval import documents

        like = language_modeling.Config(sequences=config.sequences, seed=config.seed)
        found, _ = language_modeling.windows(like, [documents.load(source)], [config.length], tokenizer)
        cut = config.length - config.new_tokens
        return [(list(window.tokens[:cut]), list(window.tokens[cut:])) for window in found]
    task = source.removeprefix("ruler:")
    like = ruler.Config(tasks=task, lengths=str(config.length), samples=config.sequences, seed=config.seed)
    return [(ids, None) for ids in ruler.prompts(like, tokenizer)]


def _measure(
    config: Config, lm: PretrainedLM, prompts: Any, probe: Probe, schedules: dict[str, Any], dtype: str
) -> None:
    import numpy as np

    import recyc_jax as rj
    from eval.runlog import write_text

    covered: dict[str, Any] = {}
    strides: dict[str, dict[str, list[float | None]]] = {name: {} for name in schedules}
    total = len(prompts) * (1 + len(schedules))
    with command.progress() as progress:
        bar = progress.add_task("following sets", total=total)
        for source, some in prompts.items():
            layers, full_steps = [], {name: [] for name in schedules}
            for at in range(0, len(some), config.batch_size):
                command.heed_interrupt()
                batch = some[at : at + config.batch_size]
                state = rj.prefill(
                    lm.params,
                    lm.config,
                    [ids for ids, _ in batch],
                    policies=[probe, *schedules.values()],
                    max_new_tokens=config.new_tokens,
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
    names = [*config.sets, IDEAL]
    result = {
        "facts": command.facts(config, "eval.attention_overlap", {"dtype": dtype}),
        "covered": {
            source: {name: np.round(values[..., place], 4).tolist() for place, name in enumerate(names)}
            for source, values in covered.items()
        },
        "effective_strides": strides,
    }
    write_text(config.out / "overlap.json", json.dumps(result) + "\n")
    _plot_covered(config.out / "overlap.png", covered, names)
    _plot_layers(config.out / "overlap_layers.png", covered, names)
    if schedules:
        _plot_strides(config.out / "strides.png", strides)
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


def _plot_covered(path: Path, covered: dict[str, Any], names: list[str]) -> None:
    """Mean over layers against steps, a panel a source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(covered), 3.6), layout="constrained")
    panels = figure.subplots(1, len(covered), squeeze=False, sharey=True)[0]
    for axes, (source, values) in zip(panels, covered.items(), strict=True):
        steps = range(1, values.shape[1] + 1)
        for place, name in enumerate(names):
            axes.plot(steps, 100 * values[..., place].mean(axis=0), label=name, ls="--" if name == IDEAL else "-")
        axes.set_title(source)
        axes.set_xlabel("steps since the set was chosen")
    panels[0].set_ylabel("attention on the set, percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def _plot_layers(path: Path, covered: dict[str, Any], names: list[str]) -> None:
    """What each set misses of the best one, layer by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * (len(names) - 1), 3 * len(covered)), layout="constrained")
    grid = figure.subplots(len(covered), len(names) - 1, squeeze=False)
    image = None
    for line, (source, values) in zip(grid, covered.items(), strict=True):
        for place, axes in enumerate(line):
            missed = 100 * (values[..., -1] - values[..., place])
            image = axes.imshow(
                missed, aspect="auto", vmin=0, vmax=50, cmap="magma", extent=(1, values.shape[1], len(values), 0)
            )
            axes.set_title(f"{source}\n{names[place]}", fontsize=7)
            axes.set_xlabel("steps", fontsize=7)
            axes.set_ylabel("layer", fontsize=7)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="attention missed, percent")
    figure.savefig(path, dpi=80)


def _plot_strides(path: Path, strides: dict[str, dict[str, list[float | None]]]) -> None:
    """Effective stride by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2.4 * len(strides)), layout="constrained")
    panels = figure.subplots(len(strides), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (name, by_source) in zip(panels, strides.items(), strict=True):
        for source, layers in by_source.items():
            known = [(layer, stride) for layer, stride in enumerate(layers) if stride is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", ms=3, label=source)
        axes.set_title(name, fontsize=8)
        axes.set_yscale("log")
        axes.set_ylabel("steps per full step")
    panels[-1].set_xlabel("layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
