"""Model families: from the fields of a Hugging Face `config.json` to those of `LlamaConfig`.

A family is what its layers do otherwise than Llama's (`Family.differs`), what transformers takes where a config leaves
a field out (`Family.defaults`), and which layers have a sliding window. `docs/models.md` says how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recyc_jax import rope_scaling
from recyc_jax.validation import real_number, whole_number

HF = Mapping[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"
MOST_LAYERS = 10_000
"""More are a damaged number, for which lists of layers would take all memory."""


def _no_windows(hf: HF, layers: int) -> list[str]:
    if _given(hf, "use_sliding_window", False):
        raise ValueError("use_sliding_window=True is not supported for this model_type")
    return _stated_layer_types(hf, layers, (FULL,)) or [FULL] * layers


def _all_windows(hf: HF, layers: int) -> list[str]:
    return [SLIDING] * layers


def _all_windows_unless_stated(hf: HF, layers: int) -> list[str]:
    """Mistral's rule: transformers takes a config with `layer_types` for a Ministral, whose windows go by these."""
    return _stated_layer_types(hf, layers, (FULL, SLIDING)) or [SLIDING] * layers


def _windows_in_the_last_layers(hf: HF, layers: int) -> list[str]:
    """Qwen's rule: off unless `use_sliding_window`, and then from layer `max_window_layers` on."""
    first = whole_number("max_window_layers", _given(hf, "max_window_layers", 28), 0)
    on = _flag(hf, "use_sliding_window", False)
    by_rule = [SLIDING if on and layer >= first else FULL for layer in range(layers)]
    return _stated_layer_types(hf, layers, (FULL, SLIDING) if on else (FULL,)) or by_rule


def _windows_without_rope(hf: HF, layers: int) -> list[str]:
    """SmolLM3's rule: off unless `use_sliding_window`, and then in the layers without RoPE."""
    on = _flag(hf, "use_sliding_window", False)
    off = _layers_without_rope(hf, layers) if on and hf.get("sliding_window") is not None else ()
    by_rule = [SLIDING if layer in off else FULL for layer in range(layers)]
    return _stated_layer_types(hf, layers, (FULL, SLIDING) if on else (FULL,)) or by_rule


def _windows_by_pattern(pattern: int) -> Callable[[HF, int], list[str]]:
    """A rule by which every `pattern`-th layer has full attention and the others a window."""

    def kinds(hf: HF, layers: int) -> list[str]:
        every = whole_number("sliding_window_pattern", _given(hf, "sliding_window_pattern", pattern), 1)
        by_rule = [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(layers)]
        return _stated_layer_types(hf, layers, (FULL, SLIDING)) or by_rule

    return kinds


class Family(NamedTuple):
    """What distinguishes a family from Llama."""

    defaults: Mapping[str, Any] = {}
    """What transformers' config class takes for a field that `config.json` leaves out, where it is not Llama's."""
    differs: Mapping[str, Any] = {}
    """The fields of `LlamaConfig` in which all its models differ from Llama's."""
    layer_types: Callable[[HF, int], list[str]] = _no_windows
    """(config, number of layers) -> for each layer `full_attention` or `sliding_attention`"""


_LLAMA = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
_QK_NORM_OVER_PROJECTION = {"norms": "after", "norm_scale": "float32", "qk_norm": "projection"}
_GEMMA_3 = {
    **{"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072},
    **{"tie_word_embeddings": True, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4096},
    **{"query_pre_attn_scalar": 256, "hidden_act": "gelu_pytorch_tanh"},
}
_MINISTRAL_3_ROPE = {
    **{"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384},
    **{"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        {},
        _all_windows_unless_stated,
    ),
    "ministral3": Family(
        {
            **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5},
            **{"rope_parameters": _MINISTRAL_3_ROPE},
        },
        {},
        _all_windows,
    ),
    "qwen2": Family(_QWEN, {"qkv_bias": True}, _windows_in_the_last_layers),
    "qwen3": Family(_QWEN | {"head_dim": 128}, {"qk_norm": "head"}, _windows_in_the_last_layers),
    "smollm3": Family(
        {
            **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6},
            **{"tie_word_embeddings": True},
        },
        {},
        _windows_without_rope,
    ),
    "olmo2": Family({"rms_norm_eps": 1e-5}, _QK_NORM_OVER_PROJECTION),
    "olmo3": Family(
        # as transformers has it, a theta that old configs state is that of layers with full attention alone
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "rope_local_base_freq": 5e5, "sliding_window": 4096},
        _QK_NORM_OVER_PROJECTION,
        _windows_by_pattern(4),
    ),
    "phi3": Family(
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        {"fused_projections": True},
        _all_windows,
    ),
    "gemma3_text": Family(
        _GEMMA_3,
        {"norms": "both", "norm_scale": "one_plus", "qk_norm": "head", "activation": "gelu_tanh"},
        _windows_by_pattern(6),
    ),
}
"""By `model_type`."""

