"""From what a caller passes as prompts to one right-padded array of token ids and the rows' lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from recyc_jax import sharding
from recyc_jax.config import LlamaConfig


def bucket(length: int) -> int:
    """`length` rounded up so that at most an eighth is padding, or fewer than 16 slots: 8 sizes to each power of two."""
    step = 2 ** max(4, length.bit_length() - 4)
    return -(-length // step) * step


def as_arrays(prompts: Any, prompt_lengths: Any, config: LlamaConfig) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Token ids [B, T], right-padded, and each row's length.

    Ragged lists are padded to a bucket of their longest row. Raises ValueError for empty lists or prompts, for text,
    lengths outside 1..T and ids outside the vocabulary; traced arrays, whose values are not known, are taken as given.
    """
    if isinstance(prompts, Mapping):  # what a transformers tokenizer returns
        if "input_ids" not in prompts:
            raise ValueError(f"prompts is a mapping without 'input_ids' (it has {', '.join(map(str, prompts))})")
        prompts = _unpadded(prompts["input_ids"], prompts.get("attention_mask"))
    if isinstance(prompts, jax.Array | np.ndarray):
        tokens, lengths = _from_array(prompts, prompt_lengths)
    else:
        if prompt_lengths is not None:
            raise ValueError("prompt_lengths goes with an array of prompts; lists carry their own lengths")
        tokens, lengths = _from_lists(prompts)
    if not isinstance(lengths, Tracer):
        known = sharding.fetched(lengths)
        _check_lengths(known, tokens.shape[1])
        if not isinstance(tokens, Tracer):
            _check_ids(sharding.fetched(tokens), known, config)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)


def check_context(lengths: Any, new_tokens: int, config: LlamaConfig) -> None:
    """Raise ValueError if a prompt and its new tokens, the last of which is never fed, exceed the config's context.
    Lengths that are traced, and so not known, are taken as given."""
    if isinstance(lengths, Tracer):
        return
    longest = int(np.max(sharding.fetched(lengths)))
    if longest + new_tokens - 1 > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's context of "
            f"{config.max_position_embeddings} tokens (max_position_embeddings): shorten them, or pass "
            "allow_beyond_context=True"
        )


def as_rectangle(name: str, tokens: Any, config: LlamaConfig) -> Int[Array, "B T"]:
    """Token ids [B, T] from an array or from lists of one length. Raises ValueError, with the argument's name, for rows
    of different lengths and as `as_arrays` does."""
    if not isinstance(tokens, jax.Array | np.ndarray):
        _refuse_text(name, tokens)
        lengths = sorted({len(row) if isinstance(row, Sequence | np.ndarray | jax.Array) else 0 for row in tokens})
        if len(lengths) > 1:
            raise ValueError(f"{name} has rows of {lengths[0]} to {lengths[-1]} tokens: all rows must be of one length")
        tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"{name} must be token ids [B, T], not of shape {list(tokens.shape)}")
    return as_arrays(tokens, None, config)[0]


def _refuse_text(name: str, prompts: Any) -> None:
    texts = isinstance(prompts, str | bytes) or (
        isinstance(prompts, Sequence) and isinstance(next(iter(prompts), 0), str)
    )
    if texts:
        raise ValueError(f"{name} is text: pass token ids, such as [tokenizer(text)['input_ids'] for text in texts]")


def _unpadded(input_ids: Any, attention_mask: Any) -> list[Any]:
    """The rows of a tokenizer's batch, or its only row, without padding."""
    if len(input_ids) and np.ndim(input_ids[0]) == 0:
        input_ids, attention_mask = [input_ids], None if attention_mask is None else [attention_mask]
    rows = [np.asarray(row) for row in input_ids]
    if attention_mask is None:
        return rows
    return [row[np.asarray(mask).astype(bool)] for row, mask in zip(rows, attention_mask, strict=True)]


def _from_array(tokens: Any, lengths: Any) -> tuple[Any, Any]:
    if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"prompts must be integers [B, T], not {tokens.dtype}{list(tokens.shape)}")
    if lengths is None:
        lengths = np.full(tokens.shape[0], tokens.shape[1], np.int32)
    elif np.shape(lengths) != tokens.shape[:1]:
        raise ValueError(f"prompt_lengths has shape {list(np.shape(lengths))} for {tokens.shape[0]} prompts")
    return tokens, lengths


def _from_lists(prompts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    _refuse_text("prompts", prompts)
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows:
        raise ValueError("prompts is empty: pass at least one list of token ids")
    for number, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(f"prompt {number} is empty: every prompt needs at least one token")
        if row.ndim != 1 or not np.issubdtype(row.dtype, np.integer):
            raise ValueError(f"prompt {number} is not a flat list of token ids")
    lengths = np.array([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), bucket(int(lengths.max()))), np.int64)  # narrowed once the ids are checked
    for row, ids in zip(tokens, rows, strict=True):
        row[: ids.size] = ids
    return tokens, lengths


def _check_lengths(lengths: np.ndarray, width: int) -> None:
    if not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(f"prompt_lengths must be integers, not {lengths.dtype}")
    for row, length in enumerate(lengths):
        if not 1 <= length <= width:
            raise ValueError(f"prompt_lengths[{row}]={length} is outside 1..{width}")


def _check_ids(tokens: np.ndarray, lengths: np.ndarray, config: LlamaConfig) -> None:
    for row, length in enumerate(lengths):
        ids = tokens[row, :length]
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            culprit = ids[(ids < 0) | (ids >= config.vocab_size)][0]
            raise ValueError(f"prompt {row} has token id {culprit}, outside the vocabulary of {config.vocab_size}")
