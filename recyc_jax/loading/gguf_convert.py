"""Converts a GGUF file to a folder in Hugging Face layout, which is cached because dequantising takes long.

Quantised tensors are dequantised (exactly, in float32) and stored as float16, whose 11-bit significand holds 4-bit
weights times a float16 scale more precisely than bfloat16 would; a tensor that overflows float16 is stored as float32.
Unquantised tensors keep their dtype.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recyc_jax.config import LlamaConfig
from recyc_jax.loading import (
    digests,
    fetch,
    gguf_file,
    gguf_metadata,
    gguf_parts,
    gguf_tokenizer,
    gguf_vocabulary,
    tensor_names,
    weights,
)

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""By Hugging Face's name within a layer, GGUF's."""
_NORM_NAMES = {
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
    "attention_out_norm": "post_attention_norm",
    "mlp_out_norm": "post_ffw_norm",
}
"""By the name of our parameters, GGUF's."""
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EMBEDDING = "token_embd.weight"
_QKV_BIAS = re.compile(r"blk\.[0-9]+\.attn_[qkv]\.bias")
_ROPE_TENSORS = ("rope_freqs.weight", gguf_metadata.SHORT_FACTORS, gguf_metadata.LONG_FACTORS)
"""Tensors that turn into the config's rope_scaling."""
_SHARD_BYTES = 2 << 30  # tensors collected in memory before a shard is written
FORMAT = 3  # of the converted folders; counted up when a later version converts the same file otherwise
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cached_folder(file: Path) -> Path:
    """The cached folder that `file` was converted to; converts it if there is none. If `file` is one part of several,
    all of them are converted. Raises ValueError for a missing file or part."""
    if not file.is_file():
        raise ValueError(f"model {str(file)!r}: there is no such file")
    parts = gguf_parts.parts(file)
    folder = fetch.cache_dir() / f"{gguf_parts.name(file)}-{_fingerprint(parts)[:12]}"
    if not folder.is_dir():
        with fetch.building(folder) as work:
            convert(file, work)
        logging.getLogger(__name__).warning("%s: converted once, kept in %s", file.name, folder)
    return folder


def _fingerprint(parts: list[Path]) -> str:
    """A digest of all bytes of the files, in hexadecimal."""
    found = hashlib.sha256(f"format {FORMAT}".encode())
    for part in parts:
        try:
            found.update(digests.file_digest(part).encode())
        except OSError as error:
            raise ValueError(f"{part}: cannot be read ({error.strerror})") from None
    return found.hexdigest()


