"""Prompts that have been read, kept for requests that begin with the same tokens: further turns of a conversation, more
questions about a document."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from recyc_jax.prefilling import Prefilled

LEAST = 64
"""Tokens that are worth keeping, or going on from."""


class _Kept(NamedTuple):
    state: Prefilled  # of one row
    tokens: np.ndarray  # int32: those whose keys and values it has
    size: int  # bytes


class KeptStates:
    """States of one row each, of at most so many bytes together; the least recently used goes."""

    def __init__(self, most_bytes: int, goes_back: bool) -> None:
        """`goes_back`: a state can drop its last tokens (not where layers have a sliding window)."""
        self._most_bytes, self.goes_back = most_bytes, goes_back
        self._kept: list[_Kept] = []  # the least recently used first

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(one.size for one in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def shared(self, ids: list[int]) -> int:
        """How many tokens of a prompt `take` would give a state for."""
        return self._best(ids)[1]

    def take(self, ids: list[int]) -> tuple[Prefilled | None, int]:
        """The state that shares the most first tokens with a prompt, which is no longer kept here, and their number; None
        where too few are shared to go on from."""
        best, shared = self._best(ids)
        if best is None:
            return None, 0
        self._kept = [one for one in self._kept if one is not best]
        return best.state, shared

    def has_room(self, size: int, tokens: int) -> bool:
        """Whether a state of so many bytes and tokens would be kept."""
        return tokens >= LEAST and size <= self._most_bytes

    def keep(self, state: Prefilled, tokens: list[int]) -> None:
        """Keep a state of one row that has read, or made and fed, these tokens."""
        size = bytes_of(state)
        if not self.has_room(size, len(tokens)):
            return
        self._kept.append(_Kept(state, np.asarray(tokens, np.int32), size))
        while self.size > self._most_bytes:
            self._kept.pop(0)

    def clear(self) -> None:
        """Forget all."""
        self._kept = []

    def _best(self, ids: list[int]) -> tuple[_Kept | None, int]:
        wanted, best, most = np.asarray(ids, np.int32), None, LEAST - 1
        for one in self._kept:
            length = min(len(wanted) - 1, len(one.tokens))  # at least one token is read, for the logits
            differs = np.flatnonzero(wanted[:length] != one.tokens[:length])
            same = int(differs[0]) if len(differs) else length
            # what is shared is most of both: a system's message alone neither keeps requests from being answered
            # together, nor costs another conversation its state
            is_most = 2 * same >= max(len(wanted), len(one.tokens))
            if same > most and is_most and (self.goes_back or same == len(one.tokens)):
                best, most = one, same
        return best, most if best is not None else 0


def bytes_of(state: Prefilled) -> int:
    """The size of a state's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))


def row_of(state: Prefilled, row: int) -> Prefilled:
    """One row of a state, copied."""
    rows = state.logits.shape[0]
    if rows == 1:
        return state
    layers = jax.tree.map(lambda leaf: leaf[row : row + 1] if leaf.ndim and leaf.shape[0] == rows else leaf, state)
    return dataclasses.replace(layers, origin=state.origin)
