"""Perplexity under several decoding policies: `python -m eval.language_modeling`.

As in section 4 of the paper, all but the last `--new-tokens` tokens of a sequence are prefilled with full attention;
the last ones are fed one at a time under each policy. Every finished sequence is appended to OUT/results.jsonl, so the
same command resumes an interrupted run."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from recyc_jax.commands import command_line
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    from recyc_jax.commands.run_log import RunLog


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the perplexity of decoding policies on long documents."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    domains: str = "novels"
    """Comma-separated: novels, essays, latex (182 MB to fetch); NAME=PATH or NAME=PATH:COLUMN to a text, JSON-lines or
    parquet file or a folder of them; NAME=glob:PATTERN; NAME=DATASET or NAME=DATASET:CONFIG:SPLIT:COLUMN on the hub."""
    lengths: str = "1024"
    """Comma-separated total lengths (context and scored tokens) in tokens."""
    new_tokens: int = 256
    """Tokens at the end of each sequence that are decoded one at a time and scored."""
    sequences: int = 8
    """Sequences per domain and length, or as many as there are."""
    skip: int = 0
    """Sequences per domain and length to skip first, in the seed's order, so that sequences used for tuning stay
    out."""
    policies: tuple[str, ...] = (
        "full",
        "lookahead:budget=0.125,stride=10",
        "recycled:budget=0.125,stride=10",
        "streaming_llm:budget=0.125",
    )
    """Policies, separated by spaces; a budget with a decimal point is a fraction of the length."""
    seed: int = 42
    """Chooses the sequences."""
    out: Path = Path("results/language_modeling")
    """Results folder; an interrupted run resumes from it, and a run with further policies, domains, lengths or
    sequences adds to it."""
    fresh: bool = False
    """Put the results in --out aside, and begin anew."""
    batch_size: int = 8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"
    mesh: str = "auto"
    """How devices share the work: `data=2,tensor=2` is two groups that take different rows, in each of which two devices
    share a row's heads. auto: as many groups as divide the batch and have memory for the weights."""
    allow_beyond_context: bool = False
    """Allow lengths beyond the model's context length."""


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.language_modeling", args=args)
    return command_line.run(_prepare, config, f"the same command resumes from what {config.out} holds")


def _prepare(config: Config) -> Callable[[], None]:
    """Do everything up to and including the loading of weights; returns a function that does the rest."""
    from eval.language_modeling import run
    from eval.language_modeling import windows as cutting
    from recyc_jax.commands import backends, documents
    from recyc_jax.loading import identity, pretrained, weights

    lengths = command_line.lengths(config.lengths)
    command_line.check_counts(sequences=config.sequences, batch_size=config.batch_size, new_tokens=config.new_tokens)
    command_line.check_policies(config.policies, lengths)
    if config.skip < 0:
        raise ValueError(f"--skip {config.skip} must be 0 or more")
    if config.new_tokens >= min(lengths):
        raise ValueError(f"--new-tokens {config.new_tokens} leaves no context of --lengths {min(lengths)}")
    specs = documents.split("--domains", config.domains)
    names = [spec.partition("=")[0] for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError("--domains names a domain twice")
    backends.select(config.backend, several_hosts=True)
    folder, model_config, tokenizer = pretrained.open_checkpoint(config.model)
    command_line.check_context(lengths, model_config.max_position_embeddings, config.allow_beyond_context)
    domains = [documents.load(spec) for spec in specs]
    windows, notes = cutting.windows(
        domains,
        lengths,
        tokenizer,
        count=config.sequences,
        skip=config.skip,
        seed=config.seed,
        vocabulary=model_config.vocab_size,
    )
    for note in notes:
        print(note, flush=True)

    import jax.numpy as jnp

    mesh = backends.mesh(config.mesh, model_config, config.batch_size)
    dtype = command_line.dtype_name(config.dtype)
    sources = {
        "weights": identity.of_weights(folder),
        "dtype": dtype,
        **{f"domain {domain.name}": domain.source for domain in domains},
    }
    log = _open_log(config, sources, identity.of_tokenizer(tokenizer))
    log.check_samples({window.key: window.digest for window in windows})
    todo = list(run.batches(windows, config.policies, config.batch_size, log))
    report = functools.partial(_report, config, log, {window.key for window in windows}, sources, notes)
    if not todo:
        return report
    params = weights.load_params(folder, model_config, jnp.dtype(dtype), mesh)
    lm = pretrained.PretrainedLM(params, model_config, tokenizer)

    def evaluate() -> None:
        with backends.on(mesh):
            run.evaluate(lm, todo, config.new_tokens, log)
        report()

    return evaluate


def _open_log(config: Config, sources: dict[str, str], tokenizer: str) -> RunLog:
    from recyc_jax.commands.run_log import RunLog

    configuration = {
        "weights": sources["weights"],
        "tokenizer": tokenizer,
        "dtype": sources["dtype"],
        "new_tokens": config.new_tokens,
        "seed": config.seed,
    }
    return RunLog(config.out, configuration, ("policy", "domain", "length", "index"), config.fresh)


def _report(
    config: Config, log: RunLog, asked: set[tuple[str, int, int]], sources: dict[str, str], notes: list[str]
) -> None:
    """Write the report of the windows and policies that this command names."""
    from eval.language_modeling import report
    from recyc_jax.commands import hosts

    if not hosts.is_first():
        return
    summary = report.summarise(log.rows_of(config.policies, asked), config.policies)
    report.print_tables(summary)
    lengths = list(dict.fromkeys(row["length"] for row in summary))
    facts = command_line.facts(config, "eval.language_modeling", sources, scored=f"the last {config.new_tokens} tokens")
    path = report.write(config.out, summary, facts, list(command_line.budgets(config.policies, lengths)), notes)
    print(f"{path}, {path.parent / 'summary.json'} and {log.path} hold the results")


if __name__ == "__main__":
    sys.exit(main())
