"""A two-layer decoder for tests and examples."""

from __future__ import annotations

from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
"""The fields of `LlamaConfig.tiny()`."""
