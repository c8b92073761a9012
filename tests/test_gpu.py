"""On a real GPU, at Llama-3.1-8B's attention shape in bfloat16: steps update the cache in place, and partial steps are
faster."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax.decoding import Call, decode_tokens

pytestmark = pytest.mark.gpu

CONFIG = rj.LlamaConfig.tiny(
    hidden_size=512,
    intermediate_size=512,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_hidden_layers=4,
    max_position_embeddings=131072,
)
RECYCLED = rj.RecycledAttention(budget=4096, schedule=rj.FixedStride(50))


@pytest.fixture(scope="module")
def params():
    return rj.init_params(CONFIG, jax.random.key(0), jnp.bfloat16)


def test_a_prompt_of_128k_tokens(params):
    """The prompt is prefilled in chunks; decoding copies no cache, and recycled steps take less than half the time."""
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (1, 131072 - 101)).astype(np.int32)
    state = rj.prefill(params, CONFIG, prompt, policies=(RECYCLED,), max_new_tokens=102)
    assert np.isfinite(np.asarray(state.logits)).all()
    seconds = {}
    for policy in (rj.FullAttention(), RECYCLED):
        lowered = decode_tokens.lower(params, state, Call(CONFIG, policy, 102))
        compiled = lowered.compile()
        shape = ",".join(map(str, state.cache.layers[0].keys.shape))
        assert not re.findall(rf"\[{shape}\]\S* copy\(", compiled.as_text())
        assert compiled.memory_analysis().temp_size_in_bytes < 2 * state.cache.layers[0].keys.nbytes
        for _ in range(2):  # the first run warms up
            began = time.perf_counter()
            out, state = rj.decode(params, CONFIG, state, policy=policy, eos_ids=())
            out.tokens.block_until_ready()
            seconds[policy] = (time.perf_counter() - began) / 101
    print({type(policy).__name__: f"{1e3 * step:.2f} ms a step" for policy, step in seconds.items()})
    assert out.full_steps.tolist() == [[2] * 4]
    assert seconds[RECYCLED] < 0.5 * seconds[rj.FullAttention()]
