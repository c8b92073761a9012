"""Generation over meshes of 8 devices, which are simulated on a CPU, and of real GPUs is that of one device, under every
policy."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, environment

SAME = """
import re, sys
import jax, numpy as np
import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.kernels.gpu import triton_call

(data, tensor, sequence), implementation = eval(sys.argv[1]), sys.argv[2]
triton_call.INTERPRET = jax.default_backend() == "cpu"
jax.config.update("jax_default_matmul_precision", "highest")
config = rj.LlamaConfig.tiny(
    **dict(num_hidden_layers=2, head_dim=16, num_attention_heads=16, num_key_value_heads=8, vocab_size=128)
    | eval(sys.argv[3])
)
params = jax.tree.map(lambda leaf: 3 * leaf, rj.init_params(config, jax.random.key(0)))
rng = np.random.default_rng(0)
prompts = [rng.integers(3, 128, 20 + 3 * row).tolist() for row in range(8)]
options = dict(max_new_tokens=9, eos_ids=(), implementation=implementation)

def made(params, policy):
    return rj.generate(params, config, prompts, policy=policy, **options)

def goes_on(params, policy):
    # a streamed answer, and one more after another turn
    state = rj.prefill(params, config, prompts, policies=policy, max_new_tokens=6, implementation=implementation)
    stream = rj.stream_after(params, config, state, policy=policy, eos_ids=(), implementation=implementation)
    pieces = [np.asarray(piece.tokens)[:, : max(piece.lengths)] for piece in stream]
    state = rj.extend(params, config, stream.state, [[5, 7]] * 8, max_new_tokens=4, implementation=implementation)
    out, _ = rj.decode(params, config, state, policy=policy, eos_ids=(), implementation=implementation)
    return np.concatenate(pieces, axis=1), np.asarray(out.tokens)

def scored(params, policy):
    tokens = np.asarray([prompt[:20] for prompt in prompts])
    return rj.score(params, config, tokens, policy=policy, context_length=12, implementation=implementation)

alone = [made(params, policy) for policy in sys.argv[4:]]
scores = scored(params, sys.argv[5])
after = goes_on(params, sys.argv[5])
with jax.set_mesh(sharding.mesh(data, 1, tensor, sequence=sequence, kv_heads=config.num_key_value_heads)) as mesh:
    params = jax.device_put(params, sharding.shardings(params, jax.sharding.get_mesh()))
    state = rj.prefill(params, config, prompts, max_new_tokens=9, implementation=implementation)
    held = state.cache.layers[0].stored_keys
    shares = 8 // data, max(1, config.num_key_value_heads // tensor), held.shape[2] // sequence
    assert held.addressable_shards[0].data.shape[:3] == shares, held.sharding
    for one, policy in zip(alone, sys.argv[4:]):
        other = made(params, policy)
        for name in one._fields:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=f"{policy} {name}")
    np.testing.assert_allclose(scored(params, sys.argv[5]), scores, atol=2e-4)
    for one, other in zip(after, goes_on(params, sys.argv[5])):
        np.testing.assert_array_equal(one, other)
"""
POLICIES = (
    *("full", "recycled:budget=8,stride=4", "recycled:budget=8,check_every=3,threshold=0.5"),
    *("lookahead:budget=8,stride=4", "streaming_llm:budget=8", "h2o:budget=8", "snapkv:budget=8"),
    *(
        "quest:budget=8,page=4,dense_layers=0",
        "top_k:budget=8",
        "lookahead:budget=8,draft=3,adapt=false,refresh_every=6",
    ),
)
FEW = ("full", "recycled:budget=8,stride=4", "lookahead:budget=8,draft=3,adapt=false")
QWEN_3 = "dict(qk_norm='head')"
TWO_HEADS, SIXTEEN_HEADS = "dict(num_key_value_heads=2)", "dict(num_key_value_heads=16)"
GEMMA = "dict(norms='both', norm_scale='one_plus', qk_norm='head', activation='gelu_tanh', tie_word_embeddings=True)"


@pytest.mark.parametrize(
    ("sizes", "implementation", "family", "policies"),  # of the axes data, tensor and sequence
    [
        ((8, 1, 1), "reference", "{}", POLICIES),
        ((1, 8, 1), "reference", "{}", POLICIES),
        ((1, 1, 8), "reference", "{}", POLICIES),
        ((2, 2, 2), "reference", "{}", POLICIES),
        ((2, 4, 1), "pallas_gpu", "{}", FEW),
        ((1, 8, 1), "pallas_gpu", QWEN_3, FEW[:2]),
        ((1, 2, 4), "pallas_gpu", "{}", FEW),
        ((1, 8, 1), "reference", TWO_HEADS, POLICIES),
        ((1, 4, 2), "pallas_gpu", TWO_HEADS, FEW),
        pytest.param((1, 8, 1), "reference", SIXTEEN_HEADS, POLICIES, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "pallas_gpu", TWO_HEADS, POLICIES, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), "pallas_gpu", GEMMA, ("full", "lookahead:budget=8,stride=4"), marks=pytest.mark.slow),
        pytest.param((8, 1, 1), "pallas_gpu", "{}", POLICIES, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), "pallas_gpu", "{}", POLICIES, marks=pytest.mark.slow),
        pytest.param((1, 1, 8), "pallas_gpu", "{}", POLICIES, marks=pytest.mark.slow),
        pytest.param((2, 4, 1), "reference", "{}", POLICIES, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing(sizes, implementation, family, policies):
    ran = subprocess.run(
        [sys.executable, "-c", SAME, str(sizes), implementation, family, *policies],
        env=environment("--xla_force_host_platform_device_count=8"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(4, 1, 1), (1, 4, 1), (1, 1, 4), (1, 2, 2)])
def test_four_gpus_change_nothing(sizes):
    if jax.device_count() < 4:
        pytest.skip(
            f"compares four GPUs with one, and here are {jax.device_count()}; 8 simulated devices run everywhere"
        )
    ran = subprocess.run(
        [sys.executable, "-c", SAME, str(sizes), "pallas_gpu", "{}", *FEW],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
