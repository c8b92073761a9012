"""Attention implementations by name. A named one runs or raises; only `None` chooses."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array

from recyc_jax.attention import reference


@runtime_checkable
class Implementation(Protocol):
    """What a module of this folder offers to the decode loop; `reference.py` documents each."""

    def full(self, q: Array, keys: Array, values: Array, visible: Array) -> Array: ...

    def full_with_scores(self, q: Array, keys: Array, values: Array, visible: Array) -> tuple[Array, Array]: ...

    def full_with_weights(self, q: Array, keys: Array, values: Array, visible: Array) -> tuple[Array, Array]: ...

    def window_scores(self, q: Array, keys: Array, starts: Array, length: Array) -> Array: ...

    def selected(self, q: Array, keys: Array, values: Array, slots: Array) -> Array: ...

    def selected_with_weights(self, q: Array, keys: Array, values: Array, slots: Array) -> tuple[Array, Array]: ...

    def chunk(self, q: Array, keys: Array, values: Array, starts: Array, offset: Array) -> Array: ...

    def chunk_with_mass(
        self, q: Array, keys: Array, values: Array, starts: Array, offset: Array
    ) -> tuple[Array, Array]: ...


IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference}


def resolve(name: str | None) -> Implementation:
    """The implementation of that name; None takes the plain one, which runs everywhere.

    Raises ValueError for an unknown name.
    """
    if name is None:
        return reference
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; there is {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name]
