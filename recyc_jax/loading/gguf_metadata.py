"""The config.json that a GGUF file's metadata ask for.

A key of the architecture's namespace is used, or known not to change the model (`_IRRELEVANT`), or refused: what is not
read could ask for another model than the one that is loaded. Functions raise ValueError naming the key and its value.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from recyc_jax import rope
from recyc_jax.config import LlamaConfig
from recyc_jax.loading import gguf_fields
from recyc_jax.rope_scaling import RopeScaling


class Architecture(NamedTuple):
    """How llama.cpp stores a family."""

    model_type: str
    hf_class: str
    interleaved: bool = False
    """q and k have the two halves of each head's rows interleaved."""


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True),
    "mistral3": Architecture("ministral3", "Ministral3ForCausalLM", interleaved=True),
    "olmo2": Architecture("olmo2", "Olmo2ForCausalLM"),
    "phi3": Architecture("phi3", "Phi3ForCausalLM"),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM"),
}
WINDOW_PATTERN = {"gemma3": 6, "olmo2": 4}
"""Architectures in which every layer of that number has full attention and the others a window, where the file gives
one."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_GEMMA_27B = 62  # layers: llama.cpp knows this model by them, whose query scale no key states

# keys of the architecture's namespace
_USED = {
    *("block_count", "context_length", "embedding_length", "embedding_length_out", "feed_forward_length", "vocab_size"),
    *("logit_scale", "embedding_scale", "residual_scale", "tensor_data_layout"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length", "scale", "causal")),
    *(f"attention.{name}" for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon", "sliding_window")),
    *(f"rope.{name}" for name in ("dimension_count", "freq_base", "scale_linear", "scaling.type", "scaling.factor")),
    *("rope.scaling.attn_factor", "rope.scaling.original_context_length", "attention.sliding_window_pattern"),
    *(
        f"rope.scaling.yarn_{name}"
        for name in ("attn_factor", "beta_fast", "beta_slow", "ext_factor", "log_multiplier")
    ),
}
_USED_BY = {
    "gemma3": {"rope.freq_base_swa"},
    "mistral3": {"attention.temperature_scale", "attention.temperature_length"},
    "olmo2": {"rope.freq_base_swa"},
}
_IRRELEVANT = {"rope.scaling.finetuned": "says how the scaling came about"}
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
    "rope.freq_base_swa": "another RoPE in some layers",
    **dict.fromkeys(("use_parallel_residual", "swin_norm", "n_deepstack_layers"), "another order of layers"),
    "nextn_predict_layers": "layers that predict further tokens",
    "pooling_type": "a vector for each text instead of logits",
    "rope.dimension_sections": "positions in several dimensions",
}
_OTHER_KINDS = ("adapter.", "clip.", "diffusion.")  # namespaces of files that hold no language model, or another kind
_QUANTIZATION_VERSION = 2  # of the layout of quantised blocks, since May 2023
_DATA_LAYOUT = "Meta AI original pth"  # q and k with the halves of each head interleaved, as in every `llama` file


class RopeTensors(NamedTuple):
    """Tensors that scale RoPE, where the file has them, float32 [rotated pairs]."""

    divisors: np.ndarray | None = None  # Llama 3's
    short: np.ndarray | None = None  # longrope's
    long: np.ndarray | None = None


def hf_config(
    fields: dict[str, Any], rows: int, tied: bool, qkv_bias: bool, rope_tensors: RopeTensors
) -> dict[str, Any]:
    """The config of a model whose embedding has `rows` rows and is the output embedding too if `tied`. Token ids are
    left out."""
    arch = architecture(fields)
    used = _USED | _USED_BY.get(arch, set())
    gguf_fields.refuse_others(fields, f"{arch}.", used, _IRRELEVANT, _OFF)
    family = ARCHITECTURES["qwen2" if qkv_bias else arch]
    config = {
        "architectures": [family.hf_class],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        **_shape(fields, arch),
    }
    if arch == "gemma3":
        scalar = config["hidden_size"] // config["num_attention_heads"]
        scalar = scalar if config["num_hidden_layers"] == _GEMMA_27B else config["head_dim"]
        config |= {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}
        del config["hidden_act"]
    _check_agreement(fields, arch, config)
    config |= _windows(fields, arch, config)
    if arch == "phi3":
        rotated = gguf_fields.whole(fields, "phi3.rope.dimension_count", config["head_dim"], least=2)
        config["partial_rotary_factor"] = rotated / config["head_dim"]
        original = "phi3.rope.scaling.original_context_length"
        config["original_max_position_embeddings"] = gguf_fields.whole(
            fields, original, config["max_position_embeddings"], least=1
        )
    scaling = _rope_scaling(fields, arch, config, rope_tensors)
    return config if scaling is None else config | {"rope_scaling": scaling}


def _windows(fields: dict[str, Any], arch: str, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of sliding windows."""
    name, layers, context = (
        f"{arch}.attention.sliding_window",
        config["num_hidden_layers"],
        config["max_position_embeddings"],
    )
    window = gguf_fields.whole(fields, name, 0)
    if arch == "phi3":  # llama.cpp does without the window; transformers and the model's authors do not
        return {"sliding_window": window or None}
    if arch not in WINDOW_PATTERN:
        if 0 < window < context:
            raise ValueError(f"{name}={window} is below the context length and not supported")
        return {}
    kinds = ["full_attention"] * layers
    if window:
        kinds = _window_pattern(fields, arch, layers)
    made: dict[str, Any] = {"layer_types": kinds, "sliding_window": window or None}
    theta = gguf_fields.real(
        fields, f"{arch}.rope.freq_base_swa", 10000.0 if arch == "gemma3" else config["rope_theta"]
    )
    made["rope_local_base_freq"] = theta
    if arch == "gemma3":
        return made
    if theta != config["rope_theta"]:
        raise ValueError(f"{gguf_fields.shown(f'{arch}.rope.freq_base_swa', theta)} differs from rope.freq_base")
    # OLMo 3 is OLMo 2 with windows
    return made | {"model_type": "olmo3", "architectures": ["Olmo3ForCausalLM"]} if window else {}


