"""Weights of a checkpoint folder in Hugging Face layout: which files hold them, whether the config accounts for all of
them, and how they become our parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from recyc_jax import sharding
from recyc_jax.config import LlamaConfig
from recyc_jax.loading import tensor_names
from recyc_jax.loading.digests import safetensors_header, tensor_digests
from recyc_jax.loading.json_files import read_json
from recyc_jax.model import Params, init_params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # constants that old checkpoints stored
_SCALES = ("_scale", "_scale_inv", ".scales", ".qweight", ".qzeros", ".g_idx", ".absmax", ".quant_map")
_QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


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
    before = tensor_names.prefix(held)
    head, embedding = tensor_names.head(before), tensor_names.embedding(before)
    if head not in held or embedding not in held:
        return False
    return tensor_digests(held[head])[head] != tensor_digests(held[embedding])[embedding]


class Place(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    name: str  # in the file
    parameters: tuple[tuple[str, ...], ...]  # the paths of the parameters that it holds, along its first axis


def check_complete(folder: Path, config: LlamaConfig) -> list[Place]:
    """The place of each tensor that the config asks for. Raises ValueError, naming file and tensor, for one that is
    missing, of another shape or no floating-point numbers, for one that the config does not account for, and for a
    folder whose weights are quantised."""
    for name in _QUANTISATION_FILES:
        if (folder / name).is_file():
            raise ValueError(f"{folder / name}: quantised weights are not supported; use the model's bf16 weights")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder / 'adapter_config.json'}: adapters are not supported; merge it into the model first")
    held = places(folder)
    before = tensor_names.prefix(held)
    wanted = tensor_names.parameters(config, before)
    head, embedding = tensor_names.head(before), tensor_names.embedding(before)
    only_head = config.tie_word_embeddings and embedding not in held and head in held
    headers = {file: safetensors_header(file)[1] for file in set(held.values())}
    for tensor, file in held.items():
        if tensor in wanted or (config.tie_word_embeddings and tensor == head) or tensor.endswith(_BUFFERS):
            continue
        if not tensor_names.of_images(tensor, before):
            raise ValueError(f"{file}: {_unexpected(tensor, headers[file][tensor], config, before)}")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    found = []
    for tensor, paths in wanted.items():
        name = head if only_head and tensor == embedding else tensor  # one tensor under the other's name
        if name not in held:
            file = folder / SINGLE if (folder / SINGLE).is_file() else folder / INDEX
            raise ValueError(f"{file}: tensor {tensor} is missing{_advice(tensor, held, before)}")
        file, facts = held[name], headers[held[name]][name]
        if facts["dtype"] not in _FLOATS:
            raise ValueError(
                f"{file}: tensor {tensor} holds {facts['dtype']}, which is not supported; use the model's bf16 weights"
            )
        parts = [_stored_shape(shapes, path) for path in paths]
        expected = [sum(part[0] for part in parts), *parts[0][1:]]
        if facts["shape"] != expected:
            raise ValueError(f"{file}: tensor {tensor} has shape {facts['shape']}, the config asks for {expected}")
        found.append(Place(file, name, paths))
    return found


def stored_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint of this config, by name."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    found = {}
    for tensor, paths in tensor_names.parameters(config).items():
        parts = [_stored_shape(shapes, path) for path in paths]
        found[tensor] = (sum(part[0] for part in parts), *parts[0][1:])
    return found


def _stored_shape(shapes: Any, path: tuple[str, ...]) -> tuple[int, ...]:
    shape = _at(shapes, path).shape
    return shape[::-1] if path[-1] == "kernel" else shape  # Hugging Face stores [out, in]


def _advice(tensor: str, held: dict[str, Path], before: str) -> str:
    if tensor == tensor_names.head(before) and before == "":
        return ": this is a checkpoint of the decoder without its head, and its config does not tie the two embeddings"
    return ""


def _unexpected(tensor: str, facts: dict[str, Any], config: LlamaConfig, before: str) -> str:
    """What is wrong with a tensor that the config does not account for."""
    if tensor.endswith(_SCALES):
        return f"tensor {tensor} belongs to quantised weights, which are not supported; use the model's bf16 weights"
    layers = f"{before}layers."
    layer = tensor.removeprefix(layers).partition(".")[0]
    if tensor.startswith(layers) and layer.isdecimal() and int(layer) >= config.num_hidden_layers:
        return f"tensor {tensor} is of a layer beyond the config's num_hidden_layers={config.num_hidden_layers}"
    return f"tensor {tensor} ({facts['dtype']}{facts['shape']}) is no part of the model that config.json describes"


Read = Callable[..., np.ndarray]
"""(path of a parameter, index into it; `...`: all of it) -> that part of the parameter, in the reader's dtype"""


def reader(folder: Path, config: LlamaConfig, dtype: Any) -> Read:
    """A function that reads parts of the folder's parameters, and no more than what is asked for. Raises ValueError as
    `check_complete` does; the function raises it too, naming a file that cannot be read."""
    import safetensors

    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    rows: dict[tuple[str, ...], tuple[Place, int]] = {}  # the first row of a parameter within its tensor
    for place in check_complete(folder, config):
        first = 0
        for path in place.parameters:
            rows[path] = place, first
            first += _stored_shape(shapes, path)[0]

    def read(path: tuple[str, ...], at: Any = ...) -> np.ndarray:
        place, first = rows[path]
        transposed, shape = path[-1] == "kernel", _stored_shape(shapes, path)
        index = [slice(None)] * len(shape) if at is ... else list(at[::-1] if transposed else at)
        begin, end, _ = index[0].indices(shape[0])
        index[0] = slice(first + begin, first + end)
        try:
            # opened anew for each tensor: pages that an open file has touched count as memory of this process
            with safetensors.safe_open(place.file, framework="numpy") as file:
                tensor = file.get_slice(place.name)[tuple(index)]
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{place.file}: not a complete safetensors file ({error})") from None
        return (tensor.T if transposed else tensor).astype(dtype, copy=False)

    return read


def load_params(folder: Path, config: LlamaConfig, dtype: Any = None, mesh: Mesh | None = None) -> Params:
    """The folder's weights as our parameters, read tensor by tensor into `dtype` (None: bfloat16 on accelerators,
    float32 on CPU).

    With a mesh, parameters are sharded by the table in `sharding.py`, and each process reads only the parts of its own
    devices. Raises ValueError as `check_complete` does, before the first tensor is read.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if mesh is not None:
        tensor = math.prod(mesh.shape.get(axis, 1) for axis in sharding.HEADS)
        sharding.check_divides(config, mesh.shape.get("fsdp", 1), tensor)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    read = reader(folder, config, dtype)

    def leaf(path: tuple[Any, ...], shape: Any) -> jax.Array:
        keys = tuple(key.key for key in path)
        if mesh is None:
            return jnp.asarray(read(keys))
        place = NamedSharding(mesh, sharding.on_mesh(sharding.spec(path, shape), mesh))
        return jax.make_array_from_callback(shape.shape, place, functools.partial(read, keys))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
