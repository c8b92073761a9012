"""Compiled programs: no decode step copies a cache, and prefill's memory is not quadratic in the prompt's length."""

import re

import jax
import jax.numpy as jnp
import pytest

import recyc_jax as rj
from recyc_jax.decoding import Call, decode_tokens
from recyc_jax.prefilling import read_prompts

POLICIES = {
    "full": rj.FullAttention(),
    "recycled": rj.RecycledAttention(budget=16, schedule=rj.FixedStride(5)),
    "dynamic": rj.RecycledAttention(budget=16, schedule=rj.QuerySimilarity(5, 0.5)),
    "no_eviction": rj.RecycledAttention(budget=16, schedule=rj.FixedStride(5), evict=False),
    "snapkv": rj.SnapKV(budget=16),
    "h2o": rj.H2O(budget=16, full_stride=5),
    "streaming_llm": rj.StreamingLLM(budget=16, full_stride=5),
    "recycled_whole": rj.RecycledAttention(budget=10_000, schedule=rj.FixedStride(5)),
}


@pytest.mark.parametrize("goes_on", [False, True], ids=["static", "goes_on"])
@pytest.mark.parametrize("name", POLICIES)
def test_no_cache_shaped_copy(params, config, name, goes_on):
    """In a program with a fixed number of steps, and in one for any number of them that goes on in an answer."""
    state = rj.prefill(params, config, [[1] * 240] * 2, policies=(POLICIES[name],), max_new_tokens=33)
    call, more = Call(config, POLICIES[name], 33), ()
    if goes_on:
        _, state = rj.decode(params, config, state, policy=POLICIES[name], max_new_tokens=1, rewind=False)
        call = Call(config, POLICIES[name], 33, bound=state.cache.capacity, rewind=False)
        more = (None, rj.Greedy(), jnp.int32(17))
    cache = state.cache.layers[0].keys
    compiled = decode_tokens.lower(params, state, call, *more).compile()
    shape = ",".join(map(str, cache.shape))
    copies = [line for line in compiled.as_text().splitlines() if re.search(rf"\[{shape}\]\S* copy\(", line)]
    assert not copies
    # caches are donated and updated in place, so temporaries take less than one layer's cache and its gathered part
    gathered = min(getattr(POLICIES[name], "budget", 0) / cache.shape[2], 1)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * cache.nbytes * (1 + gathered)


def test_a_copy_would_be_seen():
    """Check of the check: a `lax.cond` that takes and returns the cache copies it."""

    def loop(cache):
        def step(cache, at):
            after = jax.lax.cond(at % 5 == 0, lambda c: c.at[:, :, at].set(1.0), lambda c: c, cache)
            return after, jnp.sum(cache[:, :, at] * after[:, :, at - 1])

        return jax.lax.scan(step, cache, jnp.arange(33))

    shape = jax.ShapeDtypeStruct((2, 2, 272, 8), jnp.float32)
    text = jax.jit(loop, donate_argnums=0).lower(shape).compile().as_text()
    assert re.search(r"\[2,2,272,8\]\S* copy\(", text)


def test_prefill_of_128k_tokens_needs_no_square():
    """The program for Llama-3.1-8B's attention shape is compiled, but not run."""
    config = rj.LlamaConfig.tiny(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
    )
    # float32, because XLA for CPU may convert a whole bfloat16 cache to float32, which no accelerator does
    params = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0)))

    def temp(length, needs):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
        lowered = read_prompts.lower(params, tokens, lengths, config, 64, needs, None)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    dynamic = rj.RecycledAttention(16, rj.QuerySimilarity(5, 0.5)).needs
    short, long = (temp(length, dynamic) for length in (32768, 131072))
    row = 4 * config.num_attention_heads * 131072  # bytes of the logits of one query, linear in T like the cache
    assert long < short + 3 * row
    assert long < 131072**2 / 32  # bytes: a 32nd of one head's T x T numbers of one byte
    # SnapKV's window takes one query at a time; accumulated attention takes twice the size of its result
    assert temp(131072, dynamic | rj.SnapKV(16, window=32).needs | rj.H2O(16).needs) < long + 10 * row
