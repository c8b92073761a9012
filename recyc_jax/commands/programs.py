"""Compiled programs are kept from start to start."""

from __future__ import annotations

import contextlib

BYTES = 2**31
"""The most room that kept programs take; the least recently used go."""


def keep() -> None:
    """Compiled programs are kept beside the models, so that a second start answers at once; not where the user has named
    a place of their own (JAX_COMPILATION_CACHE_DIR), or nothing can be written."""
    import jax

    from recyc_jax.loading import fetch

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        with contextlib.suppress(OSError):
            folder = fetch.cache_dir() / "programs"
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_max_size", BYTES)
            jax.config.update("jax_compilation_cache_dir", str(folder))
