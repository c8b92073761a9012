"""Writes parameters to a folder in Hugging Face layout, readable by transformers and `load_pretrained`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recyc_jax.config import LlamaConfig
from recyc_jax.loading.pretrained import hf_names
from recyc_jax.model import Params

_SHARD_BYTES = 4 << 30
_KEPT_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "*.jinja")


def save_pretrained(folder: Path, params: Params, config: LlamaConfig, source: Path, dtype: Any) -> None:
    """Write `params` in `dtype` to `folder`, with the config and tokenizer of `source`, the checkpoint folder that
    training started from.

    The folder is written under a temporary name and then renamed, so it is never incomplete; an existing one is
    replaced.
    """
    from safetensors.numpy import save_file

    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, path in hf_names(config).items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        tensor = np.asarray(jax.device_get(leaf)).astype(dtype)
        tensor = np.ascontiguousarray(tensor.T if path[-1] == "kernel" else tensor)  # Hugging Face stores [out, in]
        if sum(held.nbytes for held in shards[-1].values()) + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    places = {}
    for number, shard in enumerate(shards, 1):
        alone = len(shards) == 1
        file = "model.safetensors" if alone else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, draft / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        (draft / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": places}, indent=1)
        )
    hf = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for name in {"torch_dtype", "dtype"} & hf.keys() or {"torch_dtype"}:
        hf[name] = str(np.dtype(dtype))
    (draft / "config.json").write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
    for pattern in _KEPT_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, draft / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