def _window_pattern(fields: dict[str, Any], arch: str, layers: int) -> list[str]:
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = fields.get(key, WINDOW_PATTERN[arch])
    if not isinstance(pattern, list):
        every = gguf_fields.whole(fields, key, WINDOW_PATTERN[arch], least=1)
        pattern = [(layer + 1) % every != 0 for layer in range(layers)]
    if len(pattern) != layers or not all(isinstance(one, bool | int) for one in pattern):
        raise ValueError(
            f"{gguf_fields.shown(key, pattern)} must say for each of {layers} layers whether it has a window"
        )
    return ["sliding_attention" if one else "full_attention" for one in pattern]


def architecture(fields: dict[str, Any]) -> str:
    """The architecture that the file names, which is a supported one of a whole language model."""
    kind = gguf_fields.text(fields, "general.type", "model")
    if kind != "model":
        raise ValueError(f"{gguf_fields.shown('general.type', kind)}: it holds no whole model")
    arch = gguf_fields.text(fields, "general.architecture")
    if arch not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"{gguf_fields.shown('general.architecture', arch)} is not supported; {supported} are")
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
        **({} if arch == "phi3" else {"rope.dimension_count": head_dim}),  # otherwise part of each head is rotated
        "vocab_size": config["vocab_size"],
        "embedding_length_out": config["hidden_size"],
        "attention.causal": True,
        "attention.scale": 1 / math.sqrt(config.get("query_pre_attn_scalar", head_dim)),
        "attention.layer_norm_epsilon": config["rms_norm_eps"],  # LayerNorm's; some writers repeat RMSNorm's there
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


def _same(value: Any, supported: Any) -> bool:
    if isinstance(value, float) and isinstance(supported, float):
        return math.isclose(value, supported, rel_tol=1e-5)  # the file's are float32
    return value == supported and isinstance(value, bool) == isinstance(supported, bool)


