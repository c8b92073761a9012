"""Checks of numbers that a user passes, with the argument's name in the message."""

from __future__ import annotations

import operator
from typing import Any

MOST = 2**31 - 1
"""The largest whole number that is taken: sizes and ids are 32 bits wide."""


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises ValueError naming it where it is no whole number (512 / 8 is not), below `least` or above
    `MOST`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    if number > MOST:
        raise ValueError(f"{name}={number} must be at most {MOST}")
    return number


def real_number(name: str, value: Any, least: float, most: float) -> float:
    """`value` as a float. Raises ValueError naming it where it is no number or outside `least` to `most`."""
    try:
        if isinstance(value, bool | str):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}={value!r} must be a number") from None
    if not least <= number <= most:  # a NaN fails both comparisons
        raise ValueError(f"{name}={number:g} must lie in {least:g}..{most:g}")
    return number