WITH_IMAGES = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""By the `model_type` of a model that also reads images, that of its text model where the config does not say."""

# fields of a config that change what the layers compute and are supported with these values alone
_ONLY = {
    **{"mlp_bias": False, "quantization_config": None, "dual_chunk_attention_config": None},  # Qwen2.5-1M has the last
    **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "use_bidirectional_attention": False},
    **{"clip_qkv": None, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": None},
    "embedding_multiplier": 1.0,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_BY_LAYER_TYPE = ("olmo3", "gemma3_text")
_NAMES = ", ".join(sorted({*FAMILIES, *WITH_IMAGES}))


def text_part(hf: HF) -> HF:
    """The part of a `config.json` that describes the text model: all of it, or the `text_config` of a model that also
    reads images. Raises ValueError for a model_type that is not supported."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in WITH_IMAGES:
        return hf
    text = hf.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config={text!r} must be an object")
    # of both places transformers goes by the whole model's; it ties the embeddings unless that says otherwise
    of_whole = {"tie_word_embeddings": _given(hf, "tie_word_embeddings", True)}
    if hf.get("eos_token_id") is not None:
        of_whole["eos_token_id"] = hf["eos_token_id"]
    quantised = {"quantization_config": hf["quantization_config"]} if hf.get("quantization_config") else {}
    stated = {name: value for name, value in text.items() if value is not None or name == "sliding_window"}
    if kind == "mistral3":  # transformers takes a text_config for what its model_type says, whatever else it has
        stated.pop("layer_types", None)
    return {"model_type": WITH_IMAGES[kind]} | stated | of_whole | quantised


