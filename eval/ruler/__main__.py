"""RULER under several decoding policies: `python -m eval.ruler`.

Samples are built (or read); each batch of prompts is prefilled once and decoded under each policy in turn. Every
finished sample is appended to OUT/results.jsonl, so the same command resumes an interrupted run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import tyro

from eval.ruler.config import Config, check
from recyc_jax.commands import command_line

if TYPE_CHECKING:
    from recyc_jax.commands.run_log import RunLog


def main(args: list[str] | None = None, known: Callable[[], command_line.KnownPolicies] = lambda: None) -> int:
    """Run the command and return its exit status. `known` returns the methods that policy strings may name; None stands
    for the registered methods."""
    config = tyro.cli(Config, prog="python -m eval.ruler", args=args)
    return command_line.run(
        lambda config: _prepare(config, known()), config, f"the same command resumes from what {config.out} holds"
    )


def _prepare(config: Config, known: command_line.KnownPolicies) -> Callable[[], None]:
    """Do everything up to and including the loading of weights; returns a function that does the rest."""
    from rich.progress import track

    from eval.ruler import cells as making
    from eval.ruler import run
    from recyc_jax.commands import backends
    from recyc_jax.loading import identity, pretrained, weights

    tasks, lengths = check(config, known)
    backends.select(config.backend, several_hosts=True)
    folder, model_config, tokenizer = pretrained.open_checkpoint(config.model)
    command_line.check_context(lengths, model_config.max_position_embeddings, config.allow_beyond_context)
    prompting = making.prompting(tokenizer, config.template, model_config.vocab_size)
    cells, sources, notes = making.cells(config, tasks, lengths, prompting, model_config)
    cells = making.share_shapes(cells)
    for note in notes:
        print(note, flush=True)
    if not cells:
        raise ValueError("no task is left to run")
    if config.dump_samples is not None:
        for cell in cells:
            cell.check()
        making.dump(config.dump_samples, cells, prompting)
        return lambda: None

    import jax.numpy as jnp

    dtype = command_line.dtype_name(config.dtype)
    mesh = backends.mesh(config.mesh, model_config, config.batch_size)
    sources = {"weights": identity.of_weights(folder), "dtype": dtype, **sources}
    log = _open_log(config, sources, identity.of_tokenizer(tokenizer))
    log.check_samples(making.known_digests(cells, log.rows))
    todo = list(run.batches(config, cells, log))
    wanted = {id(cell): cell for batch in todo for cell, _ in batch.samples}
    for cell in track(wanted.values(), "checking samples", transient=True):
        cell.check()
    asked = {(cell.task, cell.length, index) for cell in cells for index in range(cell.count)}
    report = functools.partial(_report, config, log, asked, sources, notes, known)
    if not todo:
        return report
    params = weights.load_params(folder, model_config, jnp.dtype(dtype), mesh)
    lm = pretrained.PretrainedLM(params, model_config, tokenizer)

    def evaluate() -> None:
        with backends.on(mesh):
            run.evaluate(lm, todo, log, known)
        report()

    return evaluate


def _open_log(config: Config, sources: dict[str, str], tokenizer: str) -> RunLog:
    from recyc_jax.commands.run_log import RunLog

    configuration = {
        "tokenizer": tokenizer,
        "template": config.template,
        "seed": config.seed,
        "samples": "made" if config.data is None else "read from --data",
        **{name: source for name, source in sources.items() if name != "samples"},
    }
    return RunLog(config.out, configuration, ("policy", "task", "length", "index"), config.fresh)


def _report(
    config: Config,
    log: RunLog,
    asked: set[tuple[str, int, int]],
    sources: dict[str, str],
    notes: list[str],
    known: command_line.KnownPolicies,
) -> None:
    """Write the report of the samples and policies that this command names."""
    from eval.ruler import report
    from recyc_jax.commands import hosts

    if not hosts.is_first():
        return
    summary = report.summarise(log.rows_of(config.policies, asked), config.policies)
    report.print_tables(summary)
    lengths = list(dict.fromkeys(row["length"] for row in summary))
    template = config.template if config.data is None else "as the samples bring it"
    facts = command_line.facts(config, "eval.ruler", sources, template=template)
    budgets = list(command_line.budgets(config.policies, lengths, known))
    path = report.write(config.out, summary, facts, budgets, notes)
    print(f"{path}, {path.parent / 'summary.json'} and {log.path} hold the results")


if __name__ == "__main__":
    sys.exit(main())
