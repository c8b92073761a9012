"""Numbers of results that may not be finite."""

from __future__ import annotations

import math


def perplexity(nll: float) -> float:
    """The exponential of a mean loss in nats per token; infinite where a float cannot hold it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def finite(value: float, digits: int | None = None) -> float | None:
    """`value`, rounded to `digits` if given; None if it is not finite, because JSON has neither NaN nor infinity."""
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def shown(value: float | None, digits: int) -> str:
    """`value` for a table, with `digits` decimals; "not finite" for None."""
    return "not finite" if value is None else f"{value:.{digits}f}"
