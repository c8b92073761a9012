"""The vocabulary in a GGUF file's metadata: its tokens, their types, the special ones, and those that end generation.

Functions raise ValueError naming the key at fault.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, NamedTuple

from recyc_jax.loading import gguf_fields

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's types of tokens; 0 is undefined

# The texts by which llama.cpp finds the ends of texts, turns and messages. Files made before 2024 name one end alone,
# and chat models end their turns with another. Llama.cpp also stops at the parts of a fill-in-the-middle prompt, which
# begin something, and at gpt-oss's and Gemma 4's calls of tools.
END_TEXTS = {
    *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "▁<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
}
_ALSO_MARKUP = "</s>"  # HTML's end of struck text, an ordinary token in some vocabularies

_ENDS = ("eos", "eot", "eom")
ROLES = (*_ENDS, "bos", "unknown", "padding")
_SENTENCEPIECE_ROLES = {"unknown": 0, "bos": 1, "eos": 2}  # what llama.cpp takes where the file names none
_NONE = (-1, 2**32 - 1)  # how llama.cpp writes that a special token does not exist


class Vocabulary(NamedTuple):
    """The tokens by id, their types, and the ids of the special ones by role (`bos`, `eos`, `unknown` ...)."""

    kind: str  # gpt2 or llama
    tokens: list[str]
    types: list[int]
    special: dict[str, int]


def read(fields: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a file with these metadata."""
    kind = gguf_fields.text(fields, "tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{gguf_fields.shown('tokenizer.ggml.model', kind)} is not supported; gpt2 and llama are")
    tokens = _tokens(fields)
    types = _types(fields, tokens)
    special = {role: number for role in ROLES if (number := _special(fields, role, tokens)) is not None}
    if kind == "llama":
        for role, number in _SENTENCEPIECE_ROLES.items():
            if number < len(tokens) and (role == "unknown" or types[number] == CONTROL):
                special.setdefault(role, number)
    return Vocabulary(kind, tokens, types, special)


def end_ids(fields: dict[str, Any]) -> list[int]:
    """The ids that end a text, a turn or a message, as Hugging Face's generation configs list them: those that the file
    names, then the control tokens whose text says so. A token of another type with such a text is made one, as in
    llama.cpp, which is logged."""
    vocabulary = read(fields)
    found = [vocabulary.special[role] for role in _ENDS if role in vocabulary.special]
    several = "tokenizer.ggml.eos_token_ids"  # which ollama writes
    more = gguf_fields.entries(fields, several, int) if several in fields else []
    found += [_checked(several, number, vocabulary.tokens) for number in more]
    said = fields.get("tokenizer.ggml.token_type")
    for number, token in enumerate(vocabulary.tokens):
        if token in END_TEXTS and vocabulary.types[number] == CONTROL:
            found.append(number)
            if said and said[number] != CONTROL:
                message = "token %d is %s, but not of control type: taken as one, which ends generation"
                logging.getLogger(__name__).warning(message, number, token)
    return list(dict.fromkeys(found))


def _tokens(fields: dict[str, Any]) -> list[str]:
    key = "tokenizer.ggml.tokens"
    # no text can yield an empty token; it gets a name as in llama.cpp, since names must differ
    tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(gguf_fields.entries(fields, key, str))]
    if not tokens:
        raise ValueError(f"{key} is empty")
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{key} has the token {gguf_fields.quoted(token)} {count} times")
    return tokens


def _types(fields: dict[str, Any], tokens: list[str]) -> list[int]:
    key = "tokenizer.ggml.token_type"
    types = list(gguf_fields.entries(fields, key, int)) if key in fields else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(f"{key} has {len(types)} entries for {len(tokens)} tokens")
    if not set(types) <= set(range(BYTE + 1)):
        raise ValueError(f"{key} has the entry {max(types, key=abs)}; types are 0 to {BYTE}")
    ids = {token: number for number, token in enumerate(tokens)}
    for token in (END_TEXTS - {_ALSO_MARKUP}) & set(ids):
        types[ids[token]] = CONTROL
    for token in _added(fields, ids):
        if types[ids[token]] == NORMAL:
            types[ids[token]] = USER_DEFINED
    return types


def _added(fields: dict[str, Any], ids: dict[str, int]) -> list[str]:
    """The tokens that the file says were added to those of the tokenizer."""
    key = "tokenizer.ggml.added_tokens"
    added = gguf_fields.entries(fields, key, str) if key in fields else []
    if not set(added) <= set(ids):
        odd = gguf_fields.quoted(min(set(added) - set(ids)))
        raise ValueError(f"{key} has {odd}, which is not in tokenizer.ggml.tokens")
    return added


def _special(fields: dict[str, Any], role: str, tokens: list[str]) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    number = fields.get(key)
    return None if number is None or number in _NONE else _checked(key, number, tokens)


def _checked(key: str, number: Any, tokens: list[str]) -> int:
    if type(number) is not int or not 0 <= number < len(tokens):
        raise ValueError(f"{gguf_fields.shown(key, number)} is not the id of one of the {len(tokens)} tokens")
    return number
