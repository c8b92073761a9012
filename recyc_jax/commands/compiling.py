"""Programs of many policies, compiled side by side: compiling takes most of the time of a short run."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import jax

from recyc_jax.policies.base import Policy
from recyc_jax.prefilling import Prefilled


class Programs:
    """The compiled programs that `lower(state, policy)` traces (it returns a `jax.stages.Lowered`), each compiled once
    for states of the same shapes, in threads. Tracing stays in the caller's thread, whose mesh it needs. A context
    manager: leaving it abandons programs that are not begun."""

    def __init__(self, lower: Callable[[Prefilled, Policy], Any]) -> None:
        self._lower = lower
        # with several hosts XLA's autotuning has them wait for each other, so all must compile in one order
        workers = 1 if jax.process_count() > 1 else min(16, os.cpu_count() or 1)
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)
        self._compiled: dict[Any, concurrent.futures.Future[Any]] = {}

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prepare(self, state: Prefilled, policies: Sequence[Policy]) -> None:
        """Begin to compile what these policies need after prompts like those of `state`."""
        for policy in policies:
            if self._key(state, policy) not in self._compiled:
                self._compiled[self._key(state, policy)] = self._pool.submit(self._lower(state, policy).compile)

    def of(self, state: Prefilled, policy: Policy) -> Any:
        """The compiled program (`jax.stages.Compiled`)."""
        self.prepare(state, [policy])
        return self._compiled[self._key(state, policy)].result()

    @staticmethod
    def _key(state: Prefilled, policy: Policy) -> Any:
        leaves, structure = jax.tree.flatten(state)
        return policy, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
