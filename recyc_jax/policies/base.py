"""The contract between a method and the decode loop.

A policy is a frozen dataclass of pure functions over an explicit per-layer state, as an optax transform is. Steps come
in periods: `period - 1` plain steps, then a *deciding* step (if the policy `decides`). The loop appends
the new token's key and value to the full cache, then calls `attend` or `decide` with a read-only view of it; neither
returns the cache, so no `lax.cond` in a policy can copy it. Nobody needs what a deciding step chooses before the next
step, so choosing is left to `settle`, once for all layers.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
from jaxtyping import Array, Bool, Int

from recyc_jax import cache
from recyc_jax.attention.api import Implementation
from recyc_jax.cache import LayerCache, Leaf

State = Any

LOOK_EVERY = 10
"""The period of a policy that never decides: it only sets how often the loop looks whether all rows have ended."""


@dataclasses.dataclass(frozen=True)
class Observes:
    """What a policy asks prefill to keep of the prompt."""

    windows: frozenset[int] = frozenset()  # scores under the last w prompt tokens, for each w
    query: bool = False  # the last prompt token's query
    mass: bool = False  # the attention that each key has received from the whole prompt

    def __or__(self, other: Observes) -> Observes:
        return Observes(self.windows | other.windows, self.query or other.query, self.mass or other.mass)


@flax.struct.dataclass
class Observed:
    """What prefill has kept of one layer; empty or None where no policy asked."""

    scores: dict[
        int, Leaf
    ]  # by window w: float32 [B, K, S], log of the probability summed over the last w queries, max
    # over the group; meaningless at slots that hold no token
    q: Leaf | None  # [B, N, H]: the last prompt token's query after RoPE
    plain_q: Leaf | None  # [B, N, H]: the same before RoPE
    mass: Leaf | None  # float32 [B, K, G, S]: probability summed over all prompt tokens, by query head


class Step(NamedTuple):
    """One layer in one decode step: the query, and the full cache with the new token (in slot `length - 1`)."""

    q: Array  # [B, N, H], after RoPE
    plain_q: Array  # [B, N, H], before RoPE
    cached: LayerCache
    starts: Array  # int32 [B]
    length: Array  # int32 []
    number: Array  # int32 []: decode steps count from 1
    done: Array  # bool [B]: the row has ended

    @property
    def slot(self) -> Int[Array, ""]:
        """The new token's."""
        return self.length - 1

    @property
    def keys(self) -> Array:
        """[B, K, S, H]"""
        return self.cached.keys

    @property
    def values(self) -> Array:
        """[B, K, S, H]"""
        return self.cached.values

    @property
    def visible(self) -> Bool[Array, "B S"]:
        return cache.filled(self.starts, self.length, self.keys.shape[2])


class Caches(NamedTuple):
    """All layers' caches, as choosing sees them."""

    attention: Implementation
    layers: tuple[LayerCache, ...]
    visible: Array  # bool [B, S]
    length: Array  # int32 []: slots written so far
    steps: int  # decode steps of this call at most: no set sees more new tokens


class Attended(NamedTuple):
    """What a step gives back."""

    out: Array  # [B, N, H]
    state: State
    full: Array  # bool [B]: the row's output is attention to everything


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
    def observes(self) -> Observes:
        """What `start` needs of the prompt."""
        return Observes()

    @abc.abstractmethod
    def start(self, observed: Sequence[Observed], caches: Caches) -> tuple[State, ...]:
        """Each layer's state after the prompt."""

    @abc.abstractmethod
    def attend(self, attention: Implementation, step: Step, state: State) -> Attended:
        """A plain step."""

    def decide(self, attention: Implementation, step: Step, state: State) -> Attended:
        """A deciding step. The state that it leaves goes through `settle`."""
        raise TypeError(f"{type(self).__name__} has no deciding steps")

    def settle(self, states: tuple[State, ...], caches: Caches) -> tuple[State, ...]:
        """Each layer's state after a deciding step, from what `decide` left in each."""
        return states
