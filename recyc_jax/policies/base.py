"""The contract between a method and the generation loop.

Letters: B batch, N query heads, K key/value heads, G = N // K, H head dim, S cache slots.

A policy is a frozen dataclass of pure functions over an explicit state per layer, like an optax transform. Decode steps
come in periods: `period - 1` partial steps, then one *deciding* step. The loop appends the new token's key and value to
the full cache before it calls the policy. The policy reads the cache but never returns it, so no `lax.cond` copies the
cache. The choice that follows from a deciding step is needed only in the next step, so the loop calls `refresh` once
for all layers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import flax.struct
from jaxtyping import Array, Bool

from recyc_jax import cache
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache, Leaf

State = Any
"""What a policy carries from step to step for one layer: any pytree."""


@dataclasses.dataclass(frozen=True)
class PromptNeeds:
    """The statistics of the prompt that a policy needs from prefill."""

    windows: frozenset[int] = frozenset()  # window sizes w: scores under the last w prompt tokens
    query: bool = False  # the last prompt token's query
    mass: bool = False  # the attention that each key received from the whole prompt
    spare: int = 0  # slots behind the last new token's, for drafts that are rejected

    def __or__(self, other: PromptNeeds) -> PromptNeeds:
        query, mass, spare = self.query or other.query, self.mass or other.mass, max(self.spare, other.spare)
        return PromptNeeds(self.windows | other.windows, query, mass, spare)


@flax.struct.dataclass
class PromptStats:
    """The prompt statistics of one layer; empty or None if no policy needs them."""

    # by window size w, float32 [B, K, S]: the log of the probability summed over the last w queries, then the maximum
    # over the group's query heads; undefined for slots that hold no token
    scores: dict[int, Leaf]
    q: Any  # [B, N, H]: the last prompt token's query after RoPE
    q_before_rope: Any  # [B, N, H]
    mass: Any  # float32 [B, K, G, S]: each query head's probability, summed over all prompt tokens


class Step(NamedTuple):
    """One layer in one decode step: the query, and the full cache with the new token in slot `length - 1`."""

    q: Array  # [B, N, H], after RoPE
    q_before_rope: Array  # [B, N, H]
    cached: LayerCache
    starts: Array  # int32 [B]: the slot of each row's first token
    length: Array  # int32 [], or by row [B] (`lossless.py`): slots written, including the new token's
    number: Array  # int32 []: the number of this decode step, counted from 1
    done: Array  # bool [B]: rows that have ended

    @property
    def visible(self) -> Bool[Array, "B S"]:
        """Which slots hold a token."""
        return cache.visible(self.starts, self.length, self.cached.capacity)


class Caches(NamedTuple):
    """The full caches of all layers, as `start` and `refresh` see them."""

    layers: tuple[LayerCache, ...]
    visible: Array  # bool [B, S]: which slots hold a token
    length: Array  # int32 [], or by row [B]: slots written so far
    steps: int  # upper bound on the decode steps of this call, so on the new tokens after any refresh


class Attended(NamedTuple):
    """What a step returns for one layer."""

    out: Array  # [B, N, H]
    state: State
    full: Array  # bool [B]: rows whose output is attention to everything
    noted: Any = None  # from a deciding step: what `refresh` needs of it (recycled attention: scores and rows)


class Options(abc.ABC):
    """A field of a policy that a policy string spells as several options: a schedule."""

    @abc.abstractmethod
    def options(self) -> dict[str, str]:
        """The options, by name."""


def spelled(value: Any) -> str:
    """An option's value as policy strings have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True)
class Policy(abc.ABC):
    """A method that chooses which cached tokens a decode step reads.

    Every method has `start` and `partial_step`; one with a `period` also `deciding_step`, and `refresh` if that step
    changes what is kept. Policies are hashable (static arguments of `jax.jit`); a layer's state has the same structure,
    shapes and dtypes after every step; no row's result depends on another row. `str(policy)` is its policy string, from
    which `parse_policy` makes an equal policy (its `repr` where the class has no `method`)."""

    method: ClassVar[str | None] = None
    """The name of the class in policy strings; a subclass does not inherit it."""

    def __str__(self) -> str:
        method = type(self).__dict__.get("method")
        if method is None:
            return repr(self)
        said: dict[str, str] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Options):
                if "options" not in type(value).__dict__:  # a schedule of one's own
                    return repr(self)
                said |= value.options()
            elif value is not None and (value != field.default or field.name in ("budget", "stride")):
                said[field.name] = spelled(value)
        return f"{method}:{','.join('='.join(pair) for pair in said.items())}" if said else method

    @property
    def period(self) -> int | None:
        """Decode steps from one deciding step to the next; None if there are no deciding steps."""
        return None

    @property
    def needs(self) -> PromptNeeds:
        """The prompt statistics that `start` needs."""
        return PromptNeeds()

    @abc.abstractmethod
    def start(self, attention: Implementation, prompt: Sequence[PromptStats], caches: Caches) -> tuple[State, ...]:
        """Each layer's state after the prompt."""

    @abc.abstractmethod
    def partial_step(self, attention: Implementation, step: Step, state: State) -> Attended:
        """An ordinary step: every step but the last of a period, or every step if `period` is None. It is partial in
        methods that read a part of the cache."""

    def deciding_step(self, attention: Implementation, step: Step, state: State) -> Attended:
        """The last step of a period. What it returns as `noted` is passed to `refresh`."""
        raise TypeError(f"{type(self).__name__} has no deciding steps")

    def refresh(
        self, attention: Implementation, states: tuple[State, ...], noted: tuple[Any, ...], caches: Caches
    ) -> tuple[State, ...]:
        """Each layer's state after a deciding step, from the step's `state` and `noted` of each layer."""
        return states
