"""Converts a GGUF file to a folder in Hugging Face layout, which is cached because reading GGUF metadata takes seconds.

Quantised tensors are dequantised (exactly, in float32) and stored as float16, whose 11-bit significand holds 4-bit
weights times a float16 scale more precisely than bfloat16 would; a tensor that overflows float16 is stored as float32.
Unquantised tensors keep their dtype.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recyc_jax import rope
from recyc_jax.config import LlamaConfig, RopeScaling
from recyc_jax.loading import fetch, gguf_tokenizer

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SHARD_BYTES = 2 << 30  # tensors collected in memory before a shard is written
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def cached_folder(file: Path) -> Path:
    """The cached folder that `file` was converted to; converts it if there is none. Raises ValueError for a missing
    file."""
    if not file.is_file():
        raise ValueError(f"model {str(file)!r}: there is no such file")
    stat = file.stat()
    with file.open("rb") as stream:
        fingerprint = hashlib.sha256(stream.read(1 << 20) + f"{stat.st_size} {stat.st_mtime_ns}".encode())
    folder = fetch.cache_dir() / f"{file.stem}-{fingerprint.hexdigest()[:12]}"
    if not folder.is_dir():
        with fetch.building(folder) as work:
            convert(file, work)
        logging.getLogger(__name__).warning("%s: converted once, kept in %s", file.name, folder)
    return folder


def convert(file: Path, folder: Path) -> None:
    """Write config.json, safetensors shards with their index, and the tokenizer's files to `folder`. Raises ValueError
    naming the file and the cause."""
    import gguf
    from rich.progress import Progress
    from safetensors.numpy import save_file

    with Progress(transient=True) as progress:
        bar = progress.add_task(f"reading {file.name}", total=None)
        try:
            reader = gguf.GGUFReader(file)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise ValueError(f"{file}: not a complete GGUF file ({error})") from None
        try:
            config = _hf_config(fields, reader.tensors)
            tokenizer, tokenizer_config = gguf_tokenizer.build(fields)
        except KeyError as error:
            raise ValueError(f"{file}: the field {error.args[0]!r} is missing") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        folder.mkdir(parents=True)
        shard: dict[str, np.ndarray] = {}
        places: dict[str, str] = {}
        size = 0
        progress.update(bar, description=f"converting {file.name}", total=len(reader.tensors))
        for number, tensor in enumerate(reader.tensors, 1):
            if tensor.name != "rope_freqs.weight":  # already turned into the config's rope_scaling
                name = _hf_name(tensor.name, file)
                shard[name] = _unpermuted(_read(tensor, file), name, config)
            if number == len(reader.tensors) or sum(array.nbytes for array in shard.values()) > _SHARD_BYTES:
                shard_name = f"model-{number:05}.safetensors"
                save_file(shard, folder / shard_name, metadata={"format": "pt"})
                places |= dict.fromkeys(shard, shard_name)
                size += sum(array.nbytes for array in shard.values())
                shard = {}
            progress.advance(bar)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1)
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))


def _hf_config(fields: dict[str, Any], tensors: Any) -> dict[str, Any]:
    kind = fields["general.architecture"]
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"general.architecture={kind!r} is not supported; llama and qwen2 are")

    def get(name: str, *default: Any) -> Any:
        return fields.get(f"{kind}.{name}", *default) if default else fields[f"{kind}.{name}"]

    heads, hidden = int(get("attention.head_count")), int(get("embedding_length"))
    names = {tensor.name: tensor for tensor in tensors}
    config = {
        "architectures": ["LlamaForCausalLM" if kind == "llama" else "Qwen2ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": int(names["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": int(get("feed_forward_length")),
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": int(get("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(get("context_length")),
        # float32 in the file: 1e-5 would otherwise become 9.999999747378752e-06
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_ids(fields),
    }
    scaling = get("rope.scaling.type", "none")
    if "rope_freqs.weight" in names:
        config["rope_scaling"] = _llama3_scaling(config, np.array(names["rope_freqs.weight"].data))
    elif scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": float(get("rope.scaling.factor"))}
    elif scaling != "none":
        raise ValueError(f"{kind}.rope.scaling.type={scaling!r} is not supported")
    return config


def _eos_ids(fields: dict[str, Any]) -> list[int]:
    """The ids that end a text, a turn or a message, as Hugging Face's generation configs list them."""
    found = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(number) for number in found if number is not None))


def _llama3_scaling(config: dict[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """The published RoPE scaling that yields `divisors`: GGUF stores Llama 3's scaling as a divisor per frequency.
    Raises ValueError if none does."""
    plain = LlamaConfig.from_hf(config)
    for factor in (8.0, 32.0):  # Llama 3.1, Llama 3.2
        scaling = RopeScaling("llama3", factor)
        scaled = LlamaConfig.from_hf(config | {"rope_scaling": {"rope_type": "llama3"} | _llama3_fields(scaling)})
        expected = rope.inverse_frequencies(plain) / rope.inverse_frequencies(scaled)
        if np.allclose(divisors, expected, rtol=1e-3):
            return {"rope_type": "llama3"} | _llama3_fields(scaling)
    raise ValueError("rope_freqs.weight is not Llama 3.1's or 3.2's scaling; other scalings are not supported")


def _llama3_fields(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _hf_name(name: str, file: Path) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    if not stem.startswith("blk.") or part not in _NAMES:
        raise ValueError(f"{file}: tensor {name} is not part of a llama or qwen2 decoder")
    return f"model.layers.{block}.{_NAMES[part]}.{kind}"


def _read(tensor: Any, file: Path) -> np.ndarray:
    import gguf

    kind = tensor.tensor_type.name
    try:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:  # gguf raises this for types that it cannot dequantise, such as Q8_K
        raise ValueError(f"{file}: tensor {tensor.name} has type {kind}, which is not supported") from None
    if kind == "F32":
        return values
    if kind == "BF16":
        return values.astype(ml_dtypes.bfloat16)
    half = values.astype(np.float16)
    return half if np.isfinite(half).all() else values


def _unpermuted(weight: np.ndarray, name: str, config: dict[str, Any]) -> np.ndarray:
    """Undo the interleaving of the two halves of each head's rows in q and k, which `llama` GGUFs have."""
    projection = name.split(".")[-2]
    if config["model_type"] != "llama" or projection not in ("q_proj", "k_proj"):
        return weight
    heads = config["num_attention_heads" if projection == "q_proj" else "num_key_value_heads"]
    paired = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weight.shape))
