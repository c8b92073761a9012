"""Checks of numbers that a user passes, with the argument's name in the message."""

from __future__ import annotations

import operator
from typing import Any


def whole_number(name: str, value: Any, least: int) -> int:
    """`value` as an int. Raises ValueError naming it where it is no whole number (512 / 8 is not) or below `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    return number


def real_number(name: str, value: Any, least: float, most: float) -> float:
    """`value` as a float. Raises ValueError naming it where it is no number or outside `least` to `most`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} must be a number") from None
    if not least <= number <= most:  # a NaN fails both comparisons
        raise ValueError(f"{name}={number:g} must lie in {least:g}..{most:g}")
    return number