def fields(hf: HF) -> dict[str, Any]:
    """The fields of `LlamaConfig` for a `config.json`. Raises ValueError naming the field where it asks for what is not
    supported, or leaves a needed one out."""
    hf = text_part(hf)
    kind = hf.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ValueError(f"model_type={kind!r} is not supported; {_NAMES} are")
    # a field that is null counts as left out, but a window that is null is switched off
    stated = {name: value for name, value in hf.items() if value is not None or name == "sliding_window"}
    hf = {**_LLAMA, **family.defaults, **stated}
    _reject_unsupported(hf, str(kind))
    heads, hidden, layers = (_whole(hf, name) for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    if layers > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={layers} is more than {MOST_LAYERS}: config.json is damaged")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and no head_dim")
    # transformers' default number of key/value heads is meant for its default model; Llama's is that of query heads
    kv_heads = _whole(stated, "num_key_value_heads", family.defaults.get("num_key_value_heads", heads))
    made: dict[str, Any] = dict(
        vocab_size=_whole(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_whole(hf, "intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_whole(hf, "head_dim", hidden // heads),
        max_position_embeddings=_whole(hf, "max_position_embeddings"),
        rms_norm_eps=real_number("rms_norm_eps", hf["rms_norm_eps"], 0.0, 1.0),
        tie_word_embeddings=_flag(hf, "tie_word_embeddings", False),
        eos_token_ids=token_ids("eos_token_id", hf.get("eos_token_id")),
    )
    made |= _windows(hf, family, layers, None if kind in _ROPE_BY_LAYER_TYPE else made["max_position_embeddings"])
    made |= _rope(hf, str(kind), made)
    if kind == "smollm3":
        made["layers_without_rope"] = _layers_without_rope(hf, layers)
    if kind == "gemma3_text":
        made["embedding_multiplier"] = math.sqrt(hidden)
        made["query_pre_attn_scalar"] = real_number("query_pre_attn_scalar", hf["query_pre_attn_scalar"], 1e-6, 1e9)
    return {**made, **family.differs}


def _reject_unsupported(hf: HF, kind: str) -> None:
    act = hf.get("hidden_activation", hf.get("hidden_act"))
    wanted = _LLAMA["hidden_act"] if kind != "gemma3_text" else _GEMMA_3["hidden_act"]
    if act != wanted:
        name = "hidden_activation" if "hidden_activation" in hf else "hidden_act"
        raise ValueError(f"{name}={act!r} is not supported (only {wanted!r} is)")
    # Qwen2's biases are in q, k and v alone; the flag adds one to o too
    for name, supported in ({"attention_bias": kind == "qwen2"} | _ONLY).items():
        value = hf.get(name)
        if value is not None and value != supported:
            raise ValueError(f"{name}={value!r} is not supported (only {supported!r} is)")


def _windows(hf: HF, family: Family, layers: int, context: int | None) -> dict[str, Any]:
    """The width of sliding windows and which layers have one. A window of the whole context is none, unless it decides
    RoPE too (`context` is None)."""
    kinds = family.layer_types(hf, layers)
    width = hf.get("sliding_window")
    if SLIDING in kinds and width is None and context is None:
        raise ValueError("sliding_window is null, but layer_types or the family's pattern asks for windows")
    if width is None or SLIDING not in kinds:
        return {}
    width = whole_number("sliding_window", width, 1)
    if context is not None and width >= context:
        return {}
    return {"sliding_window": width, "layer_types": tuple(kinds)}


def _stated_layer_types(hf: HF, layers: int, supported: tuple[str, ...]) -> list[str] | None:
    stated = hf.get("layer_types")
    if stated is None or stated in ([], ()):
        return None
    odd = [kind for kind in stated if kind not in supported] if isinstance(stated, list | tuple) else [stated]
    if odd or len(stated) != layers:
        raise ValueError(
            f"layer_types={odd or stated!r} must give {' or '.join(supported)} for each of {layers} layers"
        )
    return list(stated)


def _layers_without_rope(hf: HF, layers: int) -> tuple[int, ...]:
    """SmolLM3's layers without RoPE: those with a 0 in `no_rope_layers`, by default every fourth."""
    flags = hf.get("no_rope_layers")
    if flags is None:
        every = whole_number("no_rope_layer_interval", _given(hf, "no_rope_layer_interval", 4), 1)
        return tuple(layer for layer in range(layers) if (layer + 1) % every == 0)
    if not isinstance(flags, list | tuple) or len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(f"no_rope_layers={flags!r} must give 1 (RoPE) or 0 for each of {layers} layers")
    return tuple(layer for layer in range(layers) if not flags[layer])


def _rope(hf: HF, kind: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Theta, scaling and the rotated part of a head, from transformers 5's `rope_parameters`, or from `rope_theta` and
    `rope_scaling` before it; transformers too prefers the older fields where both are there."""
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(name) or {}
    if isinstance(rope, Mapping) and kind != "ministral3":  # no other model of transformers reads it
        rope = {key: value for key, value in rope.items() if key != "llama_4_scaling_beta"}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{name}={rope!r} must be an object")
    found: dict[str, Any] = {}
    theta = hf["rope_theta"]
    if kind in _ROPE_BY_LAYER_TYPE:
        by_type = hf.get("rope_parameters") or {}
        if not isinstance(by_type, Mapping):
            raise ValueError(f"rope_parameters={by_type!r} must be an object")
        local, full = _given(by_type, SLIDING, {}), _given(by_type, FULL, {})
        if isinstance(full, Mapping):  # `rope_scaling` beside it adds to it, as in transformers
            rope = {**full, **(rope if name == "rope_scaling" else {})}
        if not isinstance(local, Mapping) or not isinstance(full, Mapping):
            raise ValueError(f"{name} must have an object for each of {FULL} and {SLIDING}")
        if SLIDING in made.get("layer_types", ()):
            if rope_scaling.from_hf(f"{name}.{SLIDING}", local, 1, 1) is not None:
                raise ValueError(f"{name}.{SLIDING}.rope_type={local.get('rope_type')!r} is not supported; default is")
            local_theta = _given(local, "rope_theta", _given(hf, "rope_local_base_freq", theta))
            found["sliding_rope_theta"] = real_number("rope_local_base_freq", local_theta, 1e-6, 1e30)
    elif any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"{name} differs by layer type, which is not supported for model_type={kind!r}")
    found["rope_theta"] = real_number("rope_theta", _given(rope, "rope_theta", theta), 1e-6, 1e30)
    part = _given(rope, "partial_rotary_factor", _given(hf, "partial_rotary_factor", 1.0))
    part = real_number("partial_rotary_factor", part, 1e-6, 1.0)
    stated = hf.get("original_max_position_embeddings")  # beside the object it counts more than within it
    rope = rope if stated is None else {**rope, "original_max_position_embeddings": stated}
    if kind == "phi3" and _given(rope, "rope_type", rope.get("type")) == "yarn":
        rope = {**rope, "rope_type": "longrope"}  # as early configs of Phi-3 call it
    context = made["max_position_embeddings"]
    scaling = rope_scaling.from_hf(name, rope, context, context)
    if kind == "phi3" and scaling is not None and scaling.kind != "longrope":
        raise ValueError(f"{name}.rope_type={scaling.kind!r} is not supported for model_type='phi3'; longrope is")
    if part != 1 and kind != "phi3" and (scaling is None or scaling.kind != "proportional"):
        raise ValueError(f"partial_rotary_factor={part:g} is not supported for model_type={kind!r}")
    return found | {"rope_scaling": scaling, "partial_rotary_factor": part}


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """The token ids of a field `name` that holds one, several or none. Raises ValueError that names the field."""
    values = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return tuple(whole_number(name, each, 0) for each in values)


def _whole(hf: HF, name: str, default: int | None = None) -> int:
    value = _given(hf, name, default)
    if value is None:
        raise ValueError(f"the config lacks the field {name!r}")
    return whole_number(name, value, 1)


def _flag(hf: HF, name: str, default: bool) -> bool:
    value = _given(hf, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false")
    return value


def _given(hf: HF, name: str, default: Any) -> Any:
    value = hf.get(name)
    return default if value is None else value