def convert(file: Path, folder: Path) -> None:
    """Write config.json, safetensors shards with their index, and the tokenizer's files to `folder`. The metadata and
    the tensors' names and shapes are checked before anything is written. Raises ValueError naming the file and the
    cause, also where there is no space to write."""
    from rich.progress import Progress

    with Progress(transient=True) as progress:
        bar = progress.add_task(f"reading {file.name}", total=None)
        contents = gguf_parts.read(gguf_parts.parts(file))
        try:
            config = _hf_config(contents)
            tensors = _used(contents, LlamaConfig.from_hf(config))
            tokenizer, tokenizer_config = gguf_tokenizer.build(contents.fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        progress.update(bar, description=f"converting {file.name}", total=len(tensors))
        arch = gguf_metadata.ARCHITECTURES[gguf_metadata.architecture(contents.fields)]
        with _writing(file, folder):
            folder.mkdir(parents=True)
            _write_weights(tensors, config, arch.interleaved, folder, lambda: progress.advance(bar))
            (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")


@contextmanager
def _writing(file: Path, folder: Path) -> Iterator[None]:
    """Turns errors of writing to `folder` into a ValueError of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        # the folder's own name is that of a temporary one, which is deleted
        place = fetch.cache_dir() if folder.is_relative_to(fetch.cache_dir()) else folder
        told = re.search(r"os error (\d+)", str(error))  # SafetensorError has the number in its text alone
        code = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if code in _NO_SPACE:
            raise ValueError(f"{file}: there is no space left in {place} for the converted weights") from None
        raise ValueError(f"{file}: the converted weights cannot be written to {place} ({error})") from None


def _hf_config(contents: gguf_file.Contents) -> dict[str, Any]:
    """The config.json. Raises ValueError naming the key or tensor that is missing or not supported."""
    fields, tensors = contents.fields, {tensor.name: tensor for tensor in contents.tensors}
    arch = gguf_metadata.architecture(fields)
    if _EMBEDDING not in tensors:
        raise ValueError(f"tensor {_EMBEDDING} is missing")
    rows = tensors[_EMBEDDING].shape[0]
    config = gguf_metadata.hf_config(
        fields,
        rows=rows,
        tied="output.weight" not in tensors,
        # a `llama` file may have them too: Llama with these biases is Qwen2
        qkv_bias=arch == "qwen2" or (arch == "llama" and _has_qkv_bias(tensors)),
        rope_tensors=gguf_metadata.RopeTensors(
            *(_read(tensors[name]).reshape(-1) if name in tensors else None for name in _ROPE_TENSORS)
        ),
    )
    vocabulary = gguf_vocabulary.read(fields)
    if len(vocabulary.tokens) > rows:
        raise ValueError(f"tokenizer.ggml.tokens has {len(vocabulary.tokens)} entries, {_EMBEDDING} has {rows} rows")
    ends = gguf_vocabulary.end_ids(fields)
    return config | {"bos_token_id": vocabulary.special.get("bos"), "eos_token_id": ends}


def _has_qkv_bias(tensors: dict[str, gguf_file.Tensor]) -> bool:
    return any(_QKV_BIAS.fullmatch(name) and _read(tensors[name]).any() for name in tensors)


def _used(contents: gguf_file.Contents, config: LlamaConfig) -> dict[str, gguf_file.Tensor]:
    """By Hugging Face's name the tensors of a decoder of this shape, in the file's order. Raises ValueError naming a
    tensor that is missing, of another shape, not part of such a decoder or of a type that cannot be read."""
    tensors = {tensor.name: tensor for tensor in contents.tensors}
    hf_names = {}
    for name, hf_name, shape in _expected(config):
        if name not in tensors:  # found in the first layer, however many a damaged file claims
            raise ValueError(f"tensor {name} is missing")
        if tensors[name].shape != shape:
            raise ValueError(f"tensor {name} has shape {list(tensors[name].shape)}, the metadata ask for {list(shape)}")
        hf_names[name] = hf_name
    arch = gguf_metadata.architecture(contents.fields)
    for name in tensors.keys() - hf_names.keys() - set(_ROPE_TENSORS):
        _refuse(tensors[name], config, arch)
    used = {hf_names[tensor.name]: tensor for tensor in contents.tensors if tensor.name in hf_names}
    for tensor in {tensor.kind: tensor for tensor in reversed(used.values())}.values():  # the first of each type
        _read(tensor._replace(data=tensor.data[:1] if tensor.data.ndim > 1 else tensor.data))
    return used


def gguf_name(hf_name: str, config: LlamaConfig) -> str:
    """GGUF's name of a tensor of a checkpoint of this shape."""
    stem, _, kind = hf_name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    block, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{_layer_names(config)[part]}.{kind}"


def _layer_names(config: LlamaConfig) -> dict[str, str]:
    """By Hugging Face's name within a layer of this shape, GGUF's."""
    return _NAMES | {name: _NORM_NAMES[ours] for name, ours in tensor_names.NORMS[config.norms].items()}


def _expected(config: LlamaConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """GGUF's names, Hugging Face's names and the shapes of the tensors of a decoder."""
    one = dataclasses.replace(config, num_hidden_layers=1, layer_types=(), sliding_window=None, layers_without_rope=())
    shapes = weights.stored_shapes(one)  # layers are alike
    of_layer = "model.layers.0."
    for name, shape in shapes.items():
        if not name.startswith(of_layer):
            yield gguf_name(name, config), name, shape
    for block in range(config.num_hidden_layers):
        for name, shape in shapes.items():
            if name.startswith(of_layer):
                its_name = f"model.layers.{block}.{name.removeprefix(of_layer)}"
                yield gguf_name(its_name, config), its_name, shape


def _refuse(tensor: gguf_file.Tensor, config: LlamaConfig, arch: str) -> None:
    """Raise ValueError for a tensor that the decoder has no place for, unless it is a bias of zeros."""
    stem, _, kind = tensor.name.rpartition(".")
    block = re.match(r"blk\.([0-9]+)\.", tensor.name)
    if block and int(block[1]) >= config.num_hidden_layers:
        raise ValueError(f"tensor {tensor.name} is of a block beyond the block_count of {config.num_hidden_layers}")
    known = (_layer_names(config) if block else _TOP_NAMES).values()
    if kind != "bias" or stem.removeprefix(block[0] if block else "") not in known:
        raise ValueError(f"tensor {tensor.name} is not part of a decoder of the architecture {arch}")
    if _read(tensor).any():
        raise ValueError(
            f"tensor {tensor.name} is a bias; biases are supported in q, k and v of llama and qwen2, where all three "
            "have one"
        )


def _write_weights(
    tensors: dict[str, gguf_file.Tensor],
    config: dict[str, Any],
    interleaved: bool,
    folder: Path,
    advance: Callable[[], None],
) -> None:
    """Write the safetensors shards and their index."""
    from safetensors.numpy import save_file

    shard: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}
    size = 0
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        weight = _read(tensor)
        if config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            weight = weight - np.float32(1)  # llama.cpp stores what a norm multiplies by, Hugging Face that less one
        shard[name] = _unpermuted(weight, name, config) if interleaved else weight
        if number == len(tensors) or sum(array.nbytes for array in shard.values()) > _SHARD_BYTES:
            shard_name = f"model-{number:05}.safetensors"
            save_file(shard, folder / shard_name, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, shard_name)
            size += sum(array.nbytes for array in shard.values())
            shard = {}
        advance()
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


@np.errstate(all="ignore")  # infinities and NaNs, which a damaged file has, are converted as they are
def _read(tensor: gguf_file.Tensor) -> np.ndarray:
    import gguf

    kind = tensor.kind.name
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.kind)
    except NotImplementedError:  # the gguf library's word for types that it cannot dequantise, such as Q8_K
        raise ValueError(f"tensor {tensor.name} has type {kind}, which is not supported") from None
    if kind == "F32":
        return values
    if kind == "BF16":
        return values.astype(ml_dtypes.bfloat16)
    half = values.astype(np.float16)
    return half if np.isfinite(half).all() else values


def _unpermuted(weight: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Undo the interleaving of the two halves of each head's rows in q and k, which `llama` GGUFs have."""
    projection = name.split(".")[-2]
    if projection not in ("q_proj", "k_proj"):
        return weight
    heads = config["num_attention_heads" if projection == "q_proj" else "num_key_value_heads"]
    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weight.shape))
