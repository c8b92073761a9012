"""Recycled Attention in JAX: long-context decoding that re-reads only the tokens that mattered."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recyc_jax.config import LlamaConfig, RopeScaling
    from recyc_jax.generation import decode, generate
    from recyc_jax.loading.pretrained import PretrainedLM, load_pretrained
    from recyc_jax.model import forward, init_params
    from recyc_jax.policies.base import Policy
    from recyc_jax.policies.full import FullAttention
    from recyc_jax.policies.h2o import H2O
    from recyc_jax.policies.lookahead import Lookahead
    from recyc_jax.policies.lossless import Lossless
    from recyc_jax.policies.quest import Quest
    from recyc_jax.policies.recycled import RecycledAttention
    from recyc_jax.policies.registry import parse_policy
    from recyc_jax.policies.schedules import FixedStride, QuerySimilarity
    from recyc_jax.policies.snapkv import SnapKV
    from recyc_jax.policies.streaming_llm import StreamingLLM
    from recyc_jax.policies.top_k import TopK
    from recyc_jax.prefilling import Prefilled, prefill
    from recyc_jax.results import Generation, LosslessGeneration, ScoredGeneration
    from recyc_jax.sampling import (
        Chain,
        CountPenalty,
        Greedy,
        LogitBias,
        MinNewTokens,
        Processor,
        RepetitionPenalty,
        Sample,
        chain,
    )
    from recyc_jax.scoring import Scores, score, score_after
    from recyc_jax.state_files import load_state
    from recyc_jax.streaming import Piece, Stream, stream, stream_after
    from recyc_jax.turns import bookmark, extend, rewind, with_room

# Loaded when first used, so that a command line answers `--help` before JAX is imported.
_PUBLIC = {
    "recyc_jax.config": ("LlamaConfig", "RopeScaling"),
    "recyc_jax.generation": ("decode", "generate"),
    "recyc_jax.loading.pretrained": ("PretrainedLM", "load_pretrained"),
    "recyc_jax.model": ("forward", "init_params"),
    "recyc_jax.policies.base": ("Policy",),
    "recyc_jax.policies.full": ("FullAttention",),
    "recyc_jax.policies.h2o": ("H2O",),
    "recyc_jax.policies.lookahead": ("Lookahead",),
    "recyc_jax.policies.lossless": ("Lossless",),
    "recyc_jax.policies.quest": ("Quest",),
    "recyc_jax.policies.recycled": ("RecycledAttention",),
    "recyc_jax.policies.registry": ("parse_policy",),
    "recyc_jax.policies.schedules": ("FixedStride", "QuerySimilarity"),
    "recyc_jax.policies.snapkv": ("SnapKV",),
    "recyc_jax.policies.streaming_llm": ("StreamingLLM",),
    "recyc_jax.policies.top_k": ("TopK",),
    "recyc_jax.prefilling": ("Prefilled", "prefill"),
    "recyc_jax.results": ("Generation", "LosslessGeneration", "ScoredGeneration"),
    "recyc_jax.sampling": (
        *("Chain", "CountPenalty", "Greedy", "LogitBias", "MinNewTokens", "Processor", "RepetitionPenalty", "Sample"),
        "chain",
    ),
    "recyc_jax.scoring": ("Scores", "score", "score_after"),
    "recyc_jax.state_files": ("load_state",),
    "recyc_jax.streaming": ("Piece", "Stream", "stream", "stream_after"),
    "recyc_jax.turns": ("bookmark", "extend", "rewind", "with_room"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = ("attention", "cache", "config", "model", "policies", "prompts", "rope", "sampling", "sharding")
_MOVED = ("export", "fetch", "gguf_convert", "gguf_tokenizer", "pretrained")

__all__ = [
    "H2O",
    "Chain",
    "CountPenalty",
    "FixedStride",
    "FullAttention",
    "Generation",
    "Greedy",
    "LlamaConfig",
    "LogitBias",
    "Lookahead",
    "Lossless",
    "LosslessGeneration",
    "MinNewTokens",
    "Piece",
    "Policy",
    "Prefilled",
    "PretrainedLM",
    "Processor",
    "QuerySimilarity",
    "Quest",
    "RecycledAttention",
    "RepetitionPenalty",
    "RopeScaling",
    "Sample",
    "ScoredGeneration",
    "Scores",
    "SnapKV",
    "Stream",
    "StreamingLLM",
    "TopK",
    "bookmark",
    "chain",
    "decode",
    "extend",
    "forward",
    "generate",
    "init_params",
    "load_pretrained",
    "load_state",
    "parse_policy",
    "prefill",
    "rewind",
    "score",
    "score_after",
    "stream",
    "stream_after",
    "with_room",
]


def _version() -> str:
    """That of the installed package; "unknown" for files that are not installed."""
    from importlib import metadata

    try:
        return metadata.version("recyc-jax")
    except metadata.PackageNotFoundError:
        return "unknown"


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value  # found at once from now on
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"recyc_jax.{name}")
    if name in _MOVED:
        module = f"recyc_jax.loading.{name}"
        warnings.warn(f"recyc_jax.{name} is deprecated: it is {module} now", DeprecationWarning, stacklevel=2)
        return importlib.import_module(module)
    raise AttributeError(f"module 'recyc_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
