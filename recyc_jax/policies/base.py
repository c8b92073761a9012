"""The contract between a method and the decode loop.

A policy is a frozen dataclass of pure functions over an explicit per-layer state, as an optax transform is. Steps come
in periods: `period - 1` plain steps, then a *deciding* step (if the policy `decides`). The loop appends
the new token's key and value to the full cache, then calls `attend` or `decide` with a read-only view of it; neither
returns the cache, so no `lax.cond` in a policy can copy it.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

from recyc_jax import cache
from recyc_jax.attention.api import Implementation

State = Any


class View(NamedTuple):
    """One layer's full cache as a step reads it, the new token (in slot `length - 1`) included."""

    keys: Array  # [B, K, S, H]
    values: Array  # [B, K, S, H]
    starts: Array  # int32 [B]
    length: Array  # int32 []

    @property
    def visible(self) -> Bool[Array, "B S"]:
        return cache.filled(self.starts, self.length, self.keys.shape[2])


class Attended(NamedTuple):
    """What a step gives back."""

    out: Array  # [B, N, H]
    state: State
    full: Array  # bool [B]: the row attended to everything


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """A method of choosing what a decode step reads."""

    @property
    @abc.abstractmethod
    def period(self) -> int:
        """Decode steps in a period. Also how often the loop looks whether every row has ended."""

    @property
    def decides(self) -> bool:
        """Whether the last step of a period is a deciding one."""
        return False

    @property
    def observes_scores(self) -> bool:
        """Whether `start` needs the last prompt token's scores."""
        return False

    @abc.abstractmethod
    def start(self, scores: Float[Array, "B K S"] | None, visible: Bool[Array, "B S"]) -> State:
        """The layer's state after the prompt, from the last prompt token's scores."""

    @abc.abstractmethod
    def attend(self, attention: Implementation, q: Float[Array, "B N H"], view: View, state: State) -> Attended:
        """A plain step."""

    def decide(
        self, attention: Implementation, q: Float[Array, "B N H"], view: View, state: State, step: Int[Array, ""]
    ) -> Attended:
        """A deciding step; decode steps count from 1."""
        raise TypeError(f"{type(self).__name__} has no deciding steps")
