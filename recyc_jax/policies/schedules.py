"""When recycled attention takes a full step."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from recyc_jax.config import real_number, whole_number


@dataclasses.dataclass(frozen=True)
class FixedStride:
    """Every `stride`-th decode step is full, counted from 1: steps stride, 2 stride, ... (the paper's S, section 3.2).

    `stride=1` is full attention. Decode step 1 feeds the first new token, so M new tokens take M - 1 steps.
    """

    stride: int

    by_row: ClassVar[bool] = False
    """Whether rows of a batch may differ; such a schedule remembers a query from one full step to the next."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", whole_number("stride", self.stride, 1))

    @property
    def always(self) -> bool:
        """Whether every deciding step is a full one, so that nothing has to be asked when it comes; not so where a schedule
        made of this one has a `due` of its own."""
        return type(self) is FixedStride

    @property
    def period(self) -> int:
        """Steps from one decision to the next."""
        return self.stride

    @property
    def longest(self) -> int | None:
        """Steps from one full step to the next, at most; None where nothing bounds them."""
        return self.stride

    def remember(self, q: Float[Array, "B N H"], plain_q: Float[Array, "B N H"]) -> Any:
        """What `due` will want to know of a full step: here, nothing."""
        return None

    def due(
        self, number: Int[Array, ""], q: Float[Array, "B N H"], plain_q: Float[Array, "B N H"], remembered: Any
    ) -> Bool[Array, " B"]:
        """Which rows take a full step at decode step `number`."""
        return jnp.broadcast_to(number % self.stride == 0, q.shape[:1])


@dataclasses.dataclass(frozen=True)
class QuerySimilarity:
    """At every `check_every`-th decode step a layer whose query is still like that of its last full step stays partial.

    The paper's dynamic schedule (section 3.2; its QC stride is `check_every`). Alike: the cosine similarity of the queries,
    each averaged over all query heads, is strictly above `threshold`. Every layer and (our decision) every row of a
    batch decides for itself. Also ours: similarities are float32 and clipped to [-1, 1], so that `threshold=1` always
    refreshes; a query of norm zero is like nothing; the first comparison is with the last prompt token's query; queries
    are taken before RoPE, so that distance alone doesn't make them differ (`rope=True`: after it).
    """

    check_every: int
    threshold: float
    rope: bool = False

    by_row: ClassVar[bool] = True
    always: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "check_every", whole_number("check_every", self.check_every, 1))
        object.__setattr__(self, "threshold", real_number("threshold", self.threshold, -1.0, 1.0))

    @property
    def period(self) -> int:
        """Steps from one decision to the next."""
        return self.check_every

    @property
    def longest(self) -> int | None:
        """Nothing bounds the steps from one full step to the next."""
        return None

    def remember(self, q: Float[Array, "B N H"], plain_q: Float[Array, "B N H"]) -> Float[Array, "B H"]:
        """What later queries are compared with: the mean over the heads, in float32."""
        return jnp.mean((q if self.rope else plain_q).astype(jnp.float32), axis=1)

    def due(
        self,
        number: Int[Array, ""],
        q: Float[Array, "B N H"],
        plain_q: Float[Array, "B N H"],
        remembered: Any,  # float32 [B, H]
    ) -> Bool[Array, " B"]:
        """Which rows take a full step at decode step `number`."""
        now = self.remember(q, plain_q)
        norms = jnp.linalg.norm(now, axis=-1) * jnp.linalg.norm(remembered, axis=-1)
        similarity = jnp.sum(now * remembered, axis=-1) / jnp.where(norms > 0, norms, 1)
        alike = (jnp.clip(similarity, -1, 1) > self.threshold) & (norms > 0)
        return (number % self.check_every == 0) & ~alike
