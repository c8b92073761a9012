"""Scaling of RoPE's frequencies: its kinds, their numbers, and how a Hugging Face config states them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from recyc_jax.validation import real_number, whole_number

KINDS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "proportional": {"factor"},
}
"""The fields that each kind takes in a Hugging Face config, besides those that say where RoPE began."""

_OF_ANY_KIND = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"),
    *("llama_4_scaling_beta", "max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the RoPE frequencies, as transformers' functions of the same names compute it:

    - `linear`: positions divided by `factor`.
    - `dynamic`: theta grows with the length of a row beyond the model's `max_position_embeddings`.
    - `yarn` (https://arxiv.org/abs/2309.00071): frequencies that turn fewer than `beta_slow` times within the original
      length are divided by `factor`, those that turn more than `beta_fast` times are kept, others are blended.
    - `longrope` (https://arxiv.org/abs/2402.13753): each frequency divided by its own `short_factor`, or by its
      `long_factor` in rows longer than the original length.
    - `llama3`: like yarn, by wavelength (Llama 3.1 and later).
    - `proportional`: the first `partial_rotary_factor` of all frequencies divided by `factor`; other pairs do not turn.

    `attention_factor` multiplies cosines and sines under yarn and longrope (None: the published function of `factor`).
    `llama_4_scaling_beta` scales queries by `1 + beta * log(1 + floor(position / original length))`. Raises ValueError
    for another kind, and for numbers that the kind cannot take."""

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    llama_4_scaling_beta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"RopeScaling kind={self.kind!r} is not supported; {', '.join(KINDS)} are")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            real_number(name, getattr(self, name), 1e-6, 1e6)
        for name in ("short_factor", "long_factor"):
            for factor in getattr(self, name):
                real_number(name, factor, 1e-6, 1e6)
        if self.attention_factor is not None:
            real_number("attention_factor", self.attention_factor, 1e-6, 1e6)
        real_number("llama_4_scaling_beta", self.llama_4_scaling_beta, 0.0, 1e6)
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} must be below high_freq_factor={self.high_freq_factor:g}"
            )
        if self.kind == "yarn" and self.beta_slow > self.beta_fast:
            raise ValueError(f"beta_slow={self.beta_slow:g} must not exceed beta_fast={self.beta_fast:g}")
        whole_number("original_max_position_embeddings", self.original_max_position_embeddings, 1)
        if self.kind == "longrope" and self.original_max_position_embeddings < 2 and self.attention_factor is None:
            raise ValueError("original_max_position_embeddings=1 leaves longrope's attention_factor undefined")

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        if self.kind == "yarn":
            return _yarn_amplitude(self.factor, 1.0)
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


def _yarn_amplitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def from_hf(name: str, rope: Mapping[str, Any], original: int, max_positions: int) -> RopeScaling | None:
    """The scaling that the object `rope` of a config asks for; None for none. `original` is the length before scaling
    where `rope` does not state it. Raises ValueError naming the field `name` and the one within it at fault."""
    kind = _given(rope, "rope_type", _given(rope, "type", "default"))
    if kind == "su":  # longrope's name in early configs of Phi-3
        kind = "longrope"
    if kind != "default" and not (isinstance(kind, str) and kind in KINDS):
        raise ValueError(f"{name}.rope_type={kind!r} is not supported; default, {', '.join(KINDS)} are")
    known = KINDS.get(kind, set()) | _OF_ANY_KIND
    for field, value in rope.items():
        if field not in known and value is not None:
            raise ValueError(f"{name}.{field}={value!r} is not supported for rope_type={kind!r}")
    if kind == "default":
        return None
    original = whole_number(
        f"{name}.original_max_position_embeddings", _given(rope, "original_max_position_embeddings", original), 1
    )
    fields: dict[str, Any] = {}
    if kind in ("llama3", "yarn", "longrope") or rope.get("llama_4_scaling_beta"):
        fields["original_max_position_embeddings"] = original
    for field in KINDS[kind] - {"mscale", "mscale_all_dim", "truncate", "short_factor", "long_factor"}:
        if rope.get(field) is not None:
            fields[field] = real_number(f"{name}.{field}", rope[field], 1e-6, 1e6)
    for field in KINDS[kind] & {"short_factor", "long_factor"}:
        fields[field] = _numbers(f"{name}.{field}", _needed(name, rope, field))
    if kind in ("yarn", "longrope"):
        fields.setdefault("factor", max_positions / original)
    if kind == "yarn":
        fields["truncate"] = _given(rope, "truncate", True)
        if not isinstance(fields["truncate"], bool):
            raise ValueError(f"{name}.truncate={fields['truncate']!r} must be true or false")
        scales = [
            real_number(f"{name}.{field}", _given(rope, field, 0.0), 0.0, 1e6) for field in ("mscale", "mscale_all_dim")
        ]
        if "attention_factor" not in fields and all(scales):
            above, below = (_yarn_amplitude(fields["factor"], scale) for scale in scales)
            fields["attention_factor"] = above / below
    for field in {"linear": ("factor",), "dynamic": ("factor",)}.get(
        kind, ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    ):
        _needed(name, rope, field)
    beta = real_number(f"{name}.llama_4_scaling_beta", _given(rope, "llama_4_scaling_beta", 0.0), 0.0, 1e6)
    return RopeScaling(kind, **fields, llama_4_scaling_beta=beta)


def _needed(name: str, rope: Mapping[str, Any], field: str) -> Any:
    if rope.get(field) is None:
        raise ValueError(f"{name} lacks the field {field!r}")
    return rope[field]


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name}={values!r} must be a list of numbers")
    return tuple(real_number(name, value, 1e-6, 1e6) for value in values)


def _given(rope: Mapping[str, Any], name: str, default: Any) -> Any:
    value = rope.get(name)
    return default if value is None else value
