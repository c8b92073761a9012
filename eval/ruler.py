"""RULER under several decoding policies: `python -m eval.ruler`.

Samples are built (or read), prompts prefilled once a batch, and decoded under each policy in turn. Every finished sample
is appended to OUT/results.jsonl, so that the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from eval import command
from eval.backend import Backend

if TYPE_CHECKING:
    from eval.runlog import Row, RunLog
    from eval.tasks.base import Material, Prompting, Sample
    from recyc_jax.config import LlamaConfig
    from recyc_jax.pretrained import PretrainedLM

MOST_COMMON_PERIOD = 50  # decode steps that a run may add so that all policies end with a period
DEFAULT_TASKS = "niah_single_1,niah_single_2,niah_single_3,niah_multivalue,niah_multiquery"


@dataclasses.dataclass(frozen=True)
class Config:
    """Score decoding policies on RULER."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    tasks: str = DEFAULT_TASKS
    """Comma-separated task names, or all (13)."""
    lengths: str = "1024"
    """Comma-separated total lengths: prompt and answer, in tokens."""
    samples: int = 6
    """Samples of each task and length."""
    policies: tuple[str, ...] = (
        "full",
        "recycled:budget=0.125,stride=10",
        "recycled:budget=0.125,stride=10,lookahead=auto",
    )
    """Policies, separated by spaces; a budget with a point is a fraction of the length."""
    template: Literal["base", "chat"] = "base"
    """base: the bare prompt. chat: the tokenizer's chat template around it."""
    seed: int = 42
    out: Path = Path("results/ruler")
    """Folder of results; an interrupted run goes on in it."""
    batch_size: int = 6
    dump_samples: Path | None = None
    """Write the samples to this folder in RULER's layout and stop."""
    data: Path | None = None
    """Evaluate the samples of this folder, in RULER's layout (DIR/LENGTH/data/TASK/validation.jsonl)."""
    essays: str | None = None
    """Text of essay haystacks: a text file or RULER's PaulGrahamEssays.json."""
    qa_squad: str | None = None
    """SQuAD 2.0's dev-v2.0.json, for qa_1."""
    qa_hotpot: str | None = None
    """HotpotQA's hotpot_dev_distractor_v1.json, for qa_2."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"
    tensor: int = 0
    """Devices that share each row's heads, of several; the others take other rows. 0: as many as divide the model."""
    allow_beyond_context: bool = False
    """Allow lengths beyond the model's context."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task at one length: how many samples, and where each comes from."""

    task: str
    length: int
    new_tokens: int
    metric: str
    count: int
    sample: Callable[[int], Sample]
    longest: int  # prompt, without special tokens
    decoded: int = 0  # tokens that the run decodes, of which the task takes its `new_tokens`

    def check(self) -> None:
        """Meet what could fail, before weights load: the search for a size and, where space is tight, any sample."""
        for index in range(self.count) if self.length < 4096 else {0, self.count - 1}:
            self.sample(index)


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(Config, prog="python -m eval.ruler", args=args)
    return command.run(_prepare, config, f"the same command goes on with what {config.out} holds")


def _prepare(config: Config) -> Callable[[], None]:
    """Everything up to and including the loading of weights; what is left to do is returned."""
    from rich.progress import track

    from eval import backend
    from recyc_jax import pretrained

    tasks, lengths = _check(config)
    backend.select(config.backend, several_hosts=True)
    folder = pretrained.resolve(config.model)
    model_config = pretrained.read_config(folder)
    command.check_context(lengths, model_config.max_position_embeddings, config.allow_beyond_context)
    tokenizer = pretrained.load_tokenizer(folder)
    prompting = _prompting(tokenizer, config.template)
    cells, sources, notes = _cells(config, tasks, lengths, prompting, model_config)
    cells = _share_shapes(cells, config.policies)
    for note in notes:
        print(note, flush=True)
    if not cells:
        raise ValueError("no task is left to run")
    if config.dump_samples is not None:
        for cell in cells:
            cell.check()
        _dump(config.dump_samples, cells, prompting)
        return lambda: None

    import jax.numpy as jnp

    dtype = command.dtype_name(config.dtype)
    mesh = backend.mesh(config.tensor, model_config)
    log = _open_log(config, cells, {"weights": folder.name, "dtype": dtype, **sources})
    todo = list(_batches(config, cells, log))
    wanted = {id(cell): cell for batch in todo for cell, _ in batch.samples}
    for cell in track(wanted.values(), "checking samples", transient=True):
        cell.check()
    report = functools.partial(_report, config, log, {"weights": folder.name, "dtype": dtype, **sources}, notes)
    if not todo:
        return report
    params = pretrained.load_params(folder, model_config, jnp.dtype(dtype), mesh)
    lm = pretrained.PretrainedLM(params, model_config, tokenizer)

    def evaluate() -> None:
        with backend.on(mesh):
            _evaluate(lm, todo, log)
        report()

    return evaluate


