"""Perplexity on held-out documents under decoding policies."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.commands import numbers
from recyc_jax.commands.corpus import Corpus, Windows
from recyc_jax.policies.registry import parse_policy

Row = dict[str, Any]


class HeldOut(NamedTuple):
    """Windows of held-out documents."""

    tokens: np.ndarray  # int32 [E, T]
    domains: tuple[str, ...]  # of each window

    def ends(self, length: int) -> HeldOut:
        """The last `length` tokens of each window."""
        return HeldOut(self.tokens[:, -length:], self.domains)


def windows(corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int, count: int, seed: int) -> HeldOut:
    """At most `count` windows of `length` tokens per domain, chosen at random."""
    rows = Windows(corpus, documents, length)
    chosen: list[int] = []
    domains: list[str] = []
    for domain in corpus.domains:
        mine = corpus.numbers(domain.name)
        found = np.flatnonzero((rows.documents >= mine.start) & (rows.documents < mine.stop)).tolist()
        random.Random(f"{seed} {domain.name} evaluation").shuffle(found)
        chosen += found[:count]
        domains += [domain.name] * len(found[:count])
    return HeldOut(np.stack([rows[row]["tokens"] for row in chosen]), tuple(domains))


def evaluate(
    params: Any,
    config: rj.LlamaConfig,
    held_out: HeldOut,
    policies: Sequence[str],
    new_tokens: int,
    batch_size: int,
    after_each: Callable[[], None],
) -> list[Row]:
    """One row per policy and domain: `nll`, the mean negative log-probability (nats per token) of the last `new_tokens`
    tokens of the windows, decoded one at a time; its standard error over windows; `perplexity`, the exponential of
    `nll`; and `difference`, the mean over windows of this policy's nll minus the first policy's, with its paired
    standard error. Devices of the mesh that is set, those of other processes too, take different windows if `batch_size`
    divides among them. `after_each` is called after each policy of a batch, and may raise."""
    length = held_out.tokens.shape[1]
    parsed = [parse_policy(policy, length) for policy in policies]
    losses: dict[str, list[float]] = {policy: [] for policy in policies}
    for begin in range(0, len(held_out.tokens), batch_size):
        batch = held_out.tokens[begin : begin + batch_size]
        size = len(batch)
        batch = np.concatenate([batch, np.repeat(batch[:1], batch_size - size, axis=0)])  # one shape, so one program
        prompts, rest = batch[:, :-new_tokens], batch[:, -new_tokens:]
        options: Any = {"max_new_tokens": new_tokens, "allow_beyond_context": True}  # train.run has checked it
        state = rj.prefill(params, config, prompts, policies=parsed, **options)
        for name, policy in zip(policies, parsed, strict=True):
            scores, state = rj.score_after(params, config, state, rest, policy=policy)
            chances = sharding.fetched(scores.log_probabilities)[:size]
            losses[name] += [-float(mean) for mean in chances.mean(axis=1)]
            after_each()
    rows = []
    for policy in policies:
        for domain in dict.fromkeys(held_out.domains):
            mine = [number for number, name in enumerate(held_out.domains) if name == domain]
            values = [losses[policy][number] for number in mine]
            gaps = [losses[policy][number] - losses[policies[0]][number] for number in mine]
            mean = statistics.fmean(values)
            rows.append(
                {
                    "policy": policy,
                    "domain": domain,
                    "length": length,
                    "new_tokens": new_tokens,
                    "n": len(values),
                    "nll": numbers.finite(mean),
                    "nll_stderr": _stderr(values),
                    "perplexity": numbers.finite(numbers.perplexity(mean)),
                    "difference": numbers.finite(statistics.fmean(gaps)),
                    "difference_stderr": _stderr(gaps),
                    "each": [round(value, 5) for value in values],
                }
            )
    return rows


def _stderr(values: Sequence[float]) -> float | None:
    # np.std, because statistics.stdev fails for the losses of a diverged model
    return numbers.finite(float(np.std(values, ddof=1)) / math.sqrt(len(values))) if len(values) > 1 else None
