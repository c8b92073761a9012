"""Rules that lost: a decode step costs the same under each as under `RecycledAttention`. Their scores are in
docs/results/quality.md; the rule that won is part of that policy. Their policy strings start with `idea_`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from eval.ideas.combined import combined
from eval.ideas.refreshing import coverage, share
from recyc_jax.attention.implementation import Implementation
from recyc_jax.policies.base import Attended, Caches, Step
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.registry import MakePolicy, Options
from recyc_jax.policies.schedules import FixedStride


@dataclasses.dataclass(frozen=True)
class EarlyStride(FixedStride):
    """Full steps at steps 1, 2, 4 and 8, and at every `stride`-th step."""

    @property
    def period(self) -> int:
        return 1

    def due(self, step: Step, remembered: Any) -> Any:
        number = step.number
        early = (number == 1) | (number == 2) | (number == 4) | (number == 8)
        return jnp.broadcast_to(early | (number % self.stride == 0), step.done.shape)


@dataclasses.dataclass(frozen=True)
class LayerBudgets(RecycledAttention):
    """Budgets that decrease linearly from the first layer to the last (or increase, if `slope` is negative); their mean
    is `budget`."""

    slope: float = 0.5

    def chosen(self, attention: Implementation, scores: Any, states: Any, caches: Caches) -> Any:
        last = max(1, len(scores) - 1)
        shares = (1 + self.slope * (1 - 2 * layer / last) for layer in range(len(scores)))
        budgets = [max(1, round(self.budget * share)) for share in shares]
        return super().chosen(LayerByLayer(attention, budgets), scores, states, caches)


class LayerByLayer(Implementation):
    """An implementation that keeps a separate budget for each layer."""

    def __init__(self, attention: Implementation, budgets: list[int]) -> None:
        self.attention, self.budgets = attention, budgets

    def keep(self, layers: Any, scores: Any, budget: int, ordered: int) -> list[Any]:
        return [
            kept
            for cached, layer_scores, own in zip(layers, scores, self.budgets, strict=True)
            for kept in self.attention.keep([cached], [layer_scores], own, ordered)
        ]


@dataclasses.dataclass(frozen=True)
class GroupMean(RecycledAttention):
    """At full steps, scores are the mean of the probabilities over a group's query heads instead of the maximum."""

    def full_step(self, attention: Implementation, step: Step, state: Any, rows: Any = None) -> Attended:
        return super().full_step(MeanOverGroups(attention), step, state, rows)


class MeanOverGroups(Implementation):
    """An implementation that returns one log-probability per group: that of the mean probability."""

    def __init__(self, attention: Implementation) -> None:
        self.attention = attention

    def full_with_log_probabilities(self, *arguments: Any) -> tuple[Any, Any]:
        out, log_probabilities = self.attention.full_with_log_probabilities(*arguments)
        mean = jnp.mean(jnp.exp(log_probabilities), axis=2, keepdims=True)
        return out, jnp.log(jnp.maximum(mean, 1e-37))


def _early(options: Options) -> RecycledAttention:
    schedule, lookahead = EarlyStride(options.schedule().period), options.lookahead()
    if lookahead == "auto":
        lookahead = schedule.stride - 1
    return RecycledAttention(options.budget(), schedule, options.integer("pool", 7), lookahead)


def _layers(options: Options) -> RecycledAttention:
    slope = float(options.text_of("slope") or 0.5)
    rest = options.budget(), options.schedule(), options.integer("pool", 7), options.lookahead()
    return LayerBudgets(*rest, slope=slope)


def _mean(options: Options) -> RecycledAttention:
    return GroupMean(options.budget(), options.schedule(), options.integer("pool", 7), options.lookahead())


IDEAS: dict[str, MakePolicy] = {
    "idea_early": _early,
    "idea_layers": _layers,
    "idea_mean": _mean,
    "idea_combined": combined,
    "idea_coverage": coverage,
    "idea_share": share,
}
