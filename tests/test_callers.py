"""What callers pass in other forms than the documented ones is taken, or refused in their words."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from transformers import BatchEncoding

import recyc_jax as rj
from recyc_jax import generation_loop, implementations
from recyc_jax.decoding import Call, decode_tokens

LAYERS = 1
PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture
def generate(params, config):
    return functools.partial(rj.generate, params, config, max_new_tokens=4)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_policies_as_strings(params, config, generate):
    policy = rj.RecycledAttention(4, rj.FixedStride(2))
    assert rj.parse_policy(" recycled: budget = 4, stride=2 ") == policy
    same(generate(PROMPTS, policy="recycled:budget=4, stride=2"), generate(PROMPTS, policy=policy))
    for policies in (policy, "recycled:budget=4,stride=2"):
        state = rj.prefill(params, config, PROMPTS, policies=policies, max_new_tokens=4)
        same(rj.decode(params, config, state, policy=policy)[0], generate(PROMPTS, policy=policy))


def test_end_of_sequence_ids_in_any_collection(generate):
    expected = generate(PROMPTS, eos_ids=(1, 7))
    for ids in (np.array([7, 1]), jnp.array([1, 7]), {1, 7}, [1, 7, 7]):
        same(generate(PROMPTS, eos_ids=ids), expected)
    same(generate(PROMPTS, eos_ids=jnp.array(7)), generate(PROMPTS, eos_ids=7))


@pytest.mark.usefixtures("unchecked")
def test_what_a_tokenizer_returns(generate):
    tokenized = BatchEncoding({"input_ids": PROMPTS, "attention_mask": [[1] * len(prompt) for prompt in PROMPTS]})
    same(generate(tokenized), generate(PROMPTS))
    for text in ("hello", ["hello"]):
        with pytest.raises(ValueError, match="prompts is text: pass token ids"):
            generate(text)


@pytest.mark.usefixtures("unchecked")
def test_nested_and_ragged_lists(params, config):
    nested = [[1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(rj.forward(params, config, nested), rj.forward(params, config, np.array(nested)))
    for refuse in (
        lambda: rj.forward(params, config, PROMPTS),
        lambda: rj.score(params, config, PROMPTS, policy="full", context_length=1),
    ):
        with pytest.raises(ValueError, match="tokens has rows of 2 to 3 tokens: all rows must be of one length"):
            refuse()


def test_score_says_that_it_has_no_gradient(params, config):
    def total(params):
        return rj.score(params, config, np.array([[1, 2, 3]]), policy="full", context_length=1).sum()

    with pytest.raises(ValueError, match="score is not differentiable"):
        jax.grad(total)(params)


@pytest.mark.parametrize("policy", ["full", "recycled:budget=4,stride=1000"])
def test_the_loop_ends_soon_after_all_rows_have(params, config, policy):
    """Rows that end at their second token do not take the 1024 steps of the call."""
    policy = rj.parse_policy(policy)

    def choose(logits, carry):
        token = jnp.zeros(2, jnp.int32)
        return token, token, jnp.broadcast_to(carry.step >= 1, (2,)), ()

    @jax.jit
    def run(state):
        output, attention = jnp.zeros((2, 1025), jnp.int32), implementations.resolve("reference")
        return generation_loop.run(params, config, state, policy, attention, choose, output, None).step

    state = rj.prefill(params, config, PROMPTS, policies=(policy,), max_new_tokens=1025, allow_beyond_context=True)
    assert 1 <= int(run(state)) <= 16


def test_a_last_part_of_a_period_compiles_no_further_body(params, config):
    policy = rj.RecycledAttention(4, rj.FixedStride(10))

    def products(new_tokens):
        state = rj.prefill(params, config, PROMPTS, policies=(policy,), max_new_tokens=new_tokens)
        jaxpr = decode_tokens.trace(params, state, Call(config, policy, new_tokens)).jaxpr
        return sum(equation.primitive.name == "dot_general" for equation in jaxprs.equations(jaxpr.jaxpr))

    assert products(31) == products(34) == products(39)
