"""Answers as they come: pieces of some tokens each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from recyc_jax import generation_loop
from recyc_jax.config import LlamaConfig
from recyc_jax.generation import advance
from recyc_jax.generation_checks import check_sampling
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.lossless import Lossless
from recyc_jax.policies.registry import as_policy
from recyc_jax.prefilling import Prefilled, prefill
from recyc_jax.results import ScoredGeneration
from recyc_jax.sampling import Greedy
from recyc_jax.spelling import Spelling


class Piece(NamedTuple):
    """What a stream yields."""

    tokens: np.ndarray  # int32 [B, n]: the next tokens of each row, pad_id behind its end
    lengths: np.ndarray  # int32 [B]: how many of them are the row's, its end-of-sequence token included
    done: np.ndarray  # bool [B]: rows that have ended; all of them after the last piece
    text: list[str] | None  # with a tokenizer: what they add to each row's text, never half a character
    # with `top_log_probabilities=k`, as in `ScoredGeneration`: float32 [B, n], int32 [B, n, k], float32 [B, n, k]
    log_probabilities: np.ndarray | None = None
    top_tokens: np.ndarray | None = None
    top_log_probabilities: np.ndarray | None = None


class Stream:
    """An iterator over the pieces of an answer. While one piece is read, the next is being decoded. It can be left at any
    time: `state` then is where decoding stands, some tokens ahead of the pieces that were read, and `lengths` [B] are the
    tokens that were read, for `extend(..., keep=...)`."""

    def __init__(self, pieces: Iterator[Any], rows: int, tokenizer: Any) -> None:
        self._pieces, self._done = pieces, np.zeros(rows, bool)
        self._spelling = None if tokenizer is None else [Spelling(tokenizer) for _ in range(rows)]
        self.lengths = np.zeros(rows, np.int32)
        self.full_steps: Any = 0  # int32 [B, L], of the pieces that were read
        self.state: Prefilled | None = None

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        out, self.state, is_last = next(self._pieces)
        tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
        self.full_steps = self.full_steps + np.asarray(out.full_steps)
        self.lengths = self.lengths + lengths
        self._done = self._done | np.asarray(out.done) | is_last
        text = None
        if self._spelling is not None:
            rows = zip(self._spelling, tokens, lengths, self._done, strict=True)
            text = [spelling.add(row[:length].tolist(), bool(done)) for spelling, row, length, done in rows]
        return Piece(tokens, lengths, self._done, text, *map(np.asarray, out.scores))


class _Out(NamedTuple):
    """A piece that may still be computed."""

    tokens: Any
    lengths: Any
    full_steps: Any
    done: Any
    scores: tuple[Any, ...] = ()  # of each token, if they are asked for


def stream(
    params: Params,
    config: LlamaConfig,
    prompts: Any,
    *,
    policy: Policy | str = FullAttention(),
    max_new_tokens: int = 64,
    sampling: Any = Greedy(),
    eos_ids: Any = None,
    pad_id: int = 0,
    key: Any = None,
    prompt_lengths: Any = None,
    implementation: str | None = None,
    allow_beyond_context: bool = False,
    top_log_probabilities: int | None = None,
    stop: Sequence[Sequence[int]] = (),
    tokenizer: Any = None,
) -> Stream:
    """`generate`, but the tokens come in pieces of at most 16, and with a `tokenizer` their text too. It ends early when
    all rows have ended. Arguments and errors are `generate`'s, raised before the first piece."""
    policy = as_policy(policy)
    check_sampling(config, policy, sampling, eos_ids, pad_id, key, implementation)
    state = prefill(
        params,
        config,
        prompts,
        policies=(policy,),
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        implementation=implementation,
        allow_beyond_context=allow_beyond_context,
    )
    options: dict[str, Any] = dict(
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        key=key,
        implementation=implementation,
        top_log_probabilities=top_log_probabilities,
        stop=stop,
    )
    return stream_after(params, config, state, policy=policy, tokenizer=tokenizer, **options)


def stream_after(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    *,
    policy: Policy | str,
    max_new_tokens: int | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Stream:
    """`decode`, but in pieces, as `stream`; `state` is donated, and `Stream.state` follows it. `options` are `decode`'s."""
    if isinstance(state.cache.length, Tracer):
        raise ValueError("a stream works outside of jax.jit alone: use decode inside")
    policy = as_policy(policy)
    count = state.room if max_new_tokens is None else max_new_tokens
    pieces = _pieces(params, config, state, policy, count, options)
    return Stream(pieces, state.logits.shape[0], tokenizer)


def _pieces(
    params: Params, config: LlamaConfig, state: Prefilled, policy: Policy, count: int, options: dict[str, Any]
) -> Iterator[tuple[_Out, Prefilled, bool]]:
    """(piece, the state after what has been begun so far, whether it is the last one). One piece is begun ahead."""
    if isinstance(policy, Lossless):
        yield from _blocks(params, config, state, policy, count, options)
        return
    made, waiting, stretch = 0, None, generation_loop.Stretch.of(policy)
    step = None if state.answer is None else int(state.answer.step)
    options = options | {"policy": policy, "rewind": False, "stretch": stretch}
    while made < count:
        # the first token takes no step; alone it is there soon, and all further pieces are made by one program
        size = 1 if step is None else min(stretch.steps(policy, step), count - made)
        out, state = advance(params, config, state, max_new_tokens=size, **options)
        step, made = 0 if step is None else step + size, made + size
        assert state.answer is not None
        scores = out[3:] if isinstance(out, ScoredGeneration) else ()
        out = _Out(*out[:3], jnp.copy(state.answer.done), scores)  # the state's own is donated to the next piece
        if waiting is not None:
            yield waiting, state, False
            if bool(np.all(np.asarray(waiting.done))):
                return
        waiting = out
    if waiting is not None:
        yield waiting, state, True


def _blocks(
    params: Params, config: LlamaConfig, state: Prefilled, policy: Lossless, count: int, options: dict[str, Any]
) -> Iterator[tuple[_Out, Prefilled, bool]]:
    """`_pieces` of drafts that were verified: rows get different numbers of tokens from each. Of the state's room a piece
    takes as many tokens as it could have made."""
    rounds = max(1, generation_loop.MOST_PER_SCAN // (policy.draft_length + 1))
    stretch = generation_loop.Stretch(policy.draft_length, rounds)
    options = options | {"policy": policy, "rewind": False}
    waiting, is_done, last = None, False, None if state.answer is None else state.answer.lengths + count
    while not is_done:
        if last is None:  # the first token alone, which is there soon
            out, state = advance(params, config, state, max_new_tokens=1, **options)
            last = jnp.full(state.logits.shape[0], count, jnp.int32)
        else:
            most = rounds * (policy.draft_length + 1)
            out, state = advance(params, config, state, max_new_tokens=most, stretch=stretch, last=last, **options)
        assert state.answer is not None
        scores = out[3:] if isinstance(out, ScoredGeneration) else ()
        out = _Out(*out[:3], state.answer.done | (state.answer.lengths >= last), scores)
        if waiting is not None:
            yield waiting, state, False
            is_done = bool(np.all(np.asarray(waiting.done)))
        waiting = out
