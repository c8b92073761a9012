"""Parts of recycled attention: its state, the memory of scores from refresh to refresh, and checks of its fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from recyc_jax.policies.base import Step
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity
from recyc_jax.validation import real_number, whole_number

ABLATIONS = ("no_refresh", "no_full_attention")
States: TypeAlias = Sequence[Any]
"""One state per layer."""
Rows: TypeAlias = Any
"""bool [B]: a mask of the batch's rows; None: all rows."""


@flax.struct.dataclass
class RecycledState:
    """What one layer carries from step to step."""

    kept: Any  # the tokens of the last refresh (the paper's partial cache): a kept set, see `attention/kept.py`
    since: Any  # int32 [B]: the first slot written after the last refresh
    query: Any  # what the schedule remembers of the last full step: float32 [B, H], or None
    scores: Any = None  # float32 [B, K, S]: the scores that chose `kept`; None without `decay`


class Noted(NamedTuple):
    """What a deciding step notes for `refresh`: the scores of its full step, and which rows took one."""

    scores: Array  # float32 [B, K, S]; -inf in rows that took no full step
    rows: Rows  # the rows that took a full step: their kept sets are refreshed

    @classmethod
    def nothing(cls, step: Step, rows: Array) -> Noted:
        """What a deciding step hands to `refresh` if no row took a full step; `rows` is all False."""
        return cls(jnp.full(step.cached.keys.shape[:3], -jnp.inf, jnp.float32), rows)

    @staticmethod
    def any_row(noted: Sequence[Noted]) -> Array:
        """Whether any row of any layer took a full step."""
        return jnp.any(jnp.stack([layer.rows for layer in noted]))


@dataclasses.dataclass(frozen=True)
class Memory:
    """The scores that a refresh chooses by (ours): the maximum of the full step's scores and the scores of the previous
    choice less `decay` nats. Tokens that mattered a while ago, such as the next item of a list that the model is
    writing out, can stay in the set, and tokens that never mattered make room. `decay=None` is the paper's rule: only
    the full step's scores count."""

    decay: float | None

    def recalled(self, before: Any, scores: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
        """The scores that a refresh chooses by, from the scores `before` and those of the full step."""
        return scores if self.decay is None or before is None else jnp.maximum(scores, before - self.decay)

    def remembered(self, scores: Float[Array, "B K S"]) -> Any:
        """The scores to keep for the next refresh; None without `decay`."""
        return None if self.decay is None else scores


def where_rows(rows: Rows, one: Any, other: Any) -> Any:
    """Leaves of `one` in the rows of the mask, of `other` in all other rows. Leaves are arrays [B, ...]; those of
    `other` may be numbers."""

    def pick(a: Any, b: Any) -> Array:
        return jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return one if rows is None else jax.tree.map(pick, one, other)


def check_fields(policy: Any) -> None:
    """Check and normalise the fields of a `RecycledAttention`. Raises ValueError naming the field at fault."""
    for name, least in (("budget", 1), ("pool", 1), ("window", 1), ("lookahead", 0)):
        if (name, getattr(policy, name)) != ("lookahead", "auto"):
            object.__setattr__(policy, name, whole_number(name, getattr(policy, name), least))
    if policy.pool % 2 == 0:
        raise ValueError(f"pool={policy.pool} must be odd: the pooling window is centred on its token")
    if not isinstance(policy.schedule, FixedStride | QuerySimilarity):
        raise ValueError(f"schedule={policy.schedule!r} must be a schedule, such as FixedStride(10)")
    if policy.decay is not None:
        object.__setattr__(policy, "decay", real_number("decay", policy.decay, 0.0, math.inf))
    if policy.ablation not in (None, *ABLATIONS):
        raise ValueError(f"ablation={policy.ablation!r} is unknown; there is {', '.join(ABLATIONS)}")
