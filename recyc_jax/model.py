"""The Llama-family decoder as Flax modules that hold parameters only.

Attention is a function passed in: `attend(layer, heads, state) -> (out, state)`. The modules know neither caches nor
policies; `decode.py` joins them. Letters: B batch, T queries, D model, N query heads, K key/value heads, H head dim,
F feed-forward, V vocabulary.
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

from recyc_jax import rope
from recyc_jax.attention import reference
from recyc_jax.config import LlamaConfig

Params = Any


class Heads(NamedTuple):
    """What a layer hands to its attention function."""

    q: Array  # [B, T, N, H], after RoPE
    k: Array  # [B, T, K, H], after RoPE
    v: Array  # [B, T, K, H]
    plain_q: Array  # [B, T, N, H]: q before RoPE, by which some policies tell queries alike


Attend = Callable[[int, Heads, Any], tuple[Array, Any]]

_WEIGHT_INIT = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """x over its root mean square, times a scale; the variance is taken in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


def _dense(features: int, name: str, use_bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=use_bias, kernel_init=_WEIGHT_INIT, name=name)


class Attention(nn.Module):
    """Projections around an attention function."""

    config: LlamaConfig
    layer: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, state: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        heads, kv_heads, dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        flat = [
            _dense(count * dim, f"{name}_proj", c.qkv_bias)(x)
            for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        ]
        # XLA for TPU would take the split into heads back into the product, and turn the weights around for it at each step
        q, k, v = (one.reshape(*x.shape[:2], -1, dim) for one in lax.optimization_barrier(flat))
        made = Heads(rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, q)
        out, state = attend(self.layer, made, state)
        return _dense(c.hidden_size, "o_proj")(out.reshape(*x.shape[:2], heads * dim)), state


class MLP(nn.Module):
    """The SiLU-gated feed-forward layer."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = _dense(self.config.intermediate_size, "gate_proj")(x)
        up = _dense(self.config.intermediate_size, "up_proj")(x)
        return _dense(self.config.hidden_size, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and beside a residual."""

    config: LlamaConfig
    layer: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cos: Array, sin: Array, attend: Attend, state: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        eps = self.config.rms_norm_eps
        attention = Attention(self.config, self.layer, name="attention")
        out, state = attention(RMSNorm(eps, name="attention_norm")(x), cos, sin, attend, state)
        x = x + out
        return x + MLP(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)), state


class Llama(nn.Module):
    """The decoder. Call it for hidden states, `logits` for the head."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))
        self.layers = [Block(c, layer) for layer in range(c.num_hidden_layers)]
        self.final_norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.head = self.param("head", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, states: Sequence[Any]
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states after the final norm, and each layer's state as `attend` left it."""
        x = jnp.take(self.embedding, tokens, axis=0, mode="clip")
        cos, sin = rope.angles(self.config, positions)
        after = []
        for block, state in zip(self.layers, states, strict=True):
            x, state = block(x, cos, sin, attend, state)
            after.append(state)
        return self.final_norm(x), tuple(after)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token logits in float32."""
        table = self.embedding if self.config.tie_word_embeddings else self.head
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _attend_causally(layer: int, heads: Heads, state: Any) -> tuple[Array, Any]:
    return reference.causal(heads.q, heads.k, heads.v), state


def init_params(config: LlamaConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random parameters of the config's shape: one subtree a layer (`layers_0`, ...), normal(0, 0.02), norms one."""

    def init(key: Array) -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        model = Llama(config)
        params = model.init(key, tokens, tokens, _attend_causally, (None,) * config.num_hidden_layers)["params"]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(init)(key)


def hidden_states(
    params: Params,
    config: LlamaConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attend: Attend,
    states: Sequence[Any],
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """`Llama.__call__` with these parameters."""
    return cast(Any, Llama(config).apply({"params": params}, tokens, positions, attend, states))


def logits(params: Params, config: LlamaConfig, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """`Llama.logits` with these parameters."""
    return cast(Any, Llama(config).apply({"params": params}, hidden, method=Llama.logits))


@functools.partial(jax.jit, static_argnames="config")
def forward(params: Params, config: LlamaConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Next-token logits at every position under ordinary causal attention, float32.

    The plain parallel pass, for training and as the yardstick of `score`: it builds T x T logits a head and T x V
    outputs. To read long prompts use `prefill`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = hidden_states(params, config, tokens, positions, _attend_causally, (None,) * config.num_hidden_layers)
    return logits(params, config, hidden)
