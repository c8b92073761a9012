"""Perplexity under several decoding policies: `python -m eval.language_modeling`.

As in section 4 of the paper: of every `--lengths` tokens all but the last `--new-tokens` are prefilled with full attention,
the rest fed one at a time under each policy. Every finished sequence is appended to OUT/results.jsonl, so that the
same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from eval import command
from eval.backend import Backend

if TYPE_CHECKING:
    from eval.documents import Domain
    from eval.runlog import Row, RunLog
    from recyc_jax.pretrained import PretrainedLM


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the perplexity of decoding policies on long documents."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    domains: str = "novels"
    """Comma-separated: novels, essays, latex (182 MB to fetch); NAME=PATH to a file or folder; NAME=DATASET on the hub."""
    lengths: str = "1024"
    """Comma-separated total lengths: context and what is scored, in tokens."""
    new_tokens: int = 256
    """The last tokens of each sequence, which are decoded one at a time and scored."""
    sequences: int = 8
    """Sequences of each domain and length, where there are that many."""
    skip: int = 0
    """Sequences of each domain and length passed over first, in the seed's order: what is tuned on others is held out."""
    policies: tuple[str, ...] = (
        "full",
        "recycled:budget=0.125,stride=10",
        "recycled:budget=0.125,stride=10,lookahead=auto",
        "streaming_llm:budget=0.125",
    )
    """Policies, separated by spaces; a budget with a point is a fraction of the length."""
    seed: int = 42
    """Chooses the sequences."""
    out: Path = Path("results/language_modeling")
    """Folder of results; an interrupted run goes on in it."""
    batch_size: int = 8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"
    tensor: int = 0
    """Devices that share each row's heads, of several; the others take other rows. 0: as many as divide the model."""
    allow_beyond_context: bool = False
    """Allow lengths beyond the model's context."""


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A window of one document."""

    domain: str
    length: int
    index: int
    document: str
    offset: int  # tokens before it in its document
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of one length, of whatever domains, and the policies that all of them lack."""

    policies: tuple[str, ...]
    sequences: list[Sequence]
    rows: int  # of the arrays that they are decoded in: one shape for all batches of a length


