"""Continue the training of a checkpoint with recycled attention active: `python -m
train.continued_pretrain`.

Without flags, a short run continues SmolLM2 on texts of Debian packages; `--preset paper` is the paper's recipe
(section 5). A run can be killed at any moment; the same command resumes from its last checkpoint. Writes checkpoints/,
metrics.jsonl, loss.png and model/, the trained model in Hugging Face layout, to OUT."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import tyro

from recyc_jax.commands import command_line, hosts
from train.config import Config, check, with_files


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        arguments = with_files(sys.argv[1:] if args is None else args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = tyro.cli(Config, prog="python -m train.continued_pretrain", args=arguments)
    # this message is for interruptions before the training loop, which handles its own
    return command_line.run(_prepare, config, "nothing was trained yet", lambda: _join(config))


def _join(config: Config) -> None:
    """Connect to the run's other processes, if the flags or the environment name any. This comes before the flags are
    checked, so that the others learn of an error in this process's flags."""
    asked = config.coordinator, config.processes, config.process_id
    if config.cluster or None not in asked:
        hosts.join(*asked, cluster=config.cluster)
    elif asked == (None, None, None):
        hosts.join_named()


def _prepare(config: Config) -> Callable[[], int]:
    """Do everything up to and including the loading of weights; returns a function that does the rest and returns the
    exit status."""
    check(config)
    if config.deterministic:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    from train import dry_run, loop, opening, run

    run.connect(config)
    made = run.make(config)
    if config.dry_run:
        return lambda: dry_run.describe(made)
    opened = opening.open_run(made)
    return lambda: loop.train(made, opened)


if __name__ == "__main__":
    sys.exit(main())
