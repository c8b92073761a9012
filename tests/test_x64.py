"""With jax_enable_x64 the programs are those of 32 bits: kernels included, whose sums and loop indices would grow."""

import contextlib

import jax
import jax.numpy as jnp
import pytest

import recyc_jax as rj
from recyc_jax import training_implementations
from recyc_jax.attention.whole_sequence import Recycle
from recyc_jax.decoding import Call, decode_tokens
from recyc_jax.prefilling import read_prompts

POLICIES = [
    "full",
    "recycled:budget=16,stride=4",
    "recycled:budget=16,stride=4,lookahead=2,decay=1,window=8",
    "recycled:budget=16,check_every=4,threshold=0.3",
    "h2o:budget=16",
    "snapkv:budget=16",
    "streaming_llm:budget=16",
]


@pytest.fixture(autouse=True)
def x64():
    context = jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()
    with contextlib.ExitStack() as stack:
        stack.enter_context(context)
        yield


def wide(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.dtype.itemsize > 4 and leaf.dtype.kind in "if"]


@pytest.mark.parametrize("implementation", ["reference", "pallas_gpu"])
@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_is_traced_in_32_bits(policy, implementation):
    config, policy = rj.LlamaConfig.tiny(head_dim=16), rj.parse_policy(policy, 64)
    params = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0)))
    tokens, lengths = jax.ShapeDtypeStruct((2, 48), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)

    def generate(params, tokens, lengths):
        state = read_prompts(params, tokens, lengths, config, 12, policy.needs, implementation)
        return decode_tokens(params, state, Call(config, policy, 12, implementation=implementation))

    assert not wide([params, jax.eval_shape(generate, params, tokens, lengths)])


@pytest.mark.parametrize("sampler", [rj.Greedy(), rj.Sample(0.7, 5, 0.9)])
def test_samplers(sampler):
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = sampler(jnp.zeros((2, 9), jnp.float32), keys, jnp.int32(0))
    assert drawn.dtype == jnp.int32


@pytest.mark.parametrize("implementation", ["reference", "pallas"])
def test_training_is_traced_in_32_bits(implementation):
    attend = training_implementations.attention(implementation, Recycle(1, 16, 32))
    q, kv = (jax.ShapeDtypeStruct((1, 128, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, None).astype(jnp.float32))

    assert not wide(jax.eval_shape(jax.grad(loss, (0, 1, 2)), q, kv, kv))
