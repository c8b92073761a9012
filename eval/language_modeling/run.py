"""The evaluation loop: every batch of windows is prefilled once and scored under each policy in turn."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

import recyc_jax as rj
from eval.language_modeling.windows import Window
from recyc_jax import scoring, sharding
from recyc_jax.commands import command_line, numbers, run_log
from recyc_jax.commands.compiling import Programs
from recyc_jax.commands.run_log import Row, RunLog


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows of one length, of any domains, and the policies that all of them still have to be scored under."""

    policies: tuple[str, ...]
    windows: list[Window]
    rows: int  # rows of the token array, the same for all batches of a length


def batches(windows: list[Window], policies: Sequence[str], batch_size: int, log: RunLog) -> Iterator[Batch]:
    """The batches of windows and policies that are not in the log yet."""
    for length in dict.fromkeys(window.length for window in windows):
        items = [window for window in windows if window.length == length]
        rows = min(batch_size, len(items))
        for absent, some in run_log.batches(log, policies, items, lambda window: window.key, rows):
            yield Batch(absent, some, rows)


def evaluate(lm: rj.PretrainedLM, todo: list[Batch], new_tokens: int, log: RunLog) -> None:
    """Score all batches; windows are logged after each batch and policy."""
    total = sum(len(batch.policies) * len(batch.windows) for batch in todo)

    def lower(state: rj.Prefilled, policy: rj.Policy) -> Any:
        return scoring.lower_score(lm.params, lm.config, state, new_tokens, policy=policy)

    with command_line.progress() as progress, Programs(lower) as programs:
        bar = progress.add_task("evaluating", total=total)
        for batch in todo:
            progress.update(bar, description=f"{batch.windows[0].length} tokens")
            for rows in _score_batch(lm, batch, new_tokens, programs):
                log.append(rows)
                progress.advance(bar, len(rows))
                command_line.heed_interrupt()


def _score_batch(lm: rj.PretrainedLM, batch: Batch, new_tokens: int, programs: Programs) -> Iterator[list[Row]]:
    """The result rows of the batch under each policy in turn: one prefill, then one decode per policy."""
    length = batch.windows[0].length
    filled = batch.windows + batch.windows[-1:] * (batch.rows - len(batch.windows))
    tokens = np.asarray([window.tokens for window in filled], np.int32)
    context, scored = tokens[:, :-new_tokens], tokens[:, -new_tokens:]
    chosen = [rj.parse_policy(policy, length) for policy in batch.policies]
    options: Any = {"max_new_tokens": new_tokens, "allow_beyond_context": True}  # checked by command_line.check_context
    state = rj.prefill(lm.params, lm.config, context, policies=chosen, **options)
    state.logits.block_until_ready()
    programs.prepare(state, chosen)
    following = sharding.spread(jnp.asarray(scored), "B-", batch.rows)
    for name, policy in zip(batch.policies, chosen, strict=True):
        began = time.perf_counter()
        scores, state = programs.of(state, policy)(lm.params, state, following)
        chances, full_steps = (sharding.fetched(field) for field in (scores.log_probabilities, scores.full_steps))
        seconds = (time.perf_counter() - began) / len(batch.windows)
        yield [
            {
                "policy": name,
                "domain": window.domain,
                "length": length,
                "index": window.index,
                "document": window.document,
                "offset": window.offset,
                "sample": window.digest,
                "nll": numbers.finite(-float(chances[row].astype(np.float64).mean()), 6),
                "steps": new_tokens - 1,
                "full_steps": round(float(full_steps[row].mean()), 3) if full_steps.size else 0.0,
                "seconds": round(seconds, 4),
            }
            for row, window in enumerate(batch.windows)
        ]
