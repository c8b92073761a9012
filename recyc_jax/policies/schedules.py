"""When recycled attention takes a full step."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Bool, Int

from recyc_jax.config import whole_number


@dataclasses.dataclass(frozen=True)
class FixedStride:
    """Every `stride`-th decode step is full, counted from 1: steps stride, 2 stride, ... (the paper's S, section 3.2).

    `stride=1` is full attention. Decode step 1 feeds the first new token, so M new tokens take M - 1 steps.
    """

    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", whole_number("stride", self.stride, 1))

    @property
    def period(self) -> int:
        """Steps from one decision to the next."""
        return self.stride

    def is_full(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether this step is full."""
        return step % self.stride == 0
