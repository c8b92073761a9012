"""What a model and a tokenizer are, whatever their folder is called: digests of their content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from recyc_jax.loading import weights
from recyc_jax.loading.digests import tensor_digests
from recyc_jax.loading.json_files import read_json

_LABELS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def of_weights(folder: Path) -> str:
    """16 hex digits of a SHA-256 over every tensor of the folder's weights (name, dtype, shape and all bytes), its
    config and its end-of-sequence ids. How tensors are spread over files, and the files' and the folder's names, do
    not matter. Files are read once and remembered (`digests.py`). Raises ValueError if weights cannot be read."""
    config = read_json(folder / "config.json")
    described: dict[str, Any] = {name: value for name, value in config.items() if name not in _LABELS}
    generation = folder / "generation_config.json"
    if generation.is_file():
        described["generation eos"] = read_json(generation).get("eos_token_id")
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    held = weights.places(folder)
    by_file = {file: tensor_digests(file) for file in set(held.values())}
    for name in sorted(held):
        found.update(f"\0{name}\0{by_file[held[name]][name]}".encode())
    return found.hexdigest()[:16]


def of_tokenizer(tokenizer: Any) -> str:
    """16 hex digits of a SHA-256 over what decides a transformers tokenizer's ids."""
    if tokenizer.is_fast:
        described = tokenizer.backend_tokenizer.to_str()
    else:
        described = repr(
            (type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer("a b")["input_ids"])
        )
    return hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()[:16]
