"""Logits and greedy tokens against Hugging Face's own models, on random tiny checkpoints of every supported kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax import rope
from recyc_jax.loading import pretrained

torch = pytest.importorskip("torch", reason="the reference extra (torch) is not installed")
transformers = pytest.importorskip("transformers")

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
SHAPE = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
)
VARIETIES = {
    "llama": ("Llama", {}),
    "llama2_mha_untied": ("Llama", dict(num_key_value_heads=6, rms_norm_eps=1e-5)),
    "llama_tied_theta": ("Llama", dict(tie_word_embeddings=True, rope_theta=1e5)),
    "llama31_scaled": ("Llama", dict(rope_scaling=LLAMA3 | dict(original_max_position_embeddings=32), rope_theta=5e5)),
    "llama_linear": ("Llama", dict(rope_scaling=dict(rope_type="linear", factor=4.0))),
    "llama_head_dim": ("Llama", dict(head_dim=16)),
    "qwen2": ("Qwen2", dict(rope_theta=1e6)),
    "qwen2_tied": ("Qwen2", dict(tie_word_embeddings=True)),
}


@pytest.fixture(params=VARIETIES)
def pair(request, tmp_path_factory):
    """A Hugging Face model, and the config and parameters loaded from the folder that it saves."""
    family, options = VARIETIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SHAPE | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").exists()
    ours = pretrained.read_config(folder)
    return model, ours, pretrained.load_params(folder, ours, jnp.float32)


def test_logits_equal(pair):
    """Logits agree within the original context length and far beyond it."""
    model, config, params = pair
    tokens = np.random.default_rng(0).integers(0, 99, (2, 400))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    got = np.asarray(rj.forward(params, config, jnp.asarray(tokens, jnp.int32)))
    for part in (slice(0, 30), slice(200, 400)):
        difference = np.abs(got[:, part] - expected[:, part]).max() / np.abs(expected[:, part]).max()
        assert difference < 1e-3


def test_greedy_tokens_equal(pair):
    model, config, params = pair
    prompt = np.random.default_rng(1).integers(0, 99, 50)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(prompt)[None], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, 50:]
    out = rj.generate(params, config, [prompt.tolist()], max_new_tokens=24, eos_ids=(), allow_beyond_context=True)
    assert out.tokens[0].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "scaling",
    [None, LLAMA3 | dict(original_max_position_embeddings=8192), dict(rope_type="linear", factor=4.0)],
    ids=["default", "llama3", "linear"],
)
def test_rope_angles_equal_at_long_positions(scaling):
    hf = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
    positions = np.array([[0, 1, 8191, 8192, 40000, 131071]])
    cos, sin = embedding(torch.zeros(1), torch.tensor(positions))
    config = rj.LlamaConfig.from_hf(hf.to_dict())
    ours = rope.rotation(config, jnp.asarray(positions, jnp.int32), jnp.asarray([131072], jnp.int32))
    for expected, got in zip((cos, sin), ours, strict=True):
        # at position 131071, one unit in the last place of a float32 frequency rotates a pair by 0.008
        np.testing.assert_allclose(got, expected.numpy()[..., :64], atol=0.016)


def test_a_different_model_would_be_noticed(pair):
    _, config, params = pair
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 99, (1, 30)), jnp.int32)
    shifted = jax.tree.map(lambda leaf: leaf * 1.05, params)
    before, after = (rj.forward(p, config, tokens) for p in (params, shifted))
    assert float(jnp.abs(before - after).max() / jnp.abs(before).max()) > 1e-3
