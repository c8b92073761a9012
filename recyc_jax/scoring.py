"""`score`: the log-probability of every token of a text under a policy, fed one at a time."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from recyc_jax import generation_loop, implementations, sharding
from recyc_jax import prompts as prompt_arrays
from recyc_jax.answers import rewound_to
from recyc_jax.config import LlamaConfig
from recyc_jax.generation_checks import check_state
from recyc_jax.generation_loop import DecodeState
from recyc_jax.model import Params
from recyc_jax.policies.base import Policy
from recyc_jax.policies.registry import as_policy
from recyc_jax.prefilling import Prefilled, prefill


class Scores(NamedTuple):
    """What `score_after` returns."""

    log_probabilities: Array  # float32 [B, M]
    full_steps: Array  # int32 [B, L]: full-attention decode steps, M - 1 steps being taken
    states: tuple[Any, ...]  # the policy's state of each layer after the last step: for diagnostics
    most_likely: Array  # bool [B, M]: whether the token is the one that greedy decoding would have chosen there


def score(
    params: Params,
    config: LlamaConfig,
    tokens: Any,
    *,
    policy: Policy | str,
    context_length: int,
    implementation: str | None = None,
    allow_beyond_context: bool = False,
) -> Float[Array, "B new"]:
    """Log-probabilities of tokens `context_length`..T-1 of [B, T], float32 [B, T - context_length].

    The first `context_length` tokens are prefilled (column 0 is prefill's prediction), the rest fed one at a time under
    the policy. Decode step s feeds token `context_length - 1 + s`, so a fixed schedule is full at tokens
    `context_length - 1 + k * stride`. Not differentiable. Raises ValueError for rows of different lengths,
    and for rows beyond the model's context, unless `allow_beyond_context`.
    """
    tokens = prompt_arrays.as_rectangle("tokens", tokens, config)
    if not 1 <= context_length < tokens.shape[1]:
        raise ValueError(
            f"context_length={context_length} must lie in 1..T-1 of tokens [B, T], here {list(tokens.shape)}"
        )
    policy = as_policy(policy)
    state = prefill(
        _not_differentiable(params),
        config,
        tokens[:, :context_length],
        policies=(policy,),
        max_new_tokens=tokens.shape[1] - context_length,
        implementation=implementation,
        allow_beyond_context=allow_beyond_context,
    )
    scores, _ = score_after(
        params, config, state, tokens[:, context_length:], policy=policy, implementation=implementation
    )
    return scores.log_probabilities


def score_after(
    params: Params,
    config: LlamaConfig,
    state: Prefilled,
    tokens: Any,
    *,
    policy: Policy | str,
    implementation: str | None = None,
) -> tuple[Scores, Prefilled]:
    """Log-probabilities of `tokens` [B, M] after prefilled prompts, and the state rewound to the prompts: `score` for
    several policies that share one prefill.

    `state` is donated, as in `decode`. Not differentiable. Raises ValueError where prefill left no room for M tokens.
    """
    policy = as_policy(policy)
    check_state(state, policy, implementation)
    tokens = prompt_arrays.as_rectangle("tokens", tokens, config)
    tokens = sharding.spread(tokens, "B-", tokens.shape[0])
    if tokens.shape[0] != state.logits.shape[0] or tokens.shape[1] > state.room:
        raise ValueError(
            f"tokens of shape {list(tokens.shape)} do not fit {state.logits.shape[0]} prompts with room for {state.room}"
        )
    return score_tokens(_not_differentiable(params), state, tokens, config, policy, implementation)


def lower_score(
    params: Params, config: LlamaConfig, state: Prefilled, count: int, *, policy: Policy | str
) -> jax.stages.Lowered:
    """The program of `score_after(params, config, state, tokens, policy=policy)` for `count` tokens a row, traced but
    not compiled. Compiled, it is called with `(params, state, tokens)`, an int32 array. Raises ValueError as
    `score_after` does."""
    policy = as_policy(policy)
    check_state(state, policy, None)
    tokens = sharding.spread(jnp.zeros((state.logits.shape[0], count), jnp.int32), "B-", state.logits.shape[0])
    return score_tokens.lower(params, state, tokens, config, policy, None)


@functools.partial(jax.jit, static_argnames=("config", "policy", "implementation"), donate_argnames="state")
def score_tokens(
    params: Params,
    state: Prefilled,
    tokens: Int[Array, "B new"],
    config: LlamaConfig,
    policy: Policy,
    implementation: str | None,
) -> tuple[Scores, Prefilled]:
    """The program behind `score_after`."""

    def choose(logits: Array, carry: DecodeState) -> tuple[Array, Any, Array, Any]:
        """The next token is the text's; its log-probability is recorded, and whether it is the most likely one."""
        token = lax.dynamic_index_in_dim(tokens, carry.step, axis=1, keepdims=False)
        its = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]
        return token, (its, jnp.argmax(logits, axis=-1) == token), carry.done, ()

    output = jnp.zeros(tokens.shape, jnp.float32), jnp.zeros(tokens.shape, jnp.bool_)
    attention = implementations.resolve(implementation)
    end = generation_loop.run(params, config, state, policy, attention, choose, output, None)
    log_probabilities, most_likely = end.output
    scores = Scores(log_probabilities, end.full_steps, end.policy_states, most_likely)
    return scores, rewound_to(end.cache, state)


@jax.custom_jvp
def _not_differentiable(params: Params) -> Params:
    return params


@_not_differentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise ValueError(
        "score is not differentiable: it feeds tokens one at a time in a loop. Take gradients of rj.forward, or of "
        "recyc_jax.attention.whole_sequence, which has the recycled forms over whole sequences"
    )
