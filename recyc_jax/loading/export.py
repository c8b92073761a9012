"""Writes parameters to a folder in Hugging Face layout, readable by transformers and `load_pretrained`."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recyc_jax import families
from recyc_jax.config import LlamaConfig
from recyc_jax.loading import tensor_names
from recyc_jax.loading.json_files import read_json
from recyc_jax.model import Params

_SHARD_BYTES = 4 << 30
_KEPT_FILES = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja", "*.model"),
    "added_tokens.json",
)


def save_pretrained(folder: Path, params: Params, config: LlamaConfig, source: Path, dtype: Any) -> None:
    """Write `params` in `dtype` to `folder`, with the config and tokenizer of `source`, the checkpoint folder that
    training started from.

    The folder is written under a temporary name and then renamed, so it is never incomplete. An existing model is
    replaced; where `folder` is a link, the folder that it points to is. Raises ValueError for a folder that holds
    something else, and OSError if it cannot be written."""
    folder = folder.resolve()
    if not may_replace(folder):
        raise ValueError(f"{folder} holds something else than a model: move it away")
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    draft.mkdir(parents=True)
    try:
        _write(draft, params, config, source, dtype)
        if folder.exists():
            before = draft.with_suffix(".before")
            folder.rename(before)
            draft.rename(folder)
            shutil.rmtree(before)
        else:
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def may_replace(folder: Path) -> bool:
    """Whether `folder` is absent, empty or holds a model, and so may be replaced by one."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _write(draft: Path, params: Params, config: LlamaConfig, source: Path, dtype: Any) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, paths in tensor_names.parameters(config).items():
        parts = [_stored(params, path, dtype) for path in paths]
        tensor = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts))
        if sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    places = {}
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05}-of-{len(shards):05}.safetensors"
        try:
            save_file(shard, draft / file, metadata={"format": "pt"})
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(f"{draft / file}: {error}") from error
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (draft / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places}, indent=1)
        )
    hf = dict(families.text_part(read_json(source / "config.json")))
    hf["tie_word_embeddings"] = config.tie_word_embeddings
    for name in {"torch_dtype", "dtype"} & hf.keys() or {"torch_dtype"}:
        hf[name] = str(np.dtype(dtype))
    (draft / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    for pattern in _KEPT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, draft / file.name)


def _stored(params: Params, path: tuple[str, ...], dtype: Any) -> np.ndarray:
    leaf = params
    for key in path:
        leaf = leaf[key]
    array = np.asarray(jax.device_get(leaf)).astype(dtype)
    return array.T if path[-1] == "kernel" else array  # Hugging Face stores [out, in]
