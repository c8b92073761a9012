"""The evaluation loop: every batch of samples is prefilled once and decoded under each policy in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

import recyc_jax as rj
from eval.ruler import scoring
from eval.ruler.cells import Cell, prompt_ids
from eval.ruler.config import Config
from eval.ruler.tasks.base import Sample
from recyc_jax import generation, sharding
from recyc_jax.commands import command_line, run_log
from recyc_jax.commands.background import one_ahead
from recyc_jax.commands.compiling import Programs
from recyc_jax.commands.run_log import Row, RunLog
from recyc_jax.policies.registry import POLICIES

GREEDY = rj.chain()


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples of one length, of any tasks, and the policies that all of them still have to be decoded under."""

    policies: tuple[str, ...]
    samples: list[tuple[Cell, int]]  # each with its index in the cell
    rows: int  # rows of the prompt array, the same for all batches of a length


def batches(config: Config, cells: list[Cell], log: RunLog) -> Iterator[Batch]:
    """The batches of samples and policies that are not in the log yet."""
    for length in dict.fromkeys(cell.length for cell in cells):
        items = [(cell, index) for cell in cells if cell.length == length for index in range(cell.count)]
        rows = min(config.batch_size, len(items))
        for policies, some in run_log.batches(
            log, config.policies, items, lambda item: (item[0].task, item[0].length, item[1]), rows
        ):
            yield Batch(policies, some, rows)


def evaluate(lm: rj.PretrainedLM, todo: list[Batch], log: RunLog, known: command_line.KnownPolicies) -> None:
    """Decode all batches; samples are logged after each batch and policy."""
    total = sum(len(batch.policies) * len(batch.samples) for batch in todo)

    def lower(state: rj.Prefilled, policy: rj.Policy) -> Any:
        return generation.lower_decode(lm.params, lm.config, state, policy=policy)

    with command_line.progress() as progress, Programs(lower) as programs:
        bar = progress.add_task("evaluating", total=total)
        for batch, prompts in one_ahead(todo, lambda batch: _made_prompts(lm.tokenizer, batch)):
            progress.update(bar, description=f"{batch.samples[0][0].length} tokens")
            for rows in _decode_batch(lm, batch, prompts, known, programs):
                log.append(rows)
                progress.advance(bar, len(rows))
                command_line.heed_interrupt()


class Prompts(NamedTuple):
    """A batch's samples, as text and as tokens."""

    samples: list[Sample]
    ids: list[list[int]]
    tokens: np.ndarray  # int32 [B, T]
    lengths: np.ndarray  # int32 [B]


def _made_prompts(tokenizer: Any, batch: Batch) -> Prompts:
    """The batch's prompts, which take some 0.1 s each at 32,768 tokens to make."""
    samples = [cell.sample(index) for cell, index in batch.samples]
    rows = prompt_ids(tokenizer, [sample.prompt for sample in samples])
    width = batch.samples[0][0].longest + len(tokenizer("")["input_ids"])
    tokens, lengths = np.zeros((batch.rows, width), np.int32), np.zeros(batch.rows, np.int32)
    for row in range(batch.rows):
        ids = rows[min(row, len(rows) - 1)]  # a short batch repeats its last row, to keep one shape
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return Prompts(samples, rows, tokens, lengths)


def _decode_batch(
    lm: rj.PretrainedLM, batch: Batch, prompts: Prompts, known: command_line.KnownPolicies, programs: Programs
) -> Iterator[list[Row]]:
    """The result rows of the batch under each policy in turn: one prefill, then one decode per policy."""
    cells = [cell for cell, _ in batch.samples]
    chosen = [rj.parse_policy(policy, cells[0].length, known or POLICIES) for policy in batch.policies]
    state = rj.prefill(
        lm.params,
        lm.config,
        prompts.tokens,
        prompt_lengths=prompts.lengths,
        policies=chosen,
        max_new_tokens=cells[0].decoded,
        allow_beyond_context=True,  # `command_line.check_context` has checked it
    )
    state.logits.block_until_ready()
    programs.prepare(state, chosen)
    for name, policy in zip(batch.policies, chosen, strict=True):
        began = time.perf_counter()
        out, state = programs.of(state, policy)(lm.params, state, None, GREEDY)
        made, counts, full_steps = (sharding.fetched(field) for field in out[:3])
        seconds = (time.perf_counter() - began) / len(cells)
        rows = []
        for row, (cell, sample, ids) in enumerate(zip(cells, prompts.samples, prompts.ids, strict=True)):
            taken = made[row, : min(counts[row], cell.new_tokens)]
            prediction = scoring.clean(lm.tokenizer.decode(taken, skip_special_tokens=True))
            rows.append(
                {
                    "policy": name,
                    "task": cell.task,
                    "length": cell.length,
                    "index": sample.index,
                    "sample": sample.digest,
                    "prompt_tokens": len(ids),
                    "prediction": prediction,
                    "references": list(sample.outputs),
                    "score": scoring.score(prediction, sample.outputs, cell.metric),
                    "steps": int(counts[row]) - 1,
                    "full_steps": round(float(full_steps[row].mean()), 3) if full_steps.size else 0.0,
                    "seconds": round(seconds, 4),
                }
            )
            if isinstance(out, rj.LosslessGeneration):
                rows[-1] |= {"drafted": int(out.drafted[row]), "accepted": int(out.accepted[row])}
        yield rows