# --- before weights load ---------------------------------------------------------------------------------------------


def _check(config: Config) -> tuple[list[str], list[int]]:
    """The tasks and lengths asked for. Raises ValueError, naming the flag, for what can be told without a model."""
    from eval.tasks.registry import TASKS

    tasks = list(TASKS) if config.tasks == "all" else command.split("--tasks", config.tasks)
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks: {task!r} is unknown; there is {', '.join(TASKS)} (or all)")
    lengths = command.lengths(config.lengths)
    command.check_counts(samples=config.samples, batch_size=config.batch_size)
    command.check_policies(config.policies, lengths)
    if config.data is not None and (config.dump_samples is not None or config.template != "base"):
        raise ValueError("--data brings samples as they are: it goes neither with --dump-samples nor with --template")
    if config.data is not None and (config.essays or config.qa_squad or config.qa_hotpot):
        raise ValueError(
            "--data brings samples as they are: --essays, --qa-squad and --qa-hotpot have no use beside it"
        )
    if config.data is not None and not config.data.is_dir():
        raise ValueError(f"--data {config.data}: there is no such folder")
    return tasks, lengths


def _prompting(tokenizer: Any, template: str) -> Prompting:
    from eval.tasks.base import Prompting

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def chat(body: str) -> str:
        turns = [{"role": "user", "content": body}]
        # Llama 3's templates print today's date unless given one; this is the one that they have built in
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
    # long texts on purpose: the tokenizer's warning about its model_max_length says nothing here
    tokenizer.model_max_length = sys.maxsize
    return Prompting(chat if template == "chat" else lambda body: body, count)


def _cells(
    config: Config, tasks: list[str], lengths: list[int], prompting: Prompting, model_config: LlamaConfig
) -> tuple[list[Cell], dict[str, str], list[str]]:
    """The cells to run, the sources of their texts, and a note for each task that is left out."""
    from rich.progress import track

    from eval.tasks.registry import TASKS

    pairs = [(task, length) for length in lengths for task in tasks]
    if config.data is not None:
        longest = None if config.allow_beyond_context else model_config.max_position_embeddings
        cells = [
            _read(config, task, length, prompting, longest)
            for task, length in track(pairs, "reading samples", transient=True)
        ]
        digest = hashlib.sha256()
        for cell in cells:
            for index in range(cell.count):
                digest.update(repr(cell.sample(index)).encode())
        return cells, {"samples": f"{config.data}, SHA-256 {digest.hexdigest()[:12]}"}, []
    material, sources, notes, missing = _material(config, tasks)
    cells = []
    for name, length in pairs:
        if name not in missing:
            task = TASKS[name](name, material, prompting, length, config.seed)
            longest = length - task.new_tokens
            cells.append(Cell(name, length, task.new_tokens, task.metric, config.samples, task.sample, longest))
    return cells, sources, notes


def prompts(config: Config, tokenizer: Any) -> list[list[int]]:
    """The token ids of a run's prompts, for other looks at the same samples. Raises ValueError as the command would."""
    from eval.tasks.registry import TASKS

    tasks, lengths = _check(config)
    prompting = _prompting(tokenizer, config.template)
    material, _, notes, missing = _material(config, tasks)
    if missing:
        raise ValueError(notes[0])
    return [
        _ids(tokenizer, TASKS[name](name, material, prompting, length, config.seed).sample(index).prompt)
        for length in lengths
        for name in tasks
        for index in range(config.samples)
    ]


