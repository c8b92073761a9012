"""On a real GPU: the kernels give the scores of plain JAX on families other than Llama, at their heads' real sizes."""

import jax
import numpy as np
import pytest
from family_shapes import GEMMA_3, OLMO, windows

import recyc_jax as rj
from recyc_jax import implementations

pytestmark = pytest.mark.gpu

SHAPE = dict(hidden_size=512, intermediate_size=768, num_hidden_layers=3, max_position_embeddings=8192)
FAMILIES = {
    "qwen3": dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, qk_norm="head"),
    "gemma3": GEMMA_3
    | windows(512, "sfs")
    | dict(
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        embedding_multiplier=512**0.5,
        query_pre_attn_scalar=168.0,
    ),
    "olmo3": OLMO
    | windows(256, "ssf")
    | dict(
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=rj.RopeScaling("yarn", 8.0, original_max_position_embeddings=1024),
        sliding_rope_theta=500000.0,
    ),
    "phi4_mini": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=128, partial_rotary_factor=0.75),
    "ministral3": dict(
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        rope_scaling=rj.RopeScaling(
            "yarn", 16.0, original_max_position_embeddings=256, attention_factor=1.0, llama_4_scaling_beta=0.1
        ),
    ),
    "smollm3": dict(num_attention_heads=16, num_key_value_heads=4, head_dim=128, layers_without_rope=(1,)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_score_as_plain_jax(family, dtype):
    config = rj.LlamaConfig.tiny(**SHAPE | FAMILIES[family])
    shapes = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0)))
    rng, mean = np.random.default_rng(0), 0.0 if config.norm_scale == "one_plus" else 1.0

    def leaf(shape):
        drawn = rng.standard_normal(shape, np.float32)
        return drawn * 2 / np.sqrt(shape[0]) if len(shape) > 1 else mean + 0.2 * drawn

    exact = jax.tree.map(lambda one: leaf(one.shape), shapes)
    params = jax.tree.map(lambda one: jax.numpy.asarray(one, dtype), exact)
    assert implementations.resolve("pallas_gpu").decoder_layers(config, 2, dtype) is not None
    tokens = rng.integers(0, config.vocab_size, (2, 1500))
    options = dict(policy="recycled:budget=256,stride=8", context_length=1450)
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(
            rj.score(jax.tree.map(jax.numpy.asarray, exact), config, tokens, implementation="reference", **options)
        )
        plain = np.asarray(rj.score(params, config, tokens, implementation="reference", **options))
    got = np.asarray(rj.score(params, config, tokens, implementation="pallas_gpu", **options))
    if dtype == "float32":
        np.testing.assert_allclose(got, wanted, atol=2e-3)
    else:  # as near to float32 as plain JAX in bfloat16
        errors = [float(np.abs(one - wanted).mean()) for one in (got, plain)]
        print(family, "mean error in nats:", *(f"{error:.4f}" for error in errors))
        assert errors[0] < 1.5 * errors[1] + 0.01
