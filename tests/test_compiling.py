"""Programs of several policies compiled side by side give what `decode` and `score_after` give."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax import generation, scoring
from recyc_jax.commands.compiling import Programs

PROMPTS = ([5, 9, 3, 4], [7, 8])
POLICIES = [rj.parse_policy(text) for text in ("full", "lookahead:budget=3,stride=2", "recycled:budget=3,stride=2")]


def test_each_program_is_decode(params, config):
    prefill = functools.partial(rj.prefill, params, config, PROMPTS, policies=POLICIES, max_new_tokens=6)
    state, other = prefill(), prefill()
    lower = lambda state, policy: generation.lower_decode(params, config, state, policy=policy)  # noqa: E731
    with Programs(lower) as programs:
        programs.prepare(state, POLICIES)
        for policy in POLICIES:
            assert programs.of(state, policy) is programs.of(state, policy)
            out, state = programs.of(state, policy)(params, state, None, rj.chain())
            expected, other = rj.decode(params, config, other, policy=policy)
            for one, two in zip(out, expected, strict=True):
                np.testing.assert_array_equal(one, two)


def test_each_program_is_score_after(params, config):
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
    prefill = functools.partial(rj.prefill, params, config, PROMPTS, policies=POLICIES, max_new_tokens=3)
    state, other = prefill(), prefill()
    lower = lambda state, policy: scoring.lower_score(params, config, state, 3, policy=policy)  # noqa: E731
    with Programs(lower) as programs:
        for policy in POLICIES:
            scores, state = programs.of(state, policy)(params, state, tokens)
            expected, other = rj.score_after(params, config, other, tokens, policy=policy)
            np.testing.assert_array_equal(scores.log_probabilities, expected.log_probabilities)


def test_errors_of_a_policy_come_out(params, config):
    state = rj.prefill(params, config, PROMPTS, max_new_tokens=6)
    lower = lambda state, policy: generation.lower_decode(params, config, state, policy=policy)  # noqa: E731
    with Programs(lower) as programs, pytest.raises(ValueError, match="needs the prompt's"):
        programs.prepare(state, POLICIES)
