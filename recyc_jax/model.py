"""The decoder, as Flax modules that hold parameters only: Llama, and where the config says so what other families do
at the same place.

Attention is a function passed in: `attend(layer, heads, state) -> (out, state)`. The modules know neither caches nor
policies. Letters: B batch, T tokens, D model width, N query heads, K key/value heads, H head dim, F feed-forward width,
V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import prompts, rope, sharding
from recyc_jax.attention import reference
from recyc_jax.config import LlamaConfig
from recyc_jax.rope import Positions

Params = Any


class Heads(NamedTuple):
    """What a layer hands to its attention function."""

    q: Array  # [B, T, N, H], after RoPE
    k: Any  # [B, T, K, H], after RoPE; None if the cache holds it already
    v: Any  # [B, T, K, H], as k
    q_before_rope: Array  # [B, T, N, H]: some policies compare these


Attend = Callable[[int, Heads, Any], tuple[Array, Any]]
"""(layer, heads, the layer's state) -> (attention's output [B, T, N, H], the layer's state after it)."""

_WEIGHT_INIT = nn.initializers.normal(0.02, jnp.float32)  # also where jax_enable_x64 makes float64 the default


class RMSNorm(nn.Module):
    """x over its root mean square, times a scale (`LlamaConfig.norm_scale`); the variance is taken in float32."""

    eps: float
    norm_scale: str = "rounded"

    @nn.compact
    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", zeros if self.norm_scale == "one_plus" else ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        if self.norm_scale == "rounded":
            return scale.astype(x.dtype) * wide.astype(x.dtype)
        return (wide * norm_factors(scale, self.norm_scale)).astype(x.dtype)


def norm_factors(scale: Float[Array, " D"], norm_scale: str) -> Float[Array, " D"]:
    """What a norm multiplies by, float32."""
    scale = scale.astype(jnp.float32)
    return 1 + scale if norm_scale == "one_plus" else scale


def norm(config: LlamaConfig) -> RMSNorm:
    """A norm as the config wants it."""
    return RMSNorm(config.rms_norm_eps, config.norm_scale)


def _linear(features: int, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=_WEIGHT_INIT)


class Attention(nn.Module):
    """Projections to heads, norms of queries and keys, RoPE, the attention function, and the projection back."""

    config: LlamaConfig
    layer: int

    def setup(self) -> None:
        c = self.config
        self.q_proj = _linear(c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = _linear(c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = _linear(c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = _linear(c.hidden_size)
        if c.qk_norm is not None:
            self.q_norm, self.k_norm = norm(c), norm(c)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, attend: Attend, state: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        # without the barrier XLA for TPU merges the split into heads into the products and transposes the weights each
        # step
        flat = lax.optimization_barrier((self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        if self.config.qk_norm == "projection":
            flat = self.q_norm(flat[0]), self.k_norm(flat[1]), flat[2]
        q, k, v = (one.reshape(*x.shape[:2], -1, self.config.head_dim) for one in flat)
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        out, state = attend(self.layer, positioned(q, k, v, positions), state)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), state


def positioned(q: Array, k: Array, v: Array, positions: Positions) -> Heads:
    """The heads with queries and keys rotated, and queries multiplied."""
    rotation, multiplier = positions
    rotated_q, rotated_k = (q, k) if rotation is None else (rope.rotate(q, rotation), rope.rotate(k, rotation))
    if multiplier is not None:
        by = multiplier if isinstance(multiplier, float) else multiplier[..., None, None]
        rotated_q = (rotated_q.astype(jnp.float32) * by).astype(q.dtype)
    return Heads(rotated_q, rotated_k, v, q)


ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class MLP(nn.Module):
    """The gated feed-forward layer."""

    config: LlamaConfig

    def setup(self) -> None:
        self.gate_proj, self.up_proj = (_linear(self.config.intermediate_size) for _ in range(2))
        self.down_proj = _linear(self.config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(ACTIVATIONS[self.config.activation](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, each normed (before, after or both) and added to the residual stream."""

    config: LlamaConfig
    layer: int

    def setup(self) -> None:
        c = self.config
        if c.norms != "after":
            self.attention_norm, self.mlp_norm = norm(c), norm(c)
        if c.norms != "before":
            self.attention_out_norm, self.mlp_out_norm = norm(c), norm(c)
        self.attention, self.mlp = Attention(c, self.layer), MLP(c)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Positions, attend: Attend, state: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        before, after = self.config.norms != "after", self.config.norms != "before"
        out, state = self.attention(self.attention_norm(x) if before else x, positions, attend, state)
        x = x + (self.attention_out_norm(out) if after else out)
        out = self.mlp(self.mlp_norm(x) if before else x)
        x = x + (self.mlp_out_norm(out) if after else out)
        return x, state


DecoderLayers = Callable[..., tuple[Array, tuple[Any, ...]]]
"""(parameters of the whole model, config, x [B, T, D], each layer's `rope.Positions`, attend, states) -> (x, states):
all layers, one by one."""


class Llama(nn.Module):
    """The decoder up to its final norm. It also holds the output embedding, which `logits` applies."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))
        self.layers = [DecoderLayer(c, layer) for layer in range(c.num_hidden_layers)]
        self.final_norm = norm(c)
        if not c.tie_word_embeddings:
            self.head = self.param("head", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        states: Sequence[Any],
        row_lengths: Int[Array, " B"],
        decoder_layers: DecoderLayers | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states after the final norm, and each layer's state. `row_lengths` are as in `rope.by_layer`;
        `decoder_layers` may replace the layers."""
        x = multiplied(sharding.rows_of(self.embedding, tokens), self.config)
        by_layer = rope.by_layer(self.config, positions, row_lengths)
        if decoder_layers is not None:
            x, states = decoder_layers(self.variables["params"], self.config, x, by_layer, attend, states)
        else:
            x, states = self.decoder_layers(x, by_layer, attend, states)
        return self.final_norm(x), tuple(states)

    def decoder_layers(
        self, x: Float[Array, "B T D"], by_layer: Sequence[Positions], attend: Attend, states: Sequence[Any]
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """x after all layers, and each layer's state."""
        states_after = []
        for layer, positions, state in zip(self.layers, by_layer, states, strict=True):
            x, state = layer(x, positions, attend, state)
            states_after.append(state)
        return x, states_after


def multiplied(embeddings: Float[Array, "B T D"], config: LlamaConfig) -> Float[Array, "B T D"]:
    """Tokens' embeddings times the config's multiplier, which is rounded to their dtype (as Gemma's is)."""
    multiplier = config.embedding_multiplier
    return embeddings if multiplier == 1 else embeddings * jnp.asarray(multiplier, embeddings.dtype)


def hidden_states(
    params: Params,
    config: LlamaConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    states: Sequence[Any],
    row_lengths: Int[Array, " B"],
    decoder_layers: DecoderLayers | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """`Llama.__call__` with these parameters."""
    arguments = tokens, positions, attend, states, row_lengths, decoder_layers
    return cast(Any, Llama(config).apply({"params": params}, *arguments))


def logits(params: Params, config: LlamaConfig, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Next-token logits in float32."""
    return output_logits(hidden, output_embedding(params, config))


def output_embedding(params: Params, config: LlamaConfig) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits."""
    return params["embedding" if config.tie_word_embeddings else "head"]


def output_logits(hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """The product of hidden states with each token's output embedding, float32."""
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def attend_causally(config: LlamaConfig) -> Attend:
    """Ordinary causal attention within the tokens at hand, each layer with its window, for passes without a cache."""

    def attend(layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
        return reference.causal(heads.q, heads.k, heads.v, config.window(layer)), state

    return attend


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init_params(config: LlamaConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the config's shape: one subtree per layer (`layers_0`, ...), normal(0, 0.02), norms that
    multiply by one."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    states = (None,) * config.num_hidden_layers
    variables = Llama(config).init(key, tokens, tokens, attend_causally(config), states, tokens[0])
    return jax.tree.map(lambda leaf: leaf.astype(dtype), variables["params"])


def forward(params: Params, config: LlamaConfig, tokens: Any) -> Float[Array, "B T V"]:
    """Next-token logits at every position of tokens [B, T] under ordinary causal attention, float32.

    The plain parallel pass, for training and as the yardstick of `score`: it builds T x T logits per head and T x V
    outputs. To read long prompts use `prefill`. Raises ValueError for rows of different lengths and for ids outside the
    vocabulary; inside `jax.jit`, where ids are not known, the logits from such an id on are NaN.
    """
    return _forward(params, config, prompts.as_rectangle("tokens", tokens, config))


@functools.partial(jax.jit, static_argnames="config")
def _forward(params: Params, config: LlamaConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    states, row_lengths = (None,) * config.num_hidden_layers, positions[:, -1] + 1
    hidden, _ = hidden_states(params, config, tokens, positions, attend_causally(config), states, row_lengths)
    outside = jnp.cumsum((tokens < 0) | (tokens >= config.vocab_size), axis=1, dtype=jnp.int32) > 0
    return jnp.where(outside[..., None], jnp.nan, logits(params, config, hidden))