def _share_shapes(cells: list[Cell], policies: Sequence[str]) -> list[Cell]:
    """The cells with one prompt width and one number of decoded tokens for all tasks of a length, which so share one
    compilation a policy. The steps are whole periods of every policy where that takes few more, since what is left over
    is compiled apart. What a task does not take of the tokens is dropped before scoring: greedy decoding makes
    the same ones, however many follow."""
    from recyc_jax.policies.registry import parse_policy

    shared = []
    for cell in cells:
        peers = [peer for peer in cells if peer.length == cell.length]
        decoded, longest = max(peer.new_tokens for peer in peers), max(peer.longest for peer in peers)
        common = math.lcm(*(parse_policy(policy, cell.length).period for policy in policies))
        if common <= MOST_COMMON_PERIOD:
            decoded = 1 + -(-(decoded - 1) // common) * common
        shared.append(dataclasses.replace(cell, decoded=decoded, longest=longest))
    return shared


def _read(config: Config, task: str, length: int, prompting: Prompting, limit: int | None) -> Cell:
    from eval import samples
    from eval.tasks.registry import TASKS

    assert config.data is not None
    kind = TASKS[task]
    found = samples.read(config.data, length, task, config.samples, prompting.count, kind.new_tokens, limit)
    longest = max(length, *(sample.length for sample in found)) - kind.new_tokens
    return Cell(task, length, kind.new_tokens, kind.metric, len(found), found.__getitem__, longest)


def _material(config: Config, tasks: list[str]) -> tuple[Material, dict[str, str], list[str], set[str]]:
    """What the tasks draw on, the names of its sources, a note for each missing one, and the tasks that need those."""
    from eval import texts
    from eval.tasks.base import Material
    from eval.tasks.registry import ESSAY_TASKS

    sources, notes, missing = {}, [], set()
    essays = None
    if ESSAY_TASKS & set(tasks):
        essays, sources["essay haystack"] = texts.essays(config.essays)
    sets = {}
    for task, flag, path, load in (
        ("qa_1", "--qa-squad dev-v2.0.json", config.qa_squad, texts.squad),
        ("qa_2", "--qa-hotpot hotpot_dev_distractor_v1.json", config.qa_hotpot, texts.hotpot),
    ):
        if task in tasks:
            sets[task] = load(path)
            if sets[task] is None:
                missing.add(task)
                notes.append(f"{task} is skipped: the hub is out of reach; get the official file and pass {flag}")
            else:
                sources[task] = f"{Path(path).name}, SHA-256 {texts.fingerprint(Path(path))}" if path else "hub"
    return Material(texts.words(), essays, sets.get("qa_1"), sets.get("qa_2")), sources, notes, missing


def _dump(folder: Path, cells: list[Cell], prompting: Prompting) -> None:
    from eval import samples

    overhead = prompting.count(prompting.wrap("x")) - prompting.count("x")
    for cell in cells:
        found = map(cell.sample, range(cell.count))
        print(samples.write(folder, cell.length, cell.task, found, overhead, prompting.count))


def _open_log(config: Config, cells: list[Cell], sources: dict[str, str]) -> RunLog:
    from eval.runlog import RunLog

    configuration = {
        "model": config.model,
        "tasks": sorted({cell.task for cell in cells}),
        "lengths": sorted({cell.length for cell in cells}),
        "samples": config.samples,
        "policies": sorted(config.policies),
        "template": config.template,
        "seed": config.seed,
        **sources,
    }
    return RunLog(config.out, configuration, ("policy", "task", "length", "index"))


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one length, of whatever tasks, and the policies that all of them lack."""

    policies: tuple[str, ...]
    samples: list[tuple[Cell, int]]  # with their indices
    rows: int  # of the arrays that they are decoded in: one shape for all batches of a length


def _batches(config: Config, cells: list[Cell], log: RunLog) -> Iterator[Batch]:
    """What is not in the log yet."""
    for length in dict.fromkeys(cell.length for cell in cells):
        peers = [cell for cell in cells if cell.length == length]
        rows = min(config.batch_size, sum(cell.count for cell in peers))
        lacking: dict[tuple[str, ...], list[tuple[Cell, int]]] = {}
        for cell in peers:
            for index in range(cell.count):
                absent = tuple(name for name in config.policies if (name, cell.task, length, index) not in log)
                if absent:
                    lacking.setdefault(absent, []).append((cell, index))
        for policies, samples in lacking.items():
            for at in range(0, len(samples), rows):
                yield Batch(policies, samples[at : at + rows], rows)


def _evaluate(lm: PretrainedLM, todo: list[Batch], log: RunLog) -> None:
    total = sum(len(batch.policies) * len(batch.samples) for batch in todo)
    with command.progress() as progress:
        bar = progress.add_task("evaluating", total=total)
        for batch in todo:
            progress.update(bar, description=f"{batch.samples[0][0].length} tokens")
            for rows in _decode_batch(lm, batch):
                log.append(rows)
                progress.advance(bar, len(rows))
                command.heed_interrupt()


def _decode_batch(lm: PretrainedLM, batch: Batch) -> Iterator[list[Row]]:
    """The batch's rows under each policy in turn: prefilled once, decoded once a policy."""
    import numpy as np

    import recyc_jax as rj
    from eval import hosts, scoring

    cells = [cell for cell, _ in batch.samples]
    samples = [cell.sample(index) for cell, index in batch.samples]
    prompts = [_ids(lm.tokenizer, sample.prompt) for sample in samples]
    width = cells[0].longest + len(lm.tokenizer("")["input_ids"])
    tokens, lengths = np.zeros((batch.rows, width), np.int32), np.zeros(batch.rows, np.int32)
    for row in range(batch.rows):
        ids = prompts[min(row, len(prompts) - 1)]  # the last batch is filled up with its last row: one shape again
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    chosen = [rj.parse_policy(policy, cells[0].length) for policy in batch.policies]
    state = rj.prefill(
        lm.params, lm.config, tokens, prompt_lengths=lengths, policies=chosen, max_new_tokens=cells[0].decoded
    )
    state.logits.block_until_ready()
    for name, policy in zip(batch.policies, chosen, strict=True):
        began = time.perf_counter()
        out, state = rj.decode(lm.params, lm.config, state, policy=policy)
        made, counts, full_steps = (hosts.fetched(field) for field in out)
        seconds = (time.perf_counter() - began) / len(samples)
        rows = []
        for row, (cell, sample, ids) in enumerate(zip(cells, samples, prompts, strict=True)):
            taken = made[row, : min(counts[row], cell.new_tokens)]
            prediction = scoring.clean(lm.tokenizer.decode(taken, skip_special_tokens=True))
            rows.append(
                {
                    "policy": name,
                    "task": cell.task,
                    "length": cell.length,
                    "index": sample.index,
                    "prompt_tokens": len(ids),
                    "prediction": prediction,
                    "references": list(sample.outputs),
                    "score": scoring.score(prediction, sample.outputs, cell.metric),
                    "steps": int(counts[row]) - 1,
                    "full_steps": round(float(full_steps[row].mean()), 3),
                    "seconds": round(seconds, 4),
                }
            )
        yield rows


def _ids(tokenizer: Any, prompt: str) -> list[int]:
    """The prompt's tokens, with the special ones that the tokenizer adds unless the prompt brings its own."""
    begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
    return tokenizer(prompt, add_special_tokens=not begun)["input_ids"]


def _report(config: Config, log: RunLog, sources: dict[str, str], notes: list[str]) -> None:
    from eval import hosts, report

    if not hosts.is_first():
        return
    summary = report.summarise(log.rows, config.policies)
    report.print_tables(summary)
    lengths = list(dict.fromkeys(row["length"] for row in summary))
    template = config.template if config.data is None else "as the samples bring it"
    facts = command.facts(config, "eval.ruler", sources, template=template)
    path = report.write(config.out, summary, facts, list(command.budgets(config.policies, lengths)), notes)
    print(f"{path}, {path.parent / 'summary.json'} and {log.path} hold the results")


if __name__ == "__main__":
    sys.exit(main())
