"""Time of a decode step under each policy: `python -m eval.speed`.

The time is measured on this machine's device, and compared with the least time in which the device could read the bytes
of a step, at its copy bandwidth. With `--estimate` the least time is computed for any known device instead.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import tyro

from eval.speed.config import Config
from recyc_jax.commands import command_line, files


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.speed", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    from eval.speed import estimate, measure
    from recyc_jax import shapes
    from recyc_jax.policies.lossless import Lossless
    from recyc_jax.policies.registry import parse_policy

    lengths = command_line.lengths(config.lengths)
    command_line.check_counts(batch=config.batch, repeats=config.repeats, chips=config.chips)
    command_line.check_policies(config.policies, lengths)
    for text in config.policies:
        if isinstance(parse_policy(text, lengths[0]), Lossless):
            raise ValueError(f"policy {text!r} drafts: `python -m eval.drafts` times and estimates it")
    model = shapes.named_shape(config.model)
    command_line.check_context(lengths, model.max_position_embeddings, config.allow_beyond_context)
    if config.bandwidth is not None and not config.bandwidth > 0:
        raise ValueError(f"--bandwidth {config.bandwidth} must be above 0 GB/s")
    if config.estimate:
        if config.mesh is not None:
            raise ValueError("--mesh measures; with --estimate --chips says how many share the model")
        return lambda: estimate.print_estimate(config, model, lengths)
    for flag in ("device", "chips", "bandwidth"):
        if getattr(config, flag) != next(f.default for f in dataclasses.fields(config) if f.name == flag):
            raise ValueError(f"--{flag} goes with --estimate; without it the device at hand is measured")
    from recyc_jax import implementations
    from recyc_jax.commands import backends

    backends.select(config.backend)
    implementations.resolve(None if config.implementation == "auto" else config.implementation)
    files.writable_folder("--out", config.out)
    mesh = None if config.mesh is None else backends.mesh(config.mesh, model, config.batch)

    def run() -> None:
        with backends.on(mesh):
            measure.measure(config, model, lengths)

    return run


if __name__ == "__main__":
    sys.exit(main())