def _rope_scaling(
    fields: dict[str, Any], arch: str, config: dict[str, Any], rope_tensors: RopeTensors
) -> dict[str, Any] | None:
    kind = gguf_fields.text(fields, f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        supported = "none, linear, yarn and longrope are"
        raise ValueError(f"{gguf_fields.shown(f'{arch}.rope.scaling.type', kind)} is not supported; {supported}")
    if kind != "yarn":
        for key in (key for key in fields if key.startswith(f"{arch}.rope.scaling.yarn_")):
            raise ValueError(f"{gguf_fields.shown(key, fields[key])} is not supported without YaRN scaling")
    if rope_tensors.long is not None or rope_tensors.short is not None or kind == "longrope":
        return _longrope(fields, arch, config, rope_tensors)
    if kind == "yarn":
        return _yarn(fields, arch, config)
    attention = gguf_fields.real(fields, f"{arch}.rope.scaling.attn_factor", 1.0)
    if not _same(attention, 1.0):
        raise ValueError(f"{arch}.rope.scaling.attn_factor={attention} is not supported without YaRN or longrope")
    return _linear_or_llama3(fields, arch, config, rope_tensors.divisors)


def _linear_or_llama3(
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


def _yarn(fields: dict[str, Any], arch: str, config: dict[str, Any]) -> dict[str, Any]:
    """YaRN as the config asked for it that the file was converted from. llama.cpp multiplies cosines and sines by
    `attn_factor` and the published function of the factor; converters have also written all of that there."""
    at = f"{arch}.rope.scaling."
    factor = gguf_fields.real(fields, f"{at}factor")
    original = gguf_fields.whole(fields, f"{at}original_context_length", config["max_position_embeddings"], least=1)
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if f"{at}yarn_{name}" in fields:
            scaling[name] = gguf_fields.real(fields, f"{at}yarn_{name}")
    extrapolated = fields.get(f"{at}yarn_ext_factor", 1.0)
    if extrapolated not in (1.0, -1.0):  # -1: llama.cpp's default, which is 1 under YaRN
        raise ValueError(f"{gguf_fields.shown(f'{at}yarn_ext_factor', extrapolated)} is not supported; 1 is")
    published = RopeScaling("yarn", factor).amplitude if factor > 1 else 1.0
    for name in ("attn_factor", "yarn_attn_factor"):
        value = gguf_fields.real(fields, f"{at}{name}", 1.0)
        if not (_same(value, 1.0) or _same(value, published)):
            if name == "attn_factor":
                raise ValueError(f"{at}attn_factor={value} is not supported; 1 and YaRN's own {published:.4f} are")
            scaling["attention_factor"] = value
    if fields.get(f"{at}yarn_log_multiplier"):
        scaling |= {"mscale": 1.0, "mscale_all_dim": gguf_fields.real(fields, f"{at}yarn_log_multiplier")}
    if arch == "mistral3" and f"{arch}.attention.temperature_scale" in fields:
        length = fields.get(f"{arch}.attention.temperature_length", original)
        if length != original:
            raise ValueError(f"{arch}.attention.temperature_length={length} differs from the original context length")
        scaling["llama_4_scaling_beta"] = gguf_fields.real(fields, f"{arch}.attention.temperature_scale")
    return scaling


def _longrope(fields: dict[str, Any], arch: str, config: dict[str, Any], rope_tensors: RopeTensors) -> dict[str, Any]:
    if rope_tensors.short is None or rope_tensors.long is None:
        missing = SHORT_FACTORS if rope_tensors.short is None else LONG_FACTORS
        raise ValueError(f"tensor {missing} is missing, which longrope scaling needs")
    scaling = {
        "rope_type": "longrope",
        "short_factor": rope_tensors.short.astype(float).tolist(),
        "long_factor": rope_tensors.long.astype(float).tolist(),
        "original_max_position_embeddings": gguf_fields.whole(
            fields, f"{arch}.rope.scaling.original_context_length", config["max_position_embeddings"], least=1
        ),
    }
    if f"{arch}.rope.scaling.attn_factor" in fields:
        scaling["attention_factor"] = gguf_fields.real(fields, f"{arch}.rope.scaling.attn_factor")
    return scaling


def _linear_factor(fields: dict[str, Any], arch: str) -> float:
    """The factor that positions are divided by. As in llama.cpp, a factor without a type is that of linear scaling."""
    kind = gguf_fields.text(fields, f"{arch}.rope.scaling.type", "linear")
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
