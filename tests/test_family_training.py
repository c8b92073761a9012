"""Training on families other than Llama: the pass over whole sequences equals `score`, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_shapes import GEMMA_3, OLMO, windows

import recyc_jax as rj
from recyc_jax import training_implementations
from recyc_jax.attention import whole_sequence
from train import forward

SHAPES = {
    "gemma3": GEMMA_3 | windows(7, "ssf") | dict(embedding_multiplier=5.0),
    "smollm3": dict(layers_without_rope=(1,)),
    "olmo3": OLMO
    | windows(5, "sfs")
    | dict(rope_scaling=rj.RopeScaling("yarn", 4.0, original_max_position_embeddings=16), sliding_rope_theta=10000.0),
    "mistral": windows(6, "sss"),
    "phi4_mini": dict(
        partial_rotary_factor=0.75,
        rope_scaling=rj.RopeScaling(
            "longrope", 4.0, original_max_position_embeddings=16, short_factor=(1.0,) * 3, long_factor=(2.0, 4.0, 8.0)
        ),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("stride", [None, 4])
def test_training_is_score_token_by_token(name, stride):
    config = rj.LlamaConfig.tiny(num_hidden_layers=3, **SHAPES[name])
    params = jax.tree.map(lambda leaf: leaf * (6 if leaf.ndim > 1 else 1), rj.init_params(config, jax.random.key(1)))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 41))
    first, recycle, policy = 20, None, "full"
    if stride:
        recycle = whole_sequence.Recycle(prefix=first, stride=stride, budget=6, evict=True)
        policy = f"recycled:budget=6,stride={stride}"

    def losses(stacked):
        return forward.token_losses(
            stacked,
            config,
            jnp.asarray(tokens, jnp.int32),
            None,
            training_implementations.attention("reference", recycle),
            sliding_attention=training_implementations.sliding("reference", config.sliding_window),
        )

    stacked = forward.stack_layers(params, 3)
    expected = rj.score(params, config, tokens, policy=policy, context_length=first)
    np.testing.assert_allclose(-jax.jit(losses)(stacked)[:, first - 1 :], expected, atol=1e-4)
    grads = jax.jit(jax.grad(lambda stacked: losses(stacked).sum()))(stacked)
    assert all(bool(jnp.isfinite(leaf).all()) and float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_documents_of_a_packed_row_stay_apart_in_layers_with_a_window():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 12, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    segments = jnp.asarray([[0] * 5 + [1] * 7], jnp.int32)
    whole = whole_sequence.causal(q, k, v, segments, window=4)
    for part in (slice(0, 5), slice(5, 12)):
        alone = whole_sequence.causal(q[:, part], k[:, part], v[:, part], window=4)
        np.testing.assert_allclose(whole[:, part], alone, atol=1e-6)