def main(args: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(Config, prog="python -m eval.language_modeling", args=args)
    return command.run(_prepare, config, f"the same command goes on with what {config.out} holds")


def _prepare(config: Config) -> Callable[[], None]:
    """Everything up to and including the loading of weights; what is left to do is returned."""
    from eval import backend, documents
    from recyc_jax import pretrained

    lengths = command.lengths(config.lengths)
    command.check_counts(sequences=config.sequences, batch_size=config.batch_size, new_tokens=config.new_tokens)
    command.check_policies(config.policies, lengths)
    if config.skip < 0:
        raise ValueError(f"--skip {config.skip} must be 0 or more")
    if config.new_tokens >= min(lengths):
        raise ValueError(f"--new-tokens {config.new_tokens} leaves no context of --lengths {min(lengths)}")
    specs = command.split("--domains", config.domains)
    names = [spec.partition("=")[0] for spec in specs]
    if len(set(names)) < len(names):
        raise ValueError("--domains names a domain twice")
    backend.select(config.backend, several_hosts=True)
    folder = pretrained.resolve(config.model)
    model_config = pretrained.read_config(folder)
    command.check_context(lengths, model_config.max_position_embeddings, config.allow_beyond_context)
    tokenizer = pretrained.load_tokenizer(folder)
    domains = [documents.load(spec) for spec in specs]
    sequences, notes = windows(config, domains, lengths, tokenizer)
    for note in notes:
        print(note, flush=True)

    import jax.numpy as jnp

    mesh = backend.mesh(config.tensor, model_config)
    dtype = command.dtype_name(config.dtype)
    sources = {
        "weights": folder.name,
        "dtype": dtype,
        **{f"domain {domain.name}": domain.source for domain in domains},
        "sequences": f"SHA-256 {_digest(sequences)}",
    }
    log = _open_log(config, lengths, names, sources)
    todo = list(_batches(config, sequences, log))
    report = functools.partial(_report, config, log, sources, notes)
    if not todo:
        return report
    params = pretrained.load_params(folder, model_config, jnp.dtype(dtype), mesh)
    lm = pretrained.PretrainedLM(params, model_config, tokenizer)

    def evaluate() -> None:
        with backend.on(mesh):
            _evaluate(config, lm, todo, log)
        report()

    return evaluate


def windows(
    config: Config, domains: list[Domain], lengths: list[int], tokenizer: Any
) -> tuple[list[Sequence], list[str]]:
    """Windows of the documents that do not overlap, chosen at random by the seed, and a note for each domain that has
    fewer than were asked for."""
    from rich.progress import track

    tokenizer.model_max_length = sys.maxsize  # long texts on purpose: its warning says nothing here
    found, notes = [], []
    for domain in domains:
        described = f"tokenizing {domain.name}"
        documents = [
            (document.name, tokenizer(document.text)["input_ids"])
            for document in track(domain.documents, described, transient=True)
        ]
        for length in lengths:
            candidates = [
                (name, offset, ids) for name, ids in documents for offset in range(0, len(ids) - length + 1, length)
            ]
            if not candidates:
                raise ValueError(f"--domains: no document of {domain.name} has {length} tokens")
            random.Random(f"{config.seed} {domain.name} {length}").shuffle(candidates)
            if len(candidates) <= config.skip:
                has = f"it has {len(candidates)} sequences of {length} tokens"
                raise ValueError(f"--skip {config.skip} leaves nothing of {domain.name}: {has}")
            chosen = range(config.skip, min(config.skip + config.sequences, len(candidates)))
            for index in chosen:
                name, offset, ids = candidates[index]
                tokens = tuple(ids[offset : offset + length])
                found.append(Sequence(domain.name, length, index, name, offset, tokens))
            if len(chosen) < config.sequences:
                notes.append(f"{domain.name} has {len(chosen)} sequences of {length} tokens, not {config.sequences}")
    return found, notes


def _digest(sequences: list[Sequence]) -> str:
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(repr(dataclasses.astuple(sequence)).encode())
    return digest.hexdigest()[:12]


def _open_log(config: Config, lengths: list[int], domains: list[str], sources: dict[str, str]) -> RunLog:
    from eval.runlog import RunLog

    configuration = {
        "model": config.model,
        "domains": sorted(domains),
        "lengths": sorted(lengths),
        "new_tokens": config.new_tokens,
        "policies": sorted(config.policies),
        "seed": config.seed,
        **sources,
    }
    return RunLog(config.out, configuration, ("policy", "domain", "length", "index"))


def _batches(config: Config, sequences: list[Sequence], log: RunLog) -> Iterator[Batch]:
    """What is not in the log yet."""
    for length in dict.fromkeys(sequence.length for sequence in sequences):
        peers = [sequence for sequence in sequences if sequence.length == length]
        rows = min(config.batch_size, len(peers))
        lacking: dict[tuple[str, ...], list[Sequence]] = {}
        for sequence in peers:
            identity = (sequence.domain, length, sequence.index)
            absent = tuple(policy for policy in config.policies if (policy, *identity) not in log)
            if absent:
                lacking.setdefault(absent, []).append(sequence)
        for policies, some in lacking.items():
            for at in range(0, len(some), rows):
                yield Batch(policies, some[at : at + rows], rows)


def _evaluate(config: Config, lm: PretrainedLM, todo: list[Batch], log: RunLog) -> None:
    total = sum(len(batch.policies) * len(batch.sequences) for batch in todo)
    with command.progress() as progress:
        bar = progress.add_task("evaluating", total=total)
        for batch in todo:
            progress.update(bar, description=f"{batch.sequences[0].length} tokens")
            for rows in _score_batch(config, lm, batch):
                log.append(rows)
                progress.advance(bar, len(rows))
                command.heed_interrupt()


def _score_batch(config: Config, lm: PretrainedLM, batch: Batch) -> Iterator[list[Row]]:
    """The batch's rows under each policy in turn: prefilled once, decoded once a policy."""
    import numpy as np

    import recyc_jax as rj
    from eval import hosts

    length = batch.sequences[0].length
    filled = batch.sequences + batch.sequences[-1:] * (batch.rows - len(batch.sequences))
    tokens = np.asarray([sequence.tokens for sequence in filled], np.int32)
    context, scored = tokens[:, : -config.new_tokens], tokens[:, -config.new_tokens :]
    chosen = [rj.parse_policy(policy, length) for policy in batch.policies]
    state = rj.prefill(lm.params, lm.config, context, policies=chosen, max_new_tokens=config.new_tokens)
    state.logits.block_until_ready()
    for name, policy in zip(batch.policies, chosen, strict=True):
        began = time.perf_counter()
        scores, state = rj.score_after(lm.params, lm.config, state, scored, policy=policy)
        chances, full_steps = (hosts.fetched(field) for field in (scores.log_probabilities, scores.full_steps))
        seconds = (time.perf_counter() - began) / len(batch.sequences)
        yield [
            {
                "policy": name,
                "domain": sequence.domain,
                "length": length,
                "index": sequence.index,
                "document": sequence.document,
                "offset": sequence.offset,
                "nll": round(-float(chances[row].astype(np.float64).mean()), 6),
                "steps": config.new_tokens - 1,
                "full_steps": round(float(full_steps[row].mean()), 3),
                "seconds": round(seconds, 4),
            }
            for row, sequence in enumerate(batch.sequences)
        ]


def _report(config: Config, log: RunLog, sources: dict[str, str], notes: list[str]) -> None:
    from eval import hosts, perplexity

    if not hosts.is_first():
        return
    summary = perplexity.summarise(log.rows, config.policies)
    perplexity.print_tables(summary)
    lengths = list(dict.fromkeys(row["length"] for row in summary))
    facts = command.facts(config, "eval.language_modeling", sources, scored=f"the last {config.new_tokens} tokens")
    path = perplexity.write(config.out, summary, facts, list(command.budgets(config.policies, lengths)), notes)
    print(f"{path}, {path.parent / 'summary.json'} and {log.path} hold the results")


if __name__ == "__main__":
    sys.exit(main())
