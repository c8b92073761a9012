"""The shape of a decoder: what distinguishes one model of the supported families from another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from recyc_jax import families
from recyc_jax.rope_scaling import RopeScaling
from recyc_jax.tiny_shape import TINY
from recyc_jax.validation import real_number, whole_number

_MOST_LAYERS = 1000  # a layer is a part of the program: more cannot be compiled

_CHOICES = {
    "qk_norm": (None, "head", "projection"),
    "norms": ("before", "after", "both"),
    "norm_scale": ("rounded", "float32", "one_plus"),
    "activation": ("silu", "gelu_tanh"),
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A decoder's shape, with Hugging Face's field names where there are some. `N = num_attention_heads` queries share
    `K = num_key_value_heads` key/value heads in groups of `G = N // K`. The defaults are Llama's; what other families
    ask for is in `families.py`. Raises ValueError naming the field at fault."""

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
    partial_rotary_factor: float = 1.0
    """The share of each head's dimensions that RoPE rotates, the first ones."""
    layers_without_rope: tuple[int, ...] = ()
    layer_types: tuple[str, ...] = ()
    """For each layer `full_attention` or `sliding_attention`; empty if all layers have full attention."""
    sliding_window: int | None = None
    """Tokens that layers with a sliding window attend to, the latest ones with the token itself."""
    sliding_rope_theta: float | None = None
    """Theta of the layers with a sliding window, whose RoPE is then not scaled; None: they rotate as other layers do."""
    qk_norm: str | None = None
    """RMS norms of queries and keys before RoPE: \"head\", of each head, or \"projection\", of a whole projection."""
    norms: str = "before"
    """Where the norms of attention and feed-forward stand: "before" them, "after" them (within the residual branch), or
    "both"."""
    norm_scale: str = "rounded"
    """How a norm multiplies by its scale: "rounded", after rounding to the dtype of x; in "float32"; or "one_plus", by
    1 + scale in float32."""
    activation: str = "silu"
    """Of the feed-forward gate: "silu", or "gelu_tanh", the GELU's approximation by tanh."""
    embedding_multiplier: float = 1.0
    query_pre_attn_scalar: float | None = None
    """Attention logits are divided by its square root; None: `head_dim`."""
    fused_projections: bool = False
    """Checkpoints store q, k, v as one tensor and gate and up as another; our parameters never do."""

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
        real_number("partial_rotary_factor", self.partial_rotary_factor, 1e-6, 1.0)
        real_number("embedding_multiplier", self.embedding_multiplier, 1e-6, 1e6)
        for name in ("sliding_rope_theta", "query_pre_attn_scalar"):
            if getattr(self, name) is not None:
                real_number(name, getattr(self, name), 1e-6, 1e30)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported; {choices} are")
        self._check_layers()
        self._check_rope()

    def _check_layers(self) -> None:
        layers, kinds = self.num_hidden_layers, (families.FULL, families.SLIDING)
        if self.layer_types and (len(self.layer_types) != layers or not {*self.layer_types} <= {*kinds}):
            raise ValueError(
                f"layer_types={self.layer_types} must give {' or '.join(kinds)} for each of {layers} layers"
            )
        if self.sliding_window is not None:
            whole_number("sliding_window", self.sliding_window, 1)
        if (families.SLIDING in self.layer_types) != (self.sliding_window is not None):
            raise ValueError(f"sliding_window={self.sliding_window} does not go with layer_types={self.layer_types}")
        if not {*self.layers_without_rope} <= {*range(layers)}:
            raise ValueError(f"layers_without_rope={self.layers_without_rope} must be layers 0 to {layers - 1}")

    def _check_rope(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: RoPE rotates pairs")
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor:g} rotates {self.rotary_dim} of {self.head_dim} "
                "dimensions, which is no even number above 0"
            )
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != self.rotary_dim // 2:
                    raise ValueError(
                        f"{name} has {len(getattr(scaling, name))} numbers for {self.rotary_dim // 2} rotated pairs"
                    )
        if scaling is not None and scaling.kind == "dynamic" and self.rotary_dim == 2:
            raise ValueError("dynamic RoPE needs more than one rotated pair")

    @classmethod
    def tiny(cls, **overrides: Any) -> LlamaConfig:
        """A two-layer shape for tests and examples; any field can be overridden."""
        return cls(**(TINY | overrides))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """The shape that a Hugging Face `config.json` (as a dict) asks for.

        Raises ValueError naming the field where it asks for what is not supported, or leaves a needed one out.
        """
        return cls(**families.fields(hf))

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions the pairs of RoPE cover. Proportional scaling covers all of them, and does
        not turn the pairs beyond its share."""
        if self.rope_scaling is not None and self.rope_scaling.kind == "proportional":
            return self.head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """The layers with full attention, in order: those that policies act on."""
        layers = range(self.num_hidden_layers)
        return tuple(layer for layer in layers if not self.window(layer))

    def window(self, layer: int) -> int | None:
        """The width of a layer's sliding window; None where it has full attention."""
        return self.sliding_window if self.layer_types and self.layer_types[layer] == families.SLIDING else None

    @property
    def query_multiplier(self) -> float:
        """What queries are multiplied by, attention logits being divided by the square root of `head_dim`."""
        return 1.0 if self.query_pre_attn_scalar is None else math.sqrt(self.head_dim / self.query_pre_attn_scalar)
