"""The tensors of a Hugging Face checkpoint by name, and the parameters that each one holds."""

from __future__ import annotations

from collections.abc import Iterable

from recyc_jax.config import LlamaConfig

Path = tuple[str, ...]
"""The path of a parameter in our tree."""

PREFIX = "model."
_PREFIXES = (PREFIX, "language_model.model.", "model.language_model.", "")
"""What stands before the names of the decoder's tensors: in language models, in models that also read images, and in
checkpoints of the decoder without its head."""
_IMAGE_TENSORS = tuple(f"{at}{part}." for at in ("", PREFIX) for part in ("vision_tower", "multi_modal_projector"))

NORMS = {
    "before": {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    "after": {"post_attention_layernorm": "attention_out_norm", "post_feedforward_layernorm": "mlp_out_norm"},
    "both": {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_out_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_out_norm",
    },
}
"""By `LlamaConfig.norms`, the names of a layer's norms and of their parameters."""
_FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
"""Tensors that hold several of our matrices, one after the other along their first axis."""


def prefix(held: Iterable[str]) -> str:
    """What stands before the names of the decoder's tensors in a checkpoint that holds tensors of these names."""
    names = list(held)
    return next((one for one in _PREFIXES if any(name.startswith(f"{one}layers.0.") for name in names)), PREFIX)


def of_images(name: str, before: str) -> bool:
    """Whether a tensor belongs to the part of a model that reads images, `before` being its decoder's prefix."""
    return "language_model." in before and name.startswith(_IMAGE_TENSORS)


def embedding(before: str = PREFIX) -> str:
    """The name of the input embedding."""
    return f"{before}embed_tokens.weight"


def head(before: str = PREFIX) -> str:
    """The name of the output embedding."""
    return "language_model.lm_head.weight" if before == "language_model.model." else "lm_head.weight"


def parameters(config: LlamaConfig, before: str = PREFIX) -> dict[str, tuple[Path, ...]]:
    """By tensor name, the paths of the parameters that the tensor holds, one after the other along its first axis."""
    names: dict[str, tuple[Path, ...]] = {
        embedding(before): (("embedding",),),
        f"{before}norm.weight": (("final_norm", "scale"),),
    }
    if not config.tie_word_embeddings:
        names[head(before)] = (("head",),)
    for number in range(config.num_hidden_layers):
        for name, paths in _layer(config).items():
            names[f"{before}layers.{number}.{name}"] = tuple((f"layers_{number}", *path) for path in paths)
    return names


def _layer(config: LlamaConfig) -> dict[str, tuple[Path, ...]]:
    names: dict[str, tuple[Path, ...]] = {
        f"{theirs}.weight": ((ours, "scale"),) for theirs, ours in NORMS[config.norms].items()
    }
    if config.qk_norm is not None:
        names |= {f"self_attn.{one}_norm.weight": (("attention", f"{one}_norm", "scale"),) for one in "qk"}
    matrices = {f"self_attn.{one}_proj": ("attention", f"{one}_proj") for one in "qkvo"}
    matrices |= {f"mlp.{one}_proj": ("mlp", f"{one}_proj") for one in ("gate", "up", "down")}
    if config.fused_projections:
        for fused, parts in _FUSED.items():
            module = fused.partition(".")[0]
            names[f"{fused}.weight"] = tuple((*matrices.pop(f"{module}.{part}"), "kernel") for part in parts)
    names |= {f"{name}.weight": ((*path, "kernel"),) for name, path in matrices.items()}
    if config.qkv_bias:
        names |= {f"self_attn.{one}_proj.bias": (("attention", f"{one}_proj", "bias"),) for one in "qkv"}
    return names
