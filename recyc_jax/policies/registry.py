"""Policies as strings, for command lines and result files: `recycled:budget=512,stride=10`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Literal, cast

from recyc_jax.policies.ablations import variant
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.h2o import H2O
from recyc_jax.policies.lookahead import Lookahead
from recyc_jax.policies.lossless import Lossless
from recyc_jax.policies.quest import Quest
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM
from recyc_jax.policies.top_k import TopK


class Options:
    """The `key=value` options of a policy string. Reading an option removes it; options that remain are unknown."""

    def __init__(self, text: str, pairs: str, length: int | None) -> None:
        self.text, self.length = text, length
        self.values: dict[str, str] = {}
        for pair in filter(None, map(str.strip, pairs.split(","))):
            key, equals, value = (part.strip() for part in pair.partition("="))
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

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.pop(key, default)
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

    def lookahead(self, default: int | Literal["auto"] = 0) -> int | Literal["auto"]:
        """The number of tokens, or "auto"; `default` if the option is not given."""
        value = self.values.get("lookahead", default)
        if value == "auto":
            self.values.pop("lookahead", None)
            return "auto"
        return self.integer("lookahead", value if isinstance(value, int) else None)

    def schedule(self) -> FixedStride | QuerySimilarity:
        """The schedule that `stride`, or `check_every` and `threshold`, describe."""
        if "check_every" not in self.values and "threshold" not in self.values:
            return FixedStride(self.integer("stride", 1 if "draft" in self.values else None))
        if "stride" in self.values:
            raise ValueError(f"policy {self.text!r}: stride goes with neither check_every nor threshold")
        return QuerySimilarity(self.integer("check_every"), self.number("threshold"), rope=self.truth("rope", False))

    def drafting(self, drafter: Any, draft: str | None) -> Policy:
        """The policy, or with the option `draft` the lossless one that drafts by it."""
        if draft is None:
            return drafter
        adapt, every = self.truth("adapt", True), self.integer("refresh_every", Lossless.refresh_every)
        return Lossless(drafter, Options(self.text, f"draft={draft}", None).integer("draft"), adapt, every)

    def refuse_beside_draft(self, *names: str) -> str | None:
        """The option `draft`, which goes without these."""
        for name in names if "draft" in self.values else ():
            if name in self.values:
                is_when = name in ("stride", "check_every", "threshold")
                instead = ": refresh_every=N says when the kept set is renewed" if is_when else ""
                raise ValueError(f"policy {self.text!r}: draft goes without {name}{instead}")
        return self.values.get("draft")

    def budget(self, default: int | None = None) -> int:
        """The entries that a step reads; with a decimal point, a fraction of the total length (rounded down, at least
        1 entry)."""
        value = self.values.get("budget", "")
        if "." not in value:
            return self.integer("budget", default)
        del self.values["budget"]
        try:
            fraction = Fraction(value)  # exact: 0.29 * 100 is 29, but less than 29 in binary floats
        except ValueError:
            raise ValueError(f"policy {self.text!r}: budget={value} is not a number") from None
        if not 0 < fraction <= 1:
            raise ValueError(f"policy {self.text!r}: the fraction budget={value} must lie in (0, 1]")
        if self.length is None:
            raise ValueError(f"policy {self.text!r}: a fractional budget needs a length; give a whole number of tokens")
        return max(1, int(fraction * self.length))


def _full(options: Options) -> Policy:
    return FullAttention()


def _lookahead(options: Options) -> Policy:
    defaults, draft = Lookahead(), options.refuse_beside_draft("stride", "remainder")
    drafter = Lookahead(
        budget=options.budget(defaults.budget),
        stride=options.integer("stride", defaults.stride if draft is None else 1),
        lookahead=options.lookahead(defaults.lookahead),
        window=options.integer("window", defaults.window),
        decay=options.number("decay", defaults.decay),
        pool=options.integer("pool", defaults.pool),
        remainder=options.truth("remainder", defaults.remainder),
    )
    return options.drafting(drafter, options.text_of("draft"))


def _recycled(options: Options) -> Policy:
    draft = options.refuse_beside_draft("stride", "check_every", "threshold", "evict", "ablation")
    drafter = RecycledAttention(
        budget=options.budget(),
        schedule=options.schedule(),
        pool=options.integer("pool", 7),
        lookahead=options.lookahead(),
        evict=options.truth("evict", True),
        ablation=cast(Any, options.text_of("ablation")),  # RecycledAttention checks it
        window=options.integer("window", 1),
        decay=options.optional_number("decay"),
    )
    options.text_of("draft")
    return options.drafting(drafter, draft)


def _streaming_llm(options: Options) -> Policy:
    return StreamingLLM(options.budget(), options.integer("sinks", 4), options.optional_integer("full_stride"))


def _h2o(options: Options) -> Policy:
    return H2O(options.budget(), options.optional_integer("full_stride"))


def _snapkv(options: Options) -> Policy:
    integer = options.integer
    return SnapKV(options.budget(), integer("window", 1), integer("pool", 7), integer("lookahead", 0))


def _quest(options: Options) -> Policy:
    return Quest(options.budget(), options.integer("page", 16), options.integer("dense_layers", 2))


def _top_k(options: Options) -> Policy:
    return TopK(options.budget())


MakePolicy = Callable[[Options], Policy]

POLICIES: dict[str, MakePolicy] = {
    "full": _full,
    "lookahead": _lookahead,
    "recycled": _recycled,
    "snapkv": _snapkv,
    "h2o": _h2o,
    "streaming_llm": _streaming_llm,
    "quest": _quest,
    "top_k": _top_k,
}


def parse_policy(text: str, length: int | None = None, policies: Mapping[str, MakePolicy] = POLICIES) -> Policy:
    """The policy that a string such as `"recycled:budget=512,stride=10"` names.

    `length` is the total length (prompt and new tokens) that a fractional budget (`budget=0.125`) refers to. `policies`
    maps the known names to functions that make policies. Raises ValueError that names the string and what is wrong with
    it."""
    if not isinstance(text, str):
        raise ValueError(f"a policy string is needed, such as 'recycled:budget=512,stride=10', not {text!r}")
    name, _, pairs = text.partition(":")
    name = name.strip()
    if name not in policies:
        raise ValueError(f"policy {text!r}: {name!r} is unknown; there is {', '.join(policies)}")
    options = Options(text, pairs, length)
    try:
        policy = policies[name](options)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if text in message else f"policy {text!r}: {message}") from None
    if options.values:
        raise ValueError(f"policy {text!r}: {name} has no option {', '.join(sorted(options.values))}")
    return policy


def as_policy(policy: Policy | str) -> Policy:
    """The policy that the generation loop runs, from a policy or a policy string. Raises ValueError for anything
    else."""
    if isinstance(policy, str):
        policy = parse_policy(policy)
    if not isinstance(policy, Policy):
        raise ValueError(f"policy={policy!r} is neither a policy, such as FullAttention(), nor a policy string")
    return variant(policy)
