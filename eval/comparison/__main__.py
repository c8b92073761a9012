"""Tables and figures over the rows of several RULER runs: `python -m eval.comparison ROWS...`.

Writes OUT/comparison.md, and for one length OUT/tokens_read.png (score against the tokens that a step reads) and
OUT/stride.png (score against the steps per full step)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from recyc_jax.commands import command_line


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare the policies of RULER runs."""

    rows: tyro.conf.Positional[tuple[Path, ...]]
    """Files of rows, results.jsonl of `eval.ruler`, as they are or compressed (.gz, .xz)."""
    model: str = "qwen2.5-0.5b"
    """The model's shape, a name that `eval.speed` takes, for what a step reads."""
    tasks: str = "niah"
    """Comma-separated tasks whose mean is compared; niah: the eight needle tasks; all: every task in the rows."""
    length: int = 32768
    """The length of the figures."""
    out: Path = Path("results/comparison")


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.comparison", args=args)
    return command_line.run(_prepare, config, "nothing was written")


def _prepare(config: Config) -> Callable[[], None]:
    from eval.comparison import figures, tables
    from recyc_jax.commands import files
    from recyc_jax.shapes import SHAPES

    if config.model not in SHAPES:
        raise ValueError(f"--model {config.model} is unknown; there is {', '.join(SHAPES)}")
    results = tables.Results.read(config.rows, config.tasks)
    files.writable_folder("--out", config.out)

    def write() -> None:
        path = config.out / "comparison.md"
        files.write_text(path, tables.markdown(results, SHAPES[config.model]))
        if config.length in results.lengths:
            points = tables.points(results, config.length, SHAPES[config.model])
            figures.tokens_read(config.out / "tokens_read.png", points, config.length)
            figures.strides(config.out / "stride.png", points, config.length)
        print(f"{path} and the figures beside it hold the comparison")

    return write


if __name__ == "__main__":
    sys.exit(main())
