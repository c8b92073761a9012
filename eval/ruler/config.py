"""The flags of `python -m eval.ruler`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from recyc_jax.commands import command_line
from recyc_jax.commands.backends import Backend

DEFAULT_TASKS = "niah_single_1,niah_single_2,niah_single_3,niah_multivalue,niah_multiquery"


@dataclasses.dataclass(frozen=True)
class Config:
    """Score decoding policies on RULER."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    tasks: str = DEFAULT_TASKS
    """Comma-separated task names, all (RULER's 13) or long (ours, with answers of some hundred tokens)."""
    lengths: str = "1024"
    """Comma-separated total lengths (prompt and answer) in tokens."""
    samples: int = 6
    """Samples per task and length."""
    policies: tuple[str, ...] = (
        "full",
        "lookahead:budget=0.125,stride=10",
        "recycled:budget=0.125,stride=10",
    )
    """Policies, separated by spaces; a budget with a decimal point is a fraction of the length."""
    template: Literal["base", "chat"] = "base"
    """base: the prompt alone. chat: the prompt in the tokenizer's chat template."""
    seed: int = 42
    out: Path = Path("results/ruler")
    """Results folder; an interrupted run resumes from it, and a run with further policies, tasks, lengths or samples
    adds to it."""
    fresh: bool = False
    """Put the results in --out aside, and begin anew."""
    batch_size: int = 6
    dump_samples: Path | None = None
    """Write the samples to this folder in RULER's layout, and end."""
    data: Path | None = None
    """Evaluate the samples in this folder, which has RULER's layout (DIR/LENGTH/data/TASK/validation.jsonl)."""
    essays: str | None = None
    """Text for essay haystacks: a text file or RULER's PaulGrahamEssays.json."""
    qa_squad: str | None = None
    """SQuAD 2.0's dev-v2.0.json, for qa_1."""
    qa_hotpot: str | None = None
    """HotpotQA's hotpot_dev_distractor_v1.json, for qa_2."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"
    mesh: str = "auto"
    """How devices share the work: `data=2,tensor=2` is two groups that take different rows, in each of which two devices
    share a row's heads. auto: as many groups as divide the batch and have memory for the weights."""
    allow_beyond_context: bool = False
    """Allow lengths beyond the model's context length."""


def check(config: Config, known: command_line.KnownPolicies = None) -> tuple[list[str], list[int]]:
    """The tasks and lengths that the flags name. Raises ValueError, naming the flag, for errors that can be found
    without a model."""
    from eval.ruler.tasks.registry import LONG_TASKS, RULER_TASKS, TASKS

    groups = {"all": list(RULER_TASKS), "long": list(LONG_TASKS)}
    tasks = groups.get(config.tasks) or command_line.split("--tasks", config.tasks)
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks: {task!r} is unknown; there is {', '.join(TASKS)} (or all, or long)")
    lengths = command_line.lengths(config.lengths)
    command_line.check_counts(samples=config.samples, batch_size=config.batch_size)
    command_line.check_policies(config.policies, lengths, known)
    if config.data is not None and (config.dump_samples is not None or config.template != "base"):
        raise ValueError("--data brings samples as they are: it goes neither with --dump-samples nor with --template")
    if config.data is not None and (config.essays or config.qa_squad or config.qa_hotpot):
        raise ValueError(
            "--data brings samples as they are: --essays, --qa-squad and --qa-hotpot have no use beside it"
        )
    if config.data is not None and not config.data.is_dir():
        raise ValueError(f"--data {config.data}: there is no such folder")
    return tasks, lengths
