"""Small GGUF files, as llama.cpp writes them and as they are not meant to be."""

import functools
import json

import checkpoints
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax.loading import fetch, gguf_convert

PERMUTED = ("llama", "smollm3", "mistral3")


def permuted(weight, heads):
    """Interleave the two halves of each head, as llama.cpp's converter does to q and k."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@functools.cache
def vocabulary():
    """Tokens by id, and merges, of the tokenizer that checkpoints have."""
    made = json.loads(checkpoints.tokenizer().to_str())["model"]
    return sorted(made["vocab"], key=made["vocab"].get), [" ".join(merge) for merge in made["merges"]]


def metadata(config, arch="llama"):
    """The metadata that llama.cpp's converter writes for a config, by key."""
    tokens, merges = vocabulary()
    fields = {
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token == "<eos>" else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        fields[f"{arch}.attention.key_length"] = config.head_dim
    return fields


def tensors(params, config, arch="llama"):
    """The tensors that llama.cpp's converter writes, by name."""
    made = {}
    for name, tensor in checkpoints.hf_tensors(params, config).items():
        if arch in PERMUTED and "self_attn.q_proj" in name:
            tensor = permuted(tensor, config.num_attention_heads)
        if arch in PERMUTED and "self_attn.k_proj" in name:
            tensor = permuted(tensor, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        made[gguf_convert.gguf_name(name, config)] = np.ascontiguousarray(tensor)
    return made


def write_file(file, fields, weights, *, arch="llama", quantise=None, **options):
    """A GGUF file. Numbers get the types that llama.cpp's converter gives them; a field of None is left out."""
    writer = gguf.GGUFWriter(file, arch, **options)
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            kinds[type(value)](key, value)
    for name, tensor in weights.items():
        if quantise is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write(file, params, config, *, arch="llama", extra=None, more=None, **options):
    """A GGUF file of a model; `extra` are further or other fields, and `more` tensors (None: without them)."""
    weights = {n: t for n, t in (tensors(params, config, arch) | (more or {})).items() if t is not None}
    return write_file(file, metadata(config, arch) | (extra or {}), weights, arch=arch, **options)


@functools.cache
def model(**overrides):
    shape = dict(vocab_size=400, rms_norm_eps=1e-5, rope_theta=1e5) | overrides
    config = rj.LlamaConfig.tiny(**shape, eos_token_ids=(0,))
    params = rj.init_params(config, jax.random.key(4))

    def other_than_zero(path, leaf):
        return leaf + jnp.linspace(-1, 1, leaf.size) if path[-1].key == "bias" else leaf

    return jax.tree_util.tree_map_with_path(other_than_zero, params), config


def converted(tmp_path, arch="llama", options=(), **fields):
    """The config.json that a tiny model with these further fields is converted to; dots of keys are written as `__`."""
    extra = {key.replace("__", "."): value for key, value in fields.items()}
    file = write(tmp_path / "m.gguf", *model(**dict(options)), arch=arch, extra=extra)
    gguf_convert.convert(file, tmp_path / "converted")
    return json.loads((tmp_path / "converted/config.json").read_text())


def refused(file, match):
    """The message of the refusal of a file, which is one line and names the file; the cache is left as it was."""
    before = cached()
    with pytest.raises(ValueError, match=match) as caught:
        gguf_convert.cached_folder(file)
    assert file.name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert cached() == before
    return str(caught.value)


def cached():
    """What lies in the cache beside the digests of files."""
    return sorted(path.name for path in fetch.cache_dir().glob("*") if path.name != "digests")
