"""The cells that a RULER run evaluates, one per task and length, and the sources of their samples."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from eval.ruler import material, samples
from eval.ruler.config import Config, check
from eval.ruler.tasks.base import Material, Prompting, Sample
from eval.ruler.tasks.registry import ESSAY_TASKS, TASKS
from recyc_jax.commands.files import fingerprint
from recyc_jax.config import LlamaConfig
from recyc_jax.loading.tokenizer import special_tokens


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task at one length."""

    task: str
    length: int
    new_tokens: int
    metric: str
    count: int
    sample: Callable[[int], Sample]
    longest: int  # the most tokens that a prompt may have, without special tokens
    is_read: bool = False  # from --data, instead of made
    decoded: int = 0  # tokens that the run decodes; the task uses the first `new_tokens`

    def check(self) -> None:
        """Build samples, so that errors are raised before weights are loaded: all samples below 4096 tokens, where some
        may not fit; otherwise the first and the last."""
        for index in range(self.count) if self.length < 4096 else {0, self.count - 1}:
            self.sample(index)


def prompting(tokenizer: Any, template: str, vocabulary: int | None = None) -> Prompting:
    """How samples become prompts of this model. Raises ValueError if the chat template is missing or fails; counting
    tokens raises it for ids beyond the model's `vocabulary` (None: any)."""

    def counts(texts: Sequence[str]) -> list[int]:
        rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # all at once: on as many cores
        highest = max((max(ids, default=0) for ids in rows), default=0)
        if vocabulary is not None and highest >= vocabulary:
            raise ValueError(f"the tokenizer makes the id {highest}, beyond the model's vocabulary of {vocabulary}")
        return [len(ids) for ids in rows]

    def chat(body: str) -> str:
        turns = [{"role": "user", "content": body}]
        # a fixed date, the fallback of Llama 3's templates, which would otherwise insert today's date
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"
        )

    if template == "chat":
        if not tokenizer.chat_template:
            raise ValueError("--template chat: the model's tokenizer has no chat template; use --template base")
        import jinja2

        try:
            chat("x")
        except jinja2.TemplateError as error:
            raise ValueError(f"--template chat: the model's chat template fails ({error})") from None
    # silences the tokenizer's warning about texts beyond its model_max_length, which are intended here
    tokenizer.model_max_length = sys.maxsize
    return Prompting(chat if template == "chat" else lambda body: body, counts)


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt's token ids, after the special tokens that the tokenizer puts before a text, unless the prompt begins
    with BOS itself. What the tokenizer puts behind a text, such as EOS, would end the answer before it begins."""
    special, bos = special_tokens(tokenizer)[0], tokenizer.bos_token
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]  # all at once: on as many cores
    return [
        (special if not (bos and prompt.lstrip().startswith(bos)) else []) + ids
        for prompt, ids in zip(prompts, rows, strict=True)
    ]


def cells(
    config: Config, tasks: list[str], lengths: list[int], prompting: Prompting, model_config: LlamaConfig
) -> tuple[list[Cell], dict[str, str], list[str]]:
    """The cells to run, the sources of their texts, and a note for each task that is skipped. Raises ValueError for
    samples or texts that cannot be read."""
    pairs = [(task, length) for length in lengths for task in tasks]
    if config.data is not None:
        limit = None if config.allow_beyond_context else model_config.max_position_embeddings
        found = [
            _read(config, task, length, prompting, limit)
            for task, length in track(pairs, "reading samples", transient=True)
        ]
        return found, {"samples": str(config.data)}, []
    sources_of_text, sources, notes, missing = _material(config, tasks)
    found = []
    for name, length in pairs:
        if name not in missing:
            task = TASKS[name](name, sources_of_text, prompting, length, config.seed)
            longest = length - task.new_tokens
            found.append(Cell(name, length, task.new_tokens, task.metric, config.samples, task.sample, longest))
    return found, sources, notes


def prompts(config: Config, tokenizer: Any) -> list[list[int]]:
    """The token ids of the prompts of a run, for other commands that use the same samples. Raises ValueError where
    `eval.ruler` would, or if a text is out of reach."""
    tasks, lengths = check(config)
    wrap = prompting(tokenizer, config.template)
    sources_of_text, _, notes, missing = _material(config, tasks)
    if missing:
        raise ValueError(notes[0])
    made = (TASKS[name](name, sources_of_text, wrap, length, config.seed) for length in lengths for name in tasks)
    return prompt_ids(tokenizer, [task.sample(index).prompt for task in made for index in range(config.samples)])


def share_shapes(found: list[Cell]) -> list[Cell]:
    """The cells, with the same prompt width and the same number of decoded tokens for all tasks of a length, so that
    these share one compiled program per policy. Tokens beyond a task's `new_tokens` are dropped before scoring: under
    greedy decoding the first tokens do not depend on how many follow."""
    shared = []
    for cell in found:
        peers = [peer for peer in found if peer.length == cell.length]
        decoded, longest = max(peer.new_tokens for peer in peers), max(peer.longest for peer in peers)
        shared.append(dataclasses.replace(cell, decoded=decoded, longest=longest))
    return shared


def known_digests(found: list[Cell], rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], str]:
    """By task, length and index, the digests of samples that `rows` hold: of all samples that are read from files, and
    of the first and last ones that are made, which depend on the seed, the tokenizer and the texts."""
    there = {(row["task"], row["length"], row["index"]) for row in rows}
    digests = {}
    for cell in found:
        mine = [index for index in range(cell.count) if (cell.task, cell.length, index) in there]
        for index in mine if cell.is_read else mine[:1] + mine[-1:]:
            digests[cell.task, cell.length, index] = cell.sample(index).digest
    return digests


def dump(folder: Path, found: list[Cell], prompting: Prompting) -> None:
    """Write the samples to `folder` in RULER's layout."""
    overhead = prompting.count(prompting.wrap("x")) - prompting.count("x")
    for cell in found:
        drawn = map(cell.sample, range(cell.count))
        print(samples.write(folder, cell.length, cell.task, drawn, overhead, prompting.count))


def _read(config: Config, task: str, length: int, prompting: Prompting, limit: int | None) -> Cell:
    assert config.data is not None
    kind = TASKS[task]
    found = samples.read(config.data, length, task, config.samples, prompting.counts, kind.new_tokens, limit)
    longest = max(length, *(sample.length for sample in found)) - kind.new_tokens
    return Cell(task, length, kind.new_tokens, kind.metric, len(found), found.__getitem__, longest, is_read=True)


def _material(config: Config, tasks: list[str]) -> tuple[Material, dict[str, str], list[str], set[str]]:
    """The texts of the tasks, their sources by name, a note for each missing source, and the tasks that lack one."""
    sources, notes, missing = {}, [], set()
    essays = None
    if ESSAY_TASKS & set(tasks):
        essays, sources["essay haystack"] = material.essays(config.essays)
    sets = {}
    for task, flag, path, load in (
        ("qa_1", "--qa-squad dev-v2.0.json", config.qa_squad, material.squad),
        ("qa_2", "--qa-hotpot hotpot_dev_distractor_v1.json", config.qa_hotpot, material.hotpot),
    ):
        if task in tasks:
            sets[task] = load(path)
            if sets[task] is None:
                missing.add(task)
                notes.append(f"{task} is skipped: the hub is out of reach; get the official file and pass {flag}")
            else:
                sources[task] = f"{Path(path).name}, SHA-256 {fingerprint(Path(path))}" if path else "hub"
    return Material(material.words(), essays, sets.get("qa_1"), sets.get("qa_2")), sources, notes, missing
