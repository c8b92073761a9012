"""The Llama-family decoder, as Flax modules that hold parameters only.

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

from recyc_jax import prompts, rope
from recyc_jax.attention import reference
from recyc_jax.config import LlamaConfig

Params = Any


class Heads(NamedTuple):
    """What a layer hands to its attention function."""

    q: Array  # [B, T, N, H], after RoPE
    k: Array  # [B, T, K, H], after RoPE
    v: Array  # [B, T, K, H]
    q_before_rope: Array  # [B, T, N, H]: some policies compare these


Attend = Callable[[int, Heads, Any], tuple[Array, Any]]
"""(layer, heads, the layer's state) -> (attention's output [B, T, N, H], the layer's state after it)."""

_WEIGHT_INIT = nn.initializers.normal(0.02, jnp.float32)  # also where jax_enable_x64 makes float64 the default


class RMSNorm(nn.Module):
    """x over its root mean square, times a scale; the variance is taken in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


def _linear(features: int, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, kernel_init=_WEIGHT_INIT)


class Attention(nn.Module):
    """Projections to heads, RoPE, the attention function, and the projection back."""

    config: LlamaConfig
    layer: int

    def setup(self) -> None:
        c = self.config
        self.q_proj = _linear(c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.k_proj = _linear(c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.v_proj = _linear(c.num_key_value_heads * c.head_dim, c.qkv_bias)
        self.o_proj = _linear(c.hidden_size)

    def __call__(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, state: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        # without the barrier XLA for TPU merges the split into heads into the products and transposes the weights each
        # step
        flat = lax.optimization_barrier((self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k, v = (one.reshape(*x.shape[:2], -1, self.config.head_dim) for one in flat)
        heads = Heads(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, q)
        out, state = attend(self.layer, heads, state)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), state


class MLP(nn.Module):
    """The SiLU-gated feed-forward layer."""

    config: LlamaConfig

    def setup(self) -> None:
        self.gate_proj, self.up_proj = (_linear(self.config.intermediate_size) for _ in range(2))
        self.down_proj = _linear(self.config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    config: LlamaConfig
    layer: int

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.mlp_norm = RMSNorm(c.rms_norm_eps), RMSNorm(c.rms_norm_eps)
        self.attention, self.mlp = Attention(c, self.layer), MLP(c)

    def __call__(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, state: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        out, state = self.attention(self.attention_norm(x), cos, sin, attend, state)
        x = x + out
        x = x + self.mlp(self.mlp_norm(x))
        return x, state


DecoderLayers = Callable[..., tuple[Array, tuple[Any, ...]]]
"""(parameters of the whole model, config, x [B, T, D], cos, sin, attend, states) -> (x, states): all layers, one by
one."""


class Llama(nn.Module):
    """The decoder up to its final norm. It also holds the output embedding, which `logits` applies."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))
        self.layers = [DecoderLayer(c, layer) for layer in range(c.num_hidden_layers)]
        self.final_norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.head = self.param("head", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attend: Attend,
        states: Sequence[Any],
        decoder_layers: DecoderLayers | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states after the final norm, and each layer's state. `decoder_layers` may replace the layers."""
        x = jnp.take(self.embedding, tokens, axis=0, mode="clip")
        cos, sin = rope.angles(self.config, positions)
        if decoder_layers is not None:
            x, states = decoder_layers(self.variables["params"], self.config, x, cos, sin, attend, states)
        else:
            x, states = self.decoder_layers(x, cos, sin, attend, states)
        return self.final_norm(x), tuple(states)

    def decoder_layers(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, states: Sequence[Any]
    ) -> tuple[Float[Array, "B T D"], list[Any]]:
        """x after all layers, and each layer's state."""
        states_after = []
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, cos, sin, attend, state)
            states_after.append(state)
        return x, states_after


def hidden_states(
    params: Params,
    config: LlamaConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    states: Sequence[Any],
    decoder_layers: DecoderLayers | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """`Llama.__call__` with these parameters."""
    return cast(Any, Llama(config).apply({"params": params}, tokens, positions, attend, states, decoder_layers))


def logits(params: Params, config: LlamaConfig, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Next-token logits in float32."""
    return output_logits(hidden, output_embedding(params, config))


def output_embedding(params: Params, config: LlamaConfig) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits."""
    return params["embedding" if config.tie_word_embeddings else "head"]


def output_logits(hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """The product of hidden states with each token's output embedding, float32."""
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


def attend_causally(layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
    """Ordinary causal attention within the tokens at hand, for passes without a cache."""
    return reference.causal(heads.q, heads.k, heads.v), state


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def init_params(config: LlamaConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the config's shape: one subtree per layer (`layers_0`, ...), normal(0, 0.02), norms one."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = Llama(config).init(key, tokens, tokens, attend_causally, (None,) * config.num_hidden_layers)
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
    hidden, _ = hidden_states(params, config, tokens, positions, attend_causally, (None,) * config.num_hidden_layers)
    outside = jnp.cumsum((tokens < 0) | (tokens >= config.vocab_size), axis=1, dtype=jnp.int32) > 0
    return jnp.where(outside[..., None], jnp.nan, logits(params, config, hidden))
