"""Attention implementations by name. A named one runs or raises; only `None` chooses."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import jax
from jaxtyping import Array

from recyc_jax.projections import Projections


@runtime_checkable
class Implementation(Protocol):
    """What a module of this folder offers to the decode loop; `reference.py` documents each function."""

    SLOTS_LAST: bool
    """The cache is stored as [B, K, H, S], its capacity whole tiles (`cache.py`)."""
    COPIES: bool
    """What a policy reads between two refreshes is to be copied (`compact`) and read in pieces, not by index."""
    INDEXES: bool
    """What a policy reads between two refreshes is to be told by bounds (`recycled`), with no upkeep in partial steps."""

    projections: Projections
    """A layer's matrix products in a decode step."""

    def full(self, q: Array, keys: Array, values: Array, visible: Array) -> Array: ...

    def full_with_scores(self, q: Array, keys: Array, values: Array, visible: Array) -> tuple[Array, Array]: ...

    def full_with_weights(self, q: Array, keys: Array, values: Array, visible: Array) -> tuple[Array, Array]: ...

    def window_scores(self, q: Array, keys: Array, starts: Array, length: Array) -> Array: ...

    def selected(self, q: Array, keys: Array, values: Array, slots: Array) -> Array: ...

    def selected_with_weights(self, q: Array, keys: Array, values: Array, slots: Array) -> tuple[Array, Array]: ...

    def recycled(
        self, q: Array, keys: Array, values: Array, slots: Array, since: Array, length: Array, evict: bool
    ) -> Array: ...

    def full_or_recycled(
        self,
        q: Array,
        keys: Array,
        values: Array,
        visible: Array,
        due: Array,
        slots: Array,
        since: Array,
        length: Array,
        evict: bool,
    ) -> tuple[Array, Array]: ...

    def top_slots(self, scores: Array, budget: int, ordered: int) -> Array: ...

    def pieces_with_weights(self, q: Array, pieces: Sequence[tuple[Array, Array, Array]]) -> tuple[Array, Array]: ...

    def compact(self, keys: Array, values: Array, chosen: Array, most: int) -> tuple[Array, Array]: ...

    def chunk(self, q: Array, keys: Array, values: Array, starts: Array, offset: Array) -> Array: ...

    def chunk_with_mass(
        self, q: Array, keys: Array, values: Array, starts: Array, offset: Array
    ) -> tuple[Array, Array]: ...


IMPLEMENTATIONS = {
    "reference": "recyc_jax.attention.reference",
    "pallas_gpu": "recyc_jax.attention.pallas_gpu",
    "pallas_tpu": "recyc_jax.attention.pallas_tpu",
}
"""The modules; kernels are imported when they are first asked for."""

_KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}  # by the platform that JAX runs on
ROOMY = ("8.0", "9.0", "10.0", "10.3")
"""Compute capabilities of NVIDIA GPUs with the shared memory that the kernels take: A100, H100, B200 and their like."""


@functools.cache
def _say_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def resolve(name: str | None) -> Implementation:
    """The implementation of that name. `"pallas"` takes the kernels of the platform that JAX runs on or raises. None takes
    them too where there are any, the GPU has room for them and this JAX has what they are written in, elsewhere the plain
    functions (`"reference"`).

    Raises ValueError for an unknown name, and for "pallas" on a platform without kernels.
    """
    if name is None:
        name = _KERNELS.get(jax.default_backend(), "reference")
        if name == "pallas_gpu":
            capability = getattr(jax.devices()[0], "compute_capability", "unknown")
            if capability not in ROOMY:
                _say_once(
                    f"the kernels need more shared memory than is sure to be on this GPU (compute capability {capability}; "
                    f"they are for {', '.join(ROOMY)}): attention is plain"
                )
                name = "reference"
        try:
            return cast(Implementation, importlib.import_module(IMPLEMENTATIONS[name]))
        except ImportError as error:
            _say_once(f"this JAX lacks what {name} is written in ({error}): attention is plain")
            name = "reference"
    if name == "pallas":
        platform = jax.default_backend()
        if platform not in _KERNELS:
            raise ValueError(
                f"implementation='pallas': there are no kernels for {platform}, only for {', '.join(_KERNELS)}"
            )
        name = _KERNELS[platform]
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown; there is pallas, {', '.join(IMPLEMENTATIONS)}")
    return cast(Implementation, importlib.import_module(IMPLEMENTATIONS[name]))
