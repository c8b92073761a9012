"""When recycled attention takes a full step (section 3.2 of the paper)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from recyc_jax.policies.base import Options, Step, spelled
from recyc_jax.validation import real_number, whole_number


@dataclasses.dataclass(frozen=True)
class FixedStride(Options):
    """Every `stride`-th decode step is full, counted from 1: steps stride, 2 stride, ... (the paper's S).

    `stride=1` is full attention. Decode step 1 feeds the first new token, so M new tokens take M - 1 steps.
    """

    stride: int

    compares_queries: ClassVar[bool] = False
    """Whether `due` compares queries, so that `remember` needs the query of the last prompt token."""

    @property
    def always_due(self) -> bool:
        """Whether every deciding step is full in every row: not if a subclass has a `due` of its own."""
        return type(self).due is FixedStride.due

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", whole_number("stride", self.stride, 1))

    def options(self) -> dict[str, str]:
        return {"stride": spelled(self.stride)}

    @property
    def period(self) -> int:
        """Steps from one deciding step to the next."""
        return self.stride

    @property
    def max_interval(self) -> int | None:
        """The largest number of steps from one full step to the next; None if there is no bound."""
        return self.stride

    def remember(self, q: Any, q_before_rope: Any) -> None:
        """What `due` needs from a full step: nothing here."""
        return None

    def due(self, step: Step, remembered: Any) -> Bool[Array, " B"]:
        """Which rows take a full step in this deciding step."""
        return jnp.ones_like(step.done)


@dataclasses.dataclass(frozen=True)
class QuerySimilarity(Options):
    """At every `check_every`-th decode step, a layer takes a partial step if its query is still similar to the query of
    its last full step, and a full step otherwise.

    The paper's dynamic schedule (section 3.2; its QC stride is `check_every`). Two queries are similar if the cosine
    similarity of their means over all query heads is strictly above `threshold`. Every layer and (our decision) every
    row of a batch decides on its own. Also ours: similarities are float32 and clipped to [-1, 1], so that `threshold=1`
    always refreshes; a query of norm zero is similar to no query; the first comparison is with the query of the last
    prompt token; queries are taken before RoPE, so that distance alone does not make them differ (`rope=True`: after
    RoPE)."""

    check_every: int
    threshold: float
    rope: bool = False

    always_due: ClassVar[bool] = False
    compares_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "check_every", whole_number("check_every", self.check_every, 1))
        object.__setattr__(self, "threshold", real_number("threshold", self.threshold, -1.0, 1.0))

    def options(self) -> dict[str, str]:
        return {name: spelled(getattr(self, name)) for name in ("check_every", "threshold", "rope")}

    @property
    def period(self) -> int:
        """Steps from one deciding step to the next."""
        return self.check_every

    @property
    def max_interval(self) -> int | None:
        """None: there is no bound on the steps from one full step to the next."""
        return None

    def remember(self, q: Float[Array, "B N H"], q_before_rope: Float[Array, "B N H"]) -> Float[Array, "B H"]:
        """What later queries are compared with: the mean of the query over heads, in float32."""
        return jnp.mean((q if self.rope else q_before_rope).astype(jnp.float32), axis=1)

    def due(self, step: Step, remembered: Float[Array, "B H"]) -> Bool[Array, " B"]:
        """Which rows take a full step in this deciding step."""
        now = self.remember(step.q, step.q_before_rope)
        norms = jnp.linalg.norm(now, axis=-1) * jnp.linalg.norm(remembered, axis=-1)
        similarity = jnp.sum(now * remembered, axis=-1) / jnp.where(norms > 0, norms, 1)
        return (jnp.clip(similarity, -1, 1) <= self.threshold) | (norms <= 0)
