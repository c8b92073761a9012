"""Recycled Attention in JAX: long-context decoding that re-reads only the tokens that mattered."""

from recyc_jax.config import LlamaConfig, RopeScaling
from recyc_jax.decode import Generation, Scores, decode, generate, score, score_after
from recyc_jax.model import forward, init_params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.full import FullAttention
from recyc_jax.policies.h2o import H2O
from recyc_jax.policies.recycled import RecycledAttention
from recyc_jax.policies.registry import parse_policy
from recyc_jax.policies.schedules import FixedStride, QuerySimilarity
from recyc_jax.policies.snapkv import SnapKV
from recyc_jax.policies.streaming_llm import StreamingLLM
from recyc_jax.prefill import Prefilled, prefill
from recyc_jax.pretrained import PretrainedLM, load_pretrained
from recyc_jax.sampling import Greedy, Sample

__all__ = [
    "H2O",
    "FixedStride",
    "FullAttention",
    "Generation",
    "Greedy",
    "LlamaConfig",
    "Policy",
    "Prefilled",
    "PretrainedLM",
    "QuerySimilarity",
    "RecycledAttention",
    "RopeScaling",
    "Sample",
    "Scores",
    "SnapKV",
    "StreamingLLM",
    "decode",
    "forward",
    "generate",
    "init_params",
    "load_pretrained",
    "parse_policy",
    "prefill",
    "score",
    "score_after",
]
