"""Policies by name, as command lines and result files spell them: `recycled:budget=512,stride=10`."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, cast

from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.h2o import H2O
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM


class _Options:
    """The `key=value` pairs of one policy string, each taken once."""

    def __init__(self, text: str, pairs: str, length: int | None) -> None:
        self.text, self.length = text, length
        self.values: dict[str, str] = {}
        for pair in filter(None, pairs.split(",")):
            key, equals, value = pair.partition("=")
            if not equals or not value:
                raise ValueError(f"policy {text!r}: {pair!r} is not of the form key=value")
            if key in self.values:
                raise ValueError(f"policy {text!r} gives {key} twice")
            self.values[key] = value

    def integer(self, key: str, default: int | None = None) -> int:
        if key not in self.values:
            if default is None:
                raise ValueError(f"policy {self.text!r} needs {key}=...")
            return default
        value = self.values.pop(key)
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"policy {self.text!r}: {key}={value} is not a whole number") from None

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self.values else None

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self.values else None

    def number(self, key: str) -> float:
        value = self.values.pop(key, None)
        if value is None:
            raise ValueError(f"policy {self.text!r} needs {key}=...")
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"policy {self.text!r}: {key}={value} is not a number") from None

    def truth(self, key: str, default: bool) -> bool:
        value = self.values.pop(key, str(default).lower())
        if value not in ("true", "false"):
            raise ValueError(f"policy {self.text!r}: {key}={value} is neither true nor false")
        return value == "true"

    def text_of(self, key: str) -> str | None:
        return self.values.pop(key, None)

    def lookahead(self) -> int | Literal["auto"]:
        """A number of tokens, or auto; 0 where it is not given."""
        if self.values.get("lookahead") == "auto":
            del self.values["lookahead"]
            return "auto"
        return self.integer("lookahead", 0)

    def budget(self) -> int:
        """Entries read a step; with a point, a fraction of the total length (at least 1 entry)."""
        value = self.values.get("budget", "")
        if "." not in value:
            return self.integer("budget")
        del self.values["budget"]
        try:
            fraction = Fraction(value)  # exact: 0.29 of 100 is 29, which binary floats put below
        except ValueError:
            raise ValueError(f"policy {self.text!r}: budget={value} is not a number") from None
        if not 0 < fraction <= 1:
            raise ValueError(f"policy {self.text!r}: the fraction budget={value} must lie in (0, 1]")
        if self.length is None:
            raise ValueError(f"policy {self.text!r}: a fractional budget needs a length; give a whole number of tokens")
        return max(1, int(fraction * self.length))


def _full(options: _Options) -> Policy:
    return FullAttention()


def _recycled(options: _Options) -> Policy:
    return RecycledAttention(
        budget=options.budget(),
        schedule=_schedule(options),
        pool=options.integer("pool", 7),
        lookahead=options.lookahead(),
        evict=options.truth("evict", True),
        ablation=cast(Any, options.text_of("ablation")),  # checked there
        window=options.integer("window", 1),
        decay=options.optional_number("decay"),
    )


def _schedule(options: _Options) -> FixedStride | QuerySimilarity:
    if "check_every" not in options.values and "threshold" not in options.values:
        return FixedStride(options.integer("stride"))
    if "stride" in options.values:
        raise ValueError(f"policy {options.text!r}: stride goes with neither check_every nor threshold")
    return QuerySimilarity(
        options.integer("check_every"), options.number("threshold"), rope=options.truth("rope", False)
    )


def _streaming_llm(options: _Options) -> Policy:
    return StreamingLLM(options.budget(), options.integer("sinks", 4), options.optional_integer("full_stride"))


def _h2o(options: _Options) -> Policy:
    return H2O(options.budget(), options.optional_integer("full_stride"))


def _snapkv(options: _Options) -> Policy:
    integer = options.integer
    return SnapKV(options.budget(), integer("window", 1), integer("pool", 7), integer("lookahead", 0))


POLICIES: dict[str, Callable[[_Options], Policy]] = {
    "full": _full,
    "recycled": _recycled,
    "snapkv": _snapkv,
    "h2o": _h2o,
    "streaming_llm": _streaming_llm,
}


def parse_policy(text: str, length: int | None = None) -> Policy:
    """The policy that a string such as `"recycled:budget=512,stride=10"` names.

    `length` is the total length (prompt and what is generated) that a fractional budget (`budget=0.125`) refers to.
    Raises ValueError, naming the string and what is wrong with it.
    """
    name, _, pairs = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"policy {text!r}: {name!r} is unknown; there is {', '.join(POLICIES)}")
    options = _Options(text, pairs, length)
    try:
        policy = POLICIES[name](options)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if text in message else f"policy {text!r}: {message}") from None
    if options.values:
        raise ValueError(f"policy {text!r}: {name} has no option {', '.join(sorted(options.values))}")
    return policy
