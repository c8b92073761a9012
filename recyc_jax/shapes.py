"""Well-known models by their shapes alone: for random weights, estimates and ahead-of-time compilation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from recyc_jax.config import LlamaConfig

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}

SHAPES: dict[str, LlamaConfig] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": LlamaConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=32768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        qkv_bias=True,
    ),
    "llama-3.2-1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
        **_LLAMA_3,
    ),
    "llama-3.1-8b": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        head_dim=128,
        tie_word_embeddings=False,
        **_LLAMA_3,
    ),
    "llama-3.1-70b": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        head_dim=128,
        tie_word_embeddings=False,
        **_LLAMA_3,
    ),
    "qwen3-8b": LlamaConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,  # with the published YaRN setting
        rope_theta=1e6,
        qk_norm="head",
    ),
    "gemma-3-12b": LlamaConfig(
        vocab_size=262208,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        max_position_embeddings=131072,
        rope_theta=1e6,
        tie_word_embeddings=True,
        layer_types=(("sliding_attention",) * 5 + ("full_attention",)) * 8,
        sliding_window=1024,
        sliding_rope_theta=1e4,
        qk_norm="head",
        norms="both",
        norm_scale="one_plus",
        activation="gelu_tanh",
        embedding_multiplier=3840**0.5,
        query_pre_attn_scalar=256.0,
    ),
}
"""RoPE scaling is left out: it changes angles, not sizes."""


def shortened(config: LlamaConfig, layers: int) -> LlamaConfig:
    """The shape with its last `layers` layers alone, so that a layer of each kind is among them."""
    return dataclasses.replace(config, num_hidden_layers=layers, layer_types=config.layer_types[-layers:])


def named_shape(name: str) -> LlamaConfig:
    """The shape of that name in `SHAPES`, or of the config.json in the folder of that name. Raises ValueError where
    there is neither."""
    if name in SHAPES:
        return SHAPES[name]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(f"--model {name!r} is no known shape ({', '.join(SHAPES)}) and no folder with a config.json")
    try:
        return LlamaConfig.from_hf(json.loads(file.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"--model {name}: config.json is not JSON ({error})") from None
