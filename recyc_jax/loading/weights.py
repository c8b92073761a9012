"""Weights of a checkpoint folder in Hugging Face layout: which files hold them, whether the config accounts for all of
them, and how they become our parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recyc_jax import sharding
from recyc_jax.config import LlamaConfig
from recyc_jax.loading.digests import safetensors_header, tensor_digests
from recyc_jax.loading.json_files import read_json
from recyc_jax.model import Params, init_params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # constants that old checkpoints stored
_SCALES = ("_scale", "_scale_inv", ".scales", ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map")
_QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")

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
    names = {EMBEDDING: ("embedding",), "model.norm.weight": ("final_norm", "scale")}
    if not config.tie_word_embeddings:
        names[HEAD] = ("head",)
    for layer in range(config.num_hidden_layers):
        for name, path in _LAYER_NAMES.items():
            if path[-1] != "bias" or (config.qkv_bias and path[1] != "o_proj"):
                names[f"model.layers.{layer}.{name}"] = (f"layers_{layer}", *path)
    return names


def is_there(folder: Path) -> bool:
    """Whether the folder holds weights at all, complete or not."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def places(folder: Path) -> dict[str, Path]:
    """By tensor name, the file that holds it: `model.safetensors` if it is there, as transformers has it, otherwise
    the shards that the index names. Raises ValueError, naming the file, if one is missing or cannot be read."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return dict.fromkeys(safetensors_header(single)[1], single)
    if not index.is_file():
        patterns = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.gguf")
        others = sorted(file.name for pattern in patterns for file in folder.glob(pattern))
        found = f"; it has {', '.join(others[:3])}, which cannot be read" if others else ""
        raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX} is there{found}")
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ValueError(f"{index}: its weight_map must give a file name for each tensor")
    held: dict[str, Path] = {}
    for name in dict.fromkeys(named.values()):
        file = folder / name
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is not the name of a file in the same folder")
        if not file.is_file():
            holds = next(tensor for tensor, place in named.items() if place == name)
            raise ValueError(f"{file}: this shard is missing (it holds {holds})")
        header = safetensors_header(file)[1]
        for tensor in (tensor for tensor, place in named.items() if place == name and tensor not in header):
            raise ValueError(f"{file}: tensor {tensor} is missing")
        held.update((tensor, file) for tensor in header)
    return held


def has_own_head(folder: Path) -> bool:
    """Whether a folder whose config ties the output embedding to the input embedding holds an output embedding that
    differs from it: transformers then keeps the two apart. Raises ValueError as `places` does."""
    held = places(folder)
    if HEAD not in held or EMBEDDING not in held:
        return False
    return tensor_digests(held[HEAD])[HEAD] != tensor_digests(held[EMBEDDING])[EMBEDDING]


def check_complete(folder: Path, config: LlamaConfig) -> dict[str, Path]:
    """The file of each tensor that the config asks for. Raises ValueError, naming file and tensor, for one that is
    missing, of another shape or no floating-point numbers, for one that the config does not account for, and for a
    folder whose weights are quantised."""
    for name in _QUANTISATION_FILES:
        if (folder / name).is_file():
            raise ValueError(f"{folder / name}: quantised weights are not supported; use the model's bf16 weights")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder / 'adapter_config.json'}: adapters are not supported; merge it into the model first")
    held, wanted = places(folder), hf_names(config)
    if config.tie_word_embeddings and EMBEDDING not in held and HEAD in held:
        held[EMBEDDING] = held[HEAD]  # one tensor under the other's name
    headers = {file: safetensors_header(file)[1] for file in set(held.values())}
    for tensor, file in held.items():
        if tensor in wanted or (config.tie_word_embeddings and tensor == HEAD) or tensor.endswith(_BUFFERS):
            continue
        raise ValueError(f"{file}: {_unexpected(tensor, headers[file][tensor], config)}")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    for tensor, path in wanted.items():
        if tensor not in held:
            file = folder / SINGLE if (folder / SINGLE).is_file() else folder / INDEX
            raise ValueError(f"{file}: tensor {tensor} is missing")
        file = held[tensor]
        facts = headers[file][stored_name(tensor, headers[file])]
        if facts["dtype"] not in _FLOATS:
            raise ValueError(
                f"{file}: tensor {tensor} holds {facts['dtype']}, which is not supported; use the model's bf16 weights"
            )
        shape = _at(shapes, path).shape
        expected = list(shape[::-1] if path[-1] == "kernel" else shape)
        if facts["shape"] != expected:
            raise ValueError(f"{file}: tensor {tensor} has shape {facts['shape']}, the config asks for {expected}")
    return {tensor: held[tensor] for tensor in wanted}


def stored_name(tensor: str, held: Any) -> str:
    """The name under which a file stores a tensor: tied embeddings may be stored as the output embedding alone."""
    return HEAD if tensor == EMBEDDING and tensor not in held else tensor


def _unexpected(tensor: str, facts: dict[str, Any], config: LlamaConfig) -> str:
    """What is wrong with a tensor that the config does not account for."""
    if tensor.endswith(_SCALES):
        return f"tensor {tensor} belongs to quantised weights, which are not supported; use the model's bf16 weights"
    layer = tensor.removeprefix("model.layers.").partition(".")[0]
    if tensor.startswith("model.layers.") and layer.isdecimal() and int(layer) >= config.num_hidden_layers:
        return f"tensor {tensor} is of a layer beyond the config's num_hidden_layers={config.num_hidden_layers}"
    return f"tensor {tensor} ({facts['dtype']}{facts['shape']}) is no part of the model that config.json describes"


def load_params(folder: Path, config: LlamaConfig, dtype: Any = None, mesh: Mesh | None = None) -> Params:
    """The folder's weights as our parameters, read tensor by tensor into `dtype` (None: bfloat16 on accelerators,
    float32 on CPU).

    With a mesh, parameters are sharded by the table in `sharding.py`, and each host reads only the parts of its own
    devices. Raises ValueError as `check_complete` does, before the first tensor is read.
    """
    import safetensors

    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    names = hf_names(config)
    by_file: dict[Path, list[str]] = {}
    for tensor, file in check_complete(folder, config).items():
        by_file.setdefault(file, []).append(tensor)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params: dict[str, Any] = {}
    for file, tensors in by_file.items():
        try:
            with safetensors.safe_open(file, framework="numpy") as shard:
                held = set(shard.keys())
                for tensor in tensors:
                    path = names[tensor]
                    read = _reader(shard, stored_name(tensor, held), path)
                    leaf = _placed(lambda at, read=read: read(at).astype(dtype, copy=False), path, shapes, mesh)
                    _put(params, path, leaf)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a complete safetensors file ({error})") from None
    return params


def _placed(read: Callable[[Any], np.ndarray], path: tuple[str, ...], shapes: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jnp.asarray(read(...))
    shape = _at(shapes, path)
    place = NamedSharding(mesh, sharding.spec(tuple(jax.tree_util.DictKey(key) for key in path), shape))
    return jax.make_array_from_callback(shape.shape, place, read)


def _reader(shard: Any, name: str, path: tuple[str, ...]) -> Callable[[Any], np.ndarray]:
    """A function that reads the part of a parameter at an index into it (`...`: all of it)."""
    transposed = path[-1] == "kernel"  # Hugging Face stores [out, in]

    def read(at: Any) -> np.ndarray:
        if at is ... or all(part == slice(None) for part in at):
            tensor = shard.get_tensor(name)
        else:
            tensor = shard.get_slice(name)[tuple(at[::-1] if transposed else at)]
        return tensor.T if transposed else tensor

    return read


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
