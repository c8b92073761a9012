"""Decoding under many policies: their programs are compiled side by side, which takes most of the time of a short run."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import jax

from recyc_jax import generation
from recyc_jax.generation import Generation
from recyc_jax.loading.pretrained import PretrainedLM
from recyc_jax.policies.base import Policy
from recyc_jax.prefilling import Prefilled


class Decoders:
    """Greedy `decode` under any of several policies: each program is compiled once, in threads of its own. Tracing stays
    in the caller's thread, whose mesh it needs. A context manager: leaving it abandons programs that nobody asked
    for."""

    def __init__(self) -> None:
        several_hosts = jax.process_count() > 1  # XLA's autotuning there has hosts wait for each other, in one order
        self._pool = concurrent.futures.ThreadPoolExecutor(1 if several_hosts else min(16, os.cpu_count() or 1))
        self._programs: dict[Any, concurrent.futures.Future[Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def prepare(self, lm: PretrainedLM, state: Prefilled, policies: Sequence[Policy]) -> None:
        """Begin to compile the programs that are missing for prompts like those of `state`."""
        for policy in policies:
            if self._key(state, policy) not in self._programs:
                lowered = generation.lower_decode(lm.params, lm.config, state, policy=policy)
                self._programs[self._key(state, policy)] = self._pool.submit(lowered.compile)

    def decode(self, lm: PretrainedLM, state: Prefilled, policy: Policy) -> tuple[Generation, Prefilled]:
        """As `rj.decode(lm.params, lm.config, state, policy=policy)`."""
        self.prepare(lm, state, [policy])
        return self._programs[self._key(state, policy)].result()(lm.params, state, None)

    @staticmethod
    def _key(state: Prefilled, policy: Policy) -> Any:
        leaves, structure = jax.tree.flatten(state)
        return policy, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
