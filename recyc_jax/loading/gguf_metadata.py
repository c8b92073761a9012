"""The config.json that a GGUF file's metadata ask for.

A key of the architecture's namespace is used, or known not to change the model (`_IRRELEVANT`), or refused: what is not
read could ask for another model than the one that is loaded. Functions raise ValueError naming the key and its value.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from recyc_jax import rope
from recyc_jax.config import LlamaConfig, RopeScaling
from recyc_jax.loading import gguf_fields

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# keys of the architecture's namespace
_USED = {
    *("block_count", "context_length", "embedding_length", "embedding_length_out", "feed_forward_length", "vocab_size"),
    *("logit_scale", "embedding_scale", "residual_scale", "tensor_data_layout"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length", "scale", "causal")),
    *(f"attention.{name}" for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "sliding_window")),
    *(f"rope.{name}" for name in ("dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.factor")),
    *("rope.scaling.attn_factor", "rope.scaling.original_context_length"),
}
_IRRELEVANT = {
    "rope.scaling.finetuned": "says how the scaling came about",
    "attention.sliding_window_pattern": "says which layers have the window, and a window is refused",
}
# supported where they are 0 or false, and what they ask for otherwise
_OFF = {
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count", "expert_group_count"), "experts"),
    **dict.fromkeys(("expert_group_used_count", "expert_group_scale", "experts_per_group"), "experts"),
    **dict.fromkeys(("expert_weights_scale", "expert_weights_norm", "expert_gating_func"), "experts"),
    **{f"expert_{kind}feed_forward_length": "experts" for kind in ("", "shared_", "chunk_")},
    **dict.fromkeys(("leading_dense_block_count", "moe_every_n_layers", "interleave_moe_layer_step"), "experts"),
    **{f"{where}_logit_softcapping": "capped logits" for where in ("attn", "final", "router")},
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias"), "another attention"),
    **dict.fromkeys(
        ("attention.q_lora_rank", "attention.kv_lora_rank", "attention.shared_kv_layers"), "another attention"
    ),
    **dict.fromkeys(("attention.temperature_length", "attention.temperature_scale"), "another attention"),
    **dict.fromkeys(("use_parallel_residual", "swin_norm", "n_deepstack_layers"), "another order of layers"),
    "nextn_predict_layers": "layers that predict further tokens",
    "pooling_type": "a vector for each text instead of logits",
    "rope.dimension_sections": "positions in several dimensions",
}
_OTHER_KINDS = ("adapter.", "clip.", "diffusion.")  # namespaces of files that hold no language model, or another kind
_QUANTIZATION_VERSION = 2  # of the layout of quantised blocks, since May 2023
_DATA_LAYOUT = "Meta AI original pth"  # q and k with the halves of each head interleaved, as in every `llama` file


def hf_config(
    fields: dict[str, Any], rows: int, tied: bool, qkv_bias: bool, divisors: np.ndarray | None
) -> dict[str, Any]:
    """The config of a model whose embedding has `rows` rows, is the output embedding too if `tied`, and whose RoPE
    frequencies are divided by `divisors`. Token ids are left out."""
    arch = architecture(fields)
    gguf_fields.refuse_others(fields, f"{arch}.", _USED, _IRRELEVANT, _OFF)
    config = {
        "architectures": [ARCHITECTURES["qwen2" if qkv_bias else "llama"]],
        "model_type": "qwen2" if qkv_bias else "llama",
        "hidden_act": "silu",
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        **_shape(fields, arch),
    }
    _check_agreement(fields, arch, config)
    scaling = _rope_scaling(fields, arch, config, divisors)
    return config if scaling is None else config | {"rope_scaling": scaling}


def architecture(fields: dict[str, Any]) -> str:
    """The architecture that the file names, which is a supported one of a whole language model."""
    kind = gguf_fields.text(fields, "general.type", "model")
    if kind != "model":
        raise ValueError(f"{gguf_fields.shown('general.type', kind)}: it holds no whole model")
    arch = gguf_fields.text(fields, "general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"{gguf_fields.shown('general.architecture', arch)} is not supported; llama and qwen2 are")
    version = gguf_fields.whole(fields, "general.quantization_version", _QUANTIZATION_VERSION)
    if version != _QUANTIZATION_VERSION:
        raise ValueError(f"general.quantization_version={version} is not supported; {_QUANTIZATION_VERSION} is")
    for key, value in fields.items():
        if key.startswith(_OTHER_KINDS):
            raise ValueError(
                f"{gguf_fields.shown(key, value)} is not supported: it is no key of a language model's file"
            )
    return arch


def _shape(fields: dict[str, Any], arch: str) -> dict[str, Any]:
    layers = gguf_fields.whole(fields, f"{arch}.block_count", least=1)
    hidden = gguf_fields.whole(fields, f"{arch}.embedding_length", least=1)
    heads = gguf_fields.per_layer(fields, f"{arch}.attention.head_count", layers)
    key_length = f"{arch}.attention.key_length"
    if hidden % heads and key_length not in fields:
        raise ValueError(f"{arch}.embedding_length={hidden} is not a multiple of {heads} heads, and no {key_length}")
    head_dim = gguf_fields.whole(fields, key_length, hidden // heads, least=1)
    if head_dim % 2:
        raise ValueError(f"{key_length}={head_dim} must be even: RoPE rotates pairs")
    kv_heads = gguf_fields.per_layer(fields, f"{arch}.attention.head_count_kv", layers, heads)
    if heads % kv_heads:
        raise ValueError(f"{arch}.attention.head_count={heads} is not a multiple of head_count_kv={kv_heads}")
    return {
        "hidden_size": hidden,
        "intermediate_size": gguf_fields.per_layer(fields, f"{arch}.feed_forward_length", layers),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": gguf_fields.whole(fields, f"{arch}.context_length", least=1),
        "rms_norm_eps": gguf_fields.real(fields, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf_fields.real(fields, f"{arch}.rope.freq_base", 10000.0),
    }


def _check_agreement(fields: dict[str, Any], arch: str, config: dict[str, Any]) -> None:
    """Raise ValueError where a key asks for something else than the config, whose arithmetic is Llama's."""
    head_dim = config["head_dim"]
    wanted = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,  # otherwise part of each head is rotated
        "vocab_size": config["vocab_size"],
        "embedding_length_out": config["hidden_size"],
        "attention.causal": True,
        "attention.scale": 1 / math.sqrt(head_dim),
        "attention.layer_norm_epsilon": config["rms_norm_eps"],  # LayerNorm's; some writers repeat RMSNorm's there
        "rope.scaling.attn_factor": 1.0,
        "logit_scale": 1.0,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "tensor_data_layout": _DATA_LAYOUT,
    }
    for name, supported in wanted.items():
        value = fields.get(f"{arch}.{name}", supported)
        if not _same(value, supported):
            raise ValueError(
                f"{gguf_fields.shown(f'{arch}.{name}', value)} is not supported; here only {supported!r} is"
            )
    window = gguf_fields.whole(fields, f"{arch}.attention.sliding_window", 0)
    if 0 < window < config["max_position_embeddings"]:
        raise ValueError(f"{arch}.attention.sliding_window={window} is below the context length and not supported")


