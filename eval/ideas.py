"""Selection rules that were tried beside look-ahead: `python -m eval.ideas`, which is `eval.ruler` with more policies.

Each costs a decode step what `RecycledAttention` costs. What they scored is in docs/results/quality.md; the one that won
became fields of the policy, those here did not. Their strings start with `idea_`.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import jax.numpy as jnp

from recyc_jax.attention.api import Implementation
from recyc_jax.policies import registry
from recyc_jax.policies.base import Attended, Step
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.recycled_set import rank
from recyc_jax.policies.schedules import FixedStride


@dataclasses.dataclass(frozen=True)
class EarlyStride(FixedStride):
    """Full steps at 1, 2, 4 and 8, then at every `stride`-th."""

    @property
    def period(self) -> int:
        return 1

    def due(self, number: Any, q: Any, plain_q: Any, remembered: Any) -> Any:
        early = (number == 1) | (number == 2) | (number == 4) | (number == 8)
        return jnp.broadcast_to(early | (number % self.stride == 0), q.shape[:1])


@dataclasses.dataclass(frozen=True)
class LayerBudgets(RecycledAttention):
    """Budgets that fall (or, with `slope` below 0, rise) linearly from layer to layer; the mean is `budget`."""

    slope: float = 0.5

    def _rank(self, scores: Any, caches: Any) -> Any:
        layers = len(scores)
        budgets = [
            max(1, round(self.budget * (1 + self.slope * (1 - 2 * layer / max(1, layers - 1)))))
            for layer in range(layers)
        ]
        # in order throughout: each layer cuts its own
        rankings = rank(caches.attention, scores, caches.visible, max(budgets), self.pool, self._ahead, max(budgets))
        return [
            ranking._replace(slots=ranking.slots[..., :budget])
            for ranking, budget in zip(rankings, budgets, strict=True)
        ]

    @property
    def _ahead(self) -> int:
        return self.period - 1 if self.lookahead == "auto" else self.lookahead


@dataclasses.dataclass(frozen=True)
class GroupMean(RecycledAttention):
    """Probabilities averaged over a group's query heads instead of their maximum, at full steps."""

    def decide(self, attention: Implementation, step: Step, state: Any) -> Attended:
        return super().decide(_mean_over_groups(attention), step, state)


def _mean_over_groups(attention: Implementation) -> Any:
    """That implementation, its scores being means over the group."""

    def full_with_scores(*arrays: Any) -> Any:
        out, weights = attention.full_with_weights(*arrays)
        return out, jnp.log(jnp.maximum(jnp.mean(weights, axis=2), 1e-37))

    def full_or_recycled(q: Any, keys: Any, values: Any, visible: Any, due: Any, *recycled: Any) -> Any:
        whole, scores = full_with_scores(q, keys, values, visible)
        here = due[:, None, None]
        few = attention.recycled(q, keys, values, *recycled)
        return jnp.where(here, whole, few), jnp.where(here, scores, -jnp.inf)

    # every name stands in the object itself: from Python 3.12 on, a run-time check of a protocol looks nowhere else
    names = {*vars(Implementation), *Implementation.__annotations__}
    offered = {name: getattr(attention, name) for name in names if not name.startswith("_")}
    return types.SimpleNamespace(
        **offered | {"full_with_scores": full_with_scores, "full_or_recycled": full_or_recycled}
    )


def _early(options: Any) -> RecycledAttention:
    schedule, lookahead = EarlyStride(registry._schedule(options).period), options.lookahead()
    if lookahead == "auto":
        lookahead = schedule.stride - 1
    return RecycledAttention(options.budget(), schedule, options.integer("pool", 7), lookahead)


def _layers(options: Any) -> RecycledAttention:
    slope = float(options.values.pop("slope", 0.5))
    rest = options.budget(), registry._schedule(options), options.integer("pool", 7), options.lookahead()
    return LayerBudgets(*rest, slope=slope)


def _mean(options: Any) -> RecycledAttention:
    return GroupMean(options.budget(), registry._schedule(options), options.integer("pool", 7), options.lookahead())


IDEAS = {"idea_early": _early, "idea_layers": _layers, "idea_mean": _mean}


def main(args: list[str] | None = None) -> int:
    """`eval.ruler` with these policies known too."""
    from eval import ruler

    registry.POLICIES.update(IDEAS)
    return ruler.main(args)


if __name__ == "__main__":
    sys.exit(main())
