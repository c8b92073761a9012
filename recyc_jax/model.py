"""The Llama-family decoder as Flax modules that hold parameters only.

Attention is a function passed in: `attend(layer, project, state) -> (out, state)`. The modules know neither caches nor
policies; `decode.py` joins them. Letters: B batch, T queries, D model, N query heads, K key/value heads, H head dim,
F feed-forward, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from recyc_jax import projections, rope
from recyc_jax.attention import reference
from recyc_jax.config import LlamaConfig
from recyc_jax.projections import Linear, Norm, Projections, Stream, ToHeads

Params = Any


Project = Callable[..., Any]
"""() -> Heads of a layer; with `cached` and `slot` (Heads, the cache with them in it)."""
Attend = Callable[[int, Project, Any], tuple[Array, Any]]
"""(layer, project, state) -> (attention's output [B, T, N, H], state)."""

_WEIGHT_INIT = nn.initializers.normal(0.02)


class RMSNorm(nn.Module):
    """`projections.rms_norm`."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return projections.rms_norm(x, _norm(self, x.shape[-1], self.eps))


def _norm(module: nn.Module, features: int, eps: float) -> Norm:
    return Norm(module.param("scale", nn.initializers.ones, (features,)), eps)


class _Norm(nn.Module):
    """A norm's parameters, for what it is part of."""

    config: LlamaConfig

    @nn.compact
    def __call__(self) -> Norm:
        return _norm(self, self.config.hidden_size, self.config.rms_norm_eps)


class _Linear(nn.Module):
    """A projection's parameters, likewise."""

    features_in: int
    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> Linear:
        kernel = self.param("kernel", _WEIGHT_INIT, (self.features_in, self.features))
        return Linear(kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None)


class Attention(nn.Module):
    """Projections around an attention function."""

    config: LlamaConfig
    layer: int
    projections: Projections

    @nn.compact
    def __call__(
        self, stream: Stream, norm: Norm, after: Norm, cos: Array, sin: Array, attend: Attend, state: Any
    ) -> tuple[Stream, Any]:
        """The stream with attention's output for its norm added; another norm comes after."""
        c = self.config
        width, dim = c.num_attention_heads * c.head_dim, c.head_dim
        kv_width = c.num_key_value_heads * dim
        to_heads = ToHeads(
            _Linear(c.hidden_size, width, c.qkv_bias, name="q_proj")(),
            _Linear(c.hidden_size, kv_width, c.qkv_bias, name="k_proj")(),
            _Linear(c.hidden_size, kv_width, c.qkv_bias, name="v_proj")(),
        )

        def project(**into: Any) -> Any:
            make: Any = self.projections.heads_appended if into else self.projections.heads
            return make(stream, norm, to_heads, cos, sin, dim, **into)

        out, state = attend(self.layer, project, state)
        to_hidden = _Linear(width, c.hidden_size, name="o_proj")()
        return self.projections.added(out.reshape(*out.shape[:2], width), to_hidden, stream, after), state


class MLP(nn.Module):
    """The SiLU-gated feed-forward layer."""

    config: LlamaConfig
    projections: Projections

    @nn.compact
    def __call__(self, stream: Stream, norm: Norm, after: Norm | None) -> Stream:
        """The stream with the layer's output for its norm added."""
        c = self.config
        gate, up = (_Linear(c.hidden_size, c.intermediate_size, name=name)() for name in ("gate_proj", "up_proj"))
        down = _Linear(c.intermediate_size, c.hidden_size, name="down_proj")()
        return self.projections.added(self.projections.gated(stream, norm, gate, up), down, stream, after)


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and beside a residual."""

    config: LlamaConfig
    layer: int
    projections: Projections = projections

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.mlp_norm = _Norm(c), _Norm(c)
        self.attention, self.mlp = Attention(c, self.layer, self.projections), MLP(c, self.projections)

    def first_norm(self) -> Norm:
        """What a stream that comes in goes through first."""
        return self.attention_norm()

    def __call__(
        self, stream: Stream, cos: Array, sin: Array, attend: Attend, state: Any, after: Norm | None = None
    ) -> tuple[Stream, Any]:
        """The stream after the layer; `after` is the next one's first norm."""
        middle = self.mlp_norm()
        stream, state = self.attention(stream, self.attention_norm(), middle, cos, sin, attend, state)
        return self.mlp(stream, middle, after), state


class Llama(nn.Module):
    """The decoder up to its final norm; it holds the head's parameters too (`logits`)."""

    config: LlamaConfig
    projections: Projections = projections

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param("embedding", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))
        self.layers = [Block(c, layer, self.projections) for layer in range(c.num_hidden_layers)]
        self.final_norm = RMSNorm(c.rms_norm_eps)
        if not c.tie_word_embeddings:
            self.head = self.param("head", _WEIGHT_INIT, (c.vocab_size, c.hidden_size))

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attend: Attend, states: Sequence[Any]
    ) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
        """Hidden states after the final norm, and each layer's state as `attend` left it."""
        norms = [block.first_norm() for block in self.layers]
        stream = self.projections.begin(jnp.take(self.embedding, tokens, axis=0, mode="clip"), norms[0])
        cos, sin = rope.angles(self.config, positions)
        states_after = []
        for block, state, after in zip(self.layers, states, [*norms[1:], None], strict=True):
            stream, state = block(stream, cos, sin, attend, state, after)
            states_after.append(state)
        return self.final_norm(stream.x), tuple(states_after)


def _attend_causally(layer: int, project: Project, state: Any) -> tuple[Array, Any]:
    heads = project()
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
    projections: Projections = projections,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """`Llama.__call__` with these parameters."""
    return cast(Any, Llama(config, projections).apply({"params": params}, tokens, positions, attend, states))


def logits(params: Params, config: LlamaConfig, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Next-token logits in float32."""
    return products(hidden, output_embedding(params, config))


def output_embedding(params: Params, config: LlamaConfig) -> Float[Array, "V D"]:
    """What hidden states are multiplied by for logits."""
    return params["embedding" if config.tie_word_embeddings else "head"]


def products(hidden: Float[Array, "... D"], embedding: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """Hidden states times each token's output embedding, float32."""
    return jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def forward(params: Params, config: LlamaConfig, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Next-token logits at every position under ordinary causal attention, float32.

    The plain parallel pass, for training and as the yardstick of `score`: it builds T x T logits a head and T x V
    outputs. To read long prompts use `prefill`.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = hidden_states(params, config, tokens, positions, _attend_causally, (None,) * config.num_hidden_layers)
    return logits(params, config, hidden)