def _same(value: Any, supported: Any) -> bool:
    if isinstance(value, float) and isinstance(supported, float):
        return math.isclose(value, supported, rel_tol=1e-5)  # the file's are float32
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)


def _rope_scaling(
    fields: dict[str, Any], arch: str, config: dict[str, Any], divisors: np.ndarray | None
) -> dict[str, Any] | None:
    factor = _linear_factor(fields, arch)
    if divisors is not None and factor != 1:
        raise ValueError(f"{arch}.rope.scaling.factor={factor} and rope_freqs.weight both scale RoPE")
    scaling = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    original = config["max_position_embeddings"]
    if divisors is not None:
        scaling = _llama3_scaling(config, divisors)
        original = scaling["original_max_position_embeddings"]
    key = f"{arch}.rope.scaling.original_context_length"
    # linear scaling is the same whatever the length was before
    if factor == 1 and fields.get(key, original) not in (0, original, config["max_position_embeddings"]):
        raise ValueError(f"{gguf_fields.shown(key, fields[key])} is not supported without linear scaling")
    return scaling


def _linear_factor(fields: dict[str, Any], arch: str) -> float:
    """The factor that positions are divided by. As in llama.cpp, a factor without a type is that of linear scaling."""
    kind = gguf_fields.text(fields, f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{gguf_fields.shown(f'{arch}.rope.scaling.type', kind)} is not supported; none and linear are"
        )
    stated = [key for name in ("rope.scaling.factor", "rope.scale_linear") if (key := f"{arch}.{name}") in fields]
    if not stated and f"{arch}.rope.scaling.type" in fields and kind == "linear":
        raise ValueError(f"the field '{arch}.rope.scaling.factor' is missing")
    factors = {gguf_fields.real(fields, key) for key in stated} or {1.0}
    said = " and ".join(gguf_fields.shown(key, fields[key]) for key in stated)
    if len(factors) > 1:
        raise ValueError(f"{said} contradict each other")
    if kind == "none" and factors != {1.0}:
        raise ValueError(f"{said} and {arch}.rope.scaling.type='none' contradict each other")
    return factors.pop()


def _llama3_scaling(config: dict[str, Any], divisors: np.ndarray) -> dict[str, Any]:
    """The published RoPE scaling that yields `divisors`: GGUF stores Llama 3's scaling as a divisor per frequency."""
    if divisors.shape != (config["head_dim"] // 2,):
        raise ValueError(f"rope_freqs.weight has {divisors.size} entries for half of head_dim={config['head_dim']}")
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
