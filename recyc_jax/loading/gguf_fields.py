"""Typed access to a GGUF file's metadata, and the refusal of what is not used.

Every function raises ValueError naming the key and its value.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_LONGEST_SHOWN = 80
_LEAST, _MOST = 1e-37, 1e38


def whole(fields: dict[str, Any], key: str, default: int | None = None, least: int = 0) -> int:
    """The whole number at `key`, at least `least`."""
    value = _given(fields, key, default)
    if type(value) is not int or value < least:
        raise ValueError(f"{shown(key, value)} must be a whole number of at least {least}")
    return value


def real(fields: dict[str, Any], key: str, default: float | None = None) -> float:
    """The positive number at `key`, which a float32 can hold."""
    value = _given(fields, key, default)
    if type(value) not in (int, float) or not _LEAST < value < _MOST:
        raise ValueError(f"{shown(key, value)} must be a positive number")
    return float(value)


def flag(fields: dict[str, Any], key: str, default: bool) -> bool:
    """The truth value at `key`."""
    value = fields.get(key, default)
    if type(value) is not bool:
        raise ValueError(f"{shown(key, value)} must be true or false")
    return value


def text(fields: dict[str, Any], key: str, default: str | None = None) -> str:
    """The text at `key`."""
    value = _given(fields, key, default)
    if type(value) is not str:
        raise ValueError(f"{shown(key, value)} must be a text")
    return value


def entries(fields: dict[str, Any], key: str, *kinds: type) -> list[Any]:
    """The list at `key`, whose entries all have one of the types `kinds`."""
    value = _given(fields, key, None)
    if type(value) is not list or not all(type(entry) in kinds for entry in value):
        raise ValueError(f"{shown(key, value)} must be a list of {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def per_layer(fields: dict[str, Any], key: str, layers: int, default: int | None = None) -> int:
    """The whole number at `key`, which may be a list with the same number for every layer."""
    value = _given(fields, key, default)
    if type(value) is not list:
        return whole(fields, key, default, least=1)
    if len(value) != layers or len(set(value)) != 1:
        raise ValueError(
            f"{shown(key, value)} is not supported: it must be one number, the same in all {layers} layers"
        )
    return whole({key: value[0]}, key, least=1)


def refuse_others(
    fields: dict[str, Any], namespace: str, used: Collection[str], irrelevant: Collection[str], off: Mapping[str, str]
) -> None:
    """Raise ValueError for a key of the namespace that is neither used, nor irrelevant, nor in `off` with a value that
    switches it off (0, false, an empty text or list, a list of those). The values of `off` say what a key asks for."""
    for key, value in fields.items():
        name = key.removeprefix(namespace)
        if name == key or name in used or name in irrelevant:
            continue
        if name not in off:
            raise ValueError(f"{shown(key, value)} is not supported: what it asks for is not known here")
        if any(value) if isinstance(value, list) else value:
            raise ValueError(f"{shown(key, value)} is not supported: it asks for {off[name]}")


def shown(key: str, value: Any) -> str:
    """`key=value` for a message, in one line and not long."""
    return f"{key}={quoted(value[:_LONGEST_SHOWN] if isinstance(value, list) else value)}"


def quoted(value: Any) -> str:
    """A value as Python writes it, cut to what a message can hold."""
    line = repr(value)
    return line if len(line) <= _LONGEST_SHOWN else line[:_LONGEST_SHOWN] + "..."


def _given(fields: dict[str, Any], key: str, default: Any) -> Any:
    value = fields.get(key, default)
    if value is None:
        raise ValueError(f"the field {key!r} is missing")
    return value
