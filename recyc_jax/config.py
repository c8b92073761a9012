"""The shape of a Llama-family decoder, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from recyc_jax.tiny_shape import TINY
from recyc_jax.validation import real_number, whole_number

_MOST_LAYERS = 1000  # a layer is a part of the program: more cannot be compiled


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the RoPE frequencies: `linear` (positions divided by `factor`) or `llama3` (Llama 3.1 and later). Raises
    ValueError for another kind, and for numbers that the kind cannot take."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"RopeScaling kind={self.kind!r} is not supported; linear and llama3 are")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            real_number(name, getattr(self, name), 1e-6, 1e6)
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor:g} must be below high_freq_factor={self.high_freq_factor:g}"
            )
        whole_number("original_max_position_embeddings", self.original_max_position_embeddings, 1)


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder's shape, with Hugging Face's field names. `N = num_attention_heads` queries share
    `K = num_key_value_heads` key/value heads in groups of `G = N // K`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                whole_number(field.name, getattr(self, field.name), 1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.num_hidden_layers > _MOST_LAYERS:
            raise ValueError(f"num_hidden_layers={self.num_hidden_layers} must be at most {_MOST_LAYERS}")
        real_number("rope_theta", self.rope_theta, 1e-6, 1e30)
        real_number("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")

    @classmethod
    def tiny(cls, **overrides: Any) -> LlamaConfig:
        """A two-layer shape for tests and examples; any field can be overridden."""
        return cls(**(TINY | overrides))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """The shape that a Hugging Face `config.json` (as a dict) asks for.

        Raises ValueError naming the field where it asks for what is not supported, or leaves a needed one out.
        """
        kind = hf.get("model_type")
        if kind not in ("llama", "qwen2"):
            raise ValueError(f"model_type={kind!r} is not supported; llama and qwen2 are")
        _reject_unsupported(hf, kind)
        heads, hidden = _whole(hf, "num_attention_heads"), _whole(hf, "hidden_size")
        if hf.get("head_dim") is None and hidden % heads:
            raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and no head_dim")
        fields: dict[str, Any] = dict(
            vocab_size=_whole(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(hf, "intermediate_size"),
            num_hidden_layers=_whole(hf, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(hf, "num_key_value_heads", heads),
            head_dim=_whole(hf, "head_dim", hidden // heads),
            max_position_embeddings=_whole(hf, "max_position_embeddings", 2048),
        )
        theta, scaling = _rope(hf, fields["max_position_embeddings"])
        return cls(
            **fields,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=real_number("rms_norm_eps", _given(hf, "rms_norm_eps", 1e-6), 0.0, 1.0),
            # Both families' Hugging Face classes untie by default.
            tie_word_embeddings=_flag(hf, "tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            eos_token_ids=token_ids("eos_token_id", hf.get("eos_token_id")),
        )


def _whole(hf: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = _given(hf, name, default)
    if value is None:
        raise ValueError(f"the config lacks the field {name!r}")
    return whole_number(name, value, 1)


def _flag(hf: Mapping[str, Any], name: str, default: bool) -> bool:
    value = _given(hf, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false")
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The token ids of a field `name` that holds one, several or none. Raises ValueError that names the field."""
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return tuple(whole_number(name, each, 0) for each in values)


def _given(hf: Mapping[str, Any], name: str, default: Any) -> Any:
    value = hf.get(name)
    return default if value is None else value


def _reject_unsupported(hf: Mapping[str, Any], kind: str) -> None:
    wanted = {
        "hidden_act": "silu",
        "mlp_bias": False,
        "attention_bias": kind == "qwen2",  # Qwen2's biases are in q, k and v alone; Llama's flag adds one to o too
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
        "dual_chunk_attention_config": None,  # Qwen2.5-1M
    }
    for name, supported in wanted.items():
        value = hf.get(name)
        if value is not None and value != supported:
            raise ValueError(f"{name}={value!r} is not supported (only {supported!r} is)")
    layers = hf.get("layer_types") or []
    odd_layers = (
        [layer for layer in layers if layer != "full_attention"] if isinstance(layers, list | tuple) else layers
    )
    if odd_layers:
        raise ValueError(f"layer_types has {odd_layers!r}: only 'full_attention' is supported")


def _rope(hf: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from transformers 5's `rope_parameters` or from `rope_theta` and `rope_scaling` before it."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"  # transformers' order where both are there
    rope = hf.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}={rope!r} must be an object")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"{name} differs by layer type, which is not supported")
    theta = real_number("rope_theta", _given(rope, "rope_theta", _given(hf, "rope_theta", 10000.0)), 1e-6, 1e30)
    if _given(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{name}.partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported")
    kind = _given(rope, "rope_type", _given(rope, "type", "default"))

    def number(field: str) -> float:
        if rope.get(field) is None:
            raise ValueError(f"{name} lacks the field {field!r}")
        return real_number(f"{name}.{field}", rope[field], 1e-6, 1e6)

    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", number("factor"))
    if kind == "llama3":
        frequencies = number("low_freq_factor"), number("high_freq_factor")
        original = _given(rope, "original_max_position_embeddings", max_positions)
        return theta, RopeScaling("llama3", number("factor"), *frequencies, original)
    raise ValueError(f"{name}.rope_type={kind!r} is not supported; default, linear and llama3 are")
