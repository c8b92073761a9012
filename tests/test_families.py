"""Every supported family against Hugging Face's own model: logits and greedy tokens of random tiny checkpoints that
transformers saves and we load, alone and in ragged batches, below and far beyond window and original context."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax import rope
from recyc_jax.families import FAMILIES
from recyc_jax.loading import export, pretrained

torch = pytest.importorskip("torch", reason="the reference extra (torch) is not installed")
transformers = pytest.importorskip("transformers")

SHAPE = dict(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.1,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=None,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1e4)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2],
    long_factor=[1.5, 4.0, 9.0],
    rope_theta=1e4,
    partial_rotary_factor=0.75,
)
PHI = dict(hidden_size=48, num_attention_heads=6, head_dim=8, original_max_position_embeddings=16)
LINEAR = dict(rope_type="linear", factor=8.0, rope_theta=1e6)
LOCAL = dict(rope_type="default", rope_theta=1e4)
VARIETIES = {
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral_window": ("Mistral", dict(sliding_window=12)),
    "mistral_head_dim": ("Mistral", dict(sliding_window=None, head_dim=16)),
    "ministral3": (
        "Ministral3",
        dict(head_dim=8, rope_parameters=YARN | dict(llama_4_scaling_beta=0.3, mscale=1.0, mscale_all_dim=1.0)),
    ),
    "mistral_llama4": (
        "Mistral",
        dict(sliding_window=None, rope_parameters=YARN | dict(llama_4_scaling_beta=0.3)),
    ),
    "qwen2_yarn": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen2_windows": ("Qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=2)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "qwen3_yarn_tied": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True, rope_parameters=YARN)),
    "smollm3": ("SmolLM3", {}),
    "smollm3_yarn": ("SmolLM3", dict(no_rope_layers=[0, 1, 1, 0], rope_parameters=YARN)),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        dict(sliding_window=10, rope_parameters=dict(full_attention=YARN, sliding_attention=LOCAL)),
    ),
    "phi3_window": ("Phi3", dict(sliding_window=11)),
    "phi4": ("Phi3", PHI | dict(num_key_value_heads=2)),
    "phi4_mini": ("Phi3", PHI | dict(rope_parameters=LONGROPE)),
    "phi3_amplitude": ("Phi3", PHI | dict(rope_parameters=LONGROPE | dict(attention_factor=1.3))),
    "gemma3": (
        "Gemma3",
        dict(
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=10,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(full_attention=LINEAR, sliding_attention=LOCAL),
        ),
    ),
    "gemma3_untied": ("Gemma3", dict(head_dim=8, tie_word_embeddings=False, sliding_window=64)),
}
SEEN = {"llama", "qwen2"}  # in test_hf_parity.py


def hf_model(name):
    family, options = VARIETIES[name]
    torch.manual_seed(0)
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**SHAPE | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().float()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or parameter.ndim == 1:  # norms other than one, as trained ones are
            torch.nn.init.normal_(parameter, mean=0.0 if family == "Gemma3" else 1.0, std=0.3)
    return model


@pytest.fixture(params=VARIETIES)
def pair(request, tmp_path_factory):
    """A Hugging Face model, and the config and parameters loaded from the folder that it saves."""
    model = hf_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    config = pretrained.read_config(folder)
    return model, config, pretrained.load_params(folder, config, jnp.float32)


def test_mistral_with_layer_types_is_a_ministral(tmp_path):
    """As transformers reads such a config: the windows are those of the layers that `layer_types` names."""
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    torch.manual_seed(0)
    model = transformers.MinistralForCausalLM(
        transformers.MinistralConfig(**SHAPE | dict(sliding_window=9, head_dim=8, layer_types=kinds))
    ).eval()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = pretrained.read_config(tmp_path)
    assert config.layer_types == tuple(kinds)
    params = pretrained.load_params(tmp_path, config, jnp.float32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24))
    read_by_transformers = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = read_by_transformers(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(rj.forward(params, config, jnp.asarray(tokens)), want, atol=2e-4)


def test_every_family_is_here():
    kinds = {transformers.AutoConfig.for_model(name).model_type for name in FAMILIES}
    here = {hf_model(name).config.model_type for name in ("mistral", "ministral3", "qwen3", "smollm3", "olmo2")}
    here |= {hf_model(name).config.model_type for name in ("olmo3", "phi4", "gemma3")}
    assert kinds == here | SEEN


def expected_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_logits_equal(pair):
    """Below the original length of 16 and the windows, and far beyond both and the context of 64."""
    model, config, params = pair
    for length in (15, 300):
        tokens = np.random.default_rng(length).integers(0, 99, (2, length))
        expected = expected_logits(model, tokens)
        got = np.asarray(rj.forward(params, config, tokens))
        assert np.abs(got - expected).max() / np.abs(expected).max() < 1e-4


@pytest.mark.parametrize("lengths", [(3, 8, 5), (70, 130, 41)], ids=["below", "beyond"])
def test_greedy_tokens_equal_alone_and_in_a_ragged_batch(pair, lengths):
    """The rows lie wholly below or wholly beyond the original length of 16, where transformers' longrope would
    otherwise change its frequencies in the middle of a text."""
    model, config, params = pair
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 99, length).tolist() for length in lengths]
    new = 7 if lengths[0] < 16 else 24
    expected = []
    for prompt in prompts:
        with torch.no_grad():
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)  # otherwise tokens with the id of padding are taken for padding
            out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    options = dict(max_new_tokens=new, eos_ids=(), allow_beyond_context=True)
    together = rj.generate(params, config, prompts, **options)
    assert together.tokens.tolist() == expected
    if lengths[0] > 16:
        alone = rj.generate(params, config, prompts[:1], **options)
        assert alone.tokens.tolist() == expected[:1]
    assert together.full_steps.shape == (3, len(config.full_layers))
    assert (np.asarray(together.full_steps) == new - 1).all()


@pytest.mark.slow
def test_scores_under_full_attention_are_those_of_forward(pair):
    model, config, params = pair
    tokens = np.random.default_rng(2).integers(0, 99, (2, 60))
    expected = jax.nn.log_softmax(jnp.asarray(expected_logits(model, tokens)))
    expected = np.take_along_axis(np.asarray(expected)[:, 29:-1], tokens[:, 30:, None], axis=2)[..., 0]
    got = rj.score(params, config, tokens, policy="recycled:budget=1000,stride=3", context_length=30)
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_a_saved_folder_is_read_by_transformers(pair, tmp_path):
    model, config, params = pair
    model.save_pretrained(tmp_path / "source")
    export.save_pretrained(tmp_path / "ours", params, config, tmp_path / "source", np.float32)
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    tokens = np.random.default_rng(3).integers(0, 99, (1, 20))
    np.testing.assert_array_equal(expected_logits(again, tokens), expected_logits(model, tokens))


@pytest.mark.slow
def test_a_different_model_would_be_noticed(pair):
    """Each field that is not Llama's changes the logits by far more than the tolerance."""
    _, config, params = pair
    llama = rj.LlamaConfig.tiny()
    tokens = np.random.default_rng(0).integers(0, 99, (1, 50))
    expected = np.asarray(rj.forward(params, config, tokens))
    for name in ("rope_scaling", "layers_without_rope", "norm_scale", "activation", "embedding_multiplier"):
        if getattr(config, name) == getattr(llama, name):
            continue
        other = dataclasses.replace(config, **{name: getattr(llama, name)})
        if config.norm_scale == "float32" and name == "norm_scale":
            continue  # differs from "rounded" in 16-bit dtypes alone
        got = np.asarray(rj.forward(params, other, tokens))
        assert np.abs(got - expected).max() / np.abs(expected).max() > 1e-3, name


ROPES = {
    "default": {},
    "linear": dict(rope_type="linear", factor=4.0),
    "dynamic": dict(rope_type="dynamic", factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
    "yarn_no_factor": dict(rope_type="yarn", factor=None, original_max_position_embeddings=32768),
    "yarn_untruncated": dict(
        rope_type="yarn", factor=16.0, original_max_position_embeddings=4096, truncate=False, beta_fast=20, beta_slow=2
    ),
    "yarn_mscale": dict(
        rope_type="yarn", factor=16.0, original_max_position_embeddings=16384, mscale=1.0, mscale_all_dim=0.5
    ),
    "yarn_attention_factor": dict(
        rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, attention_factor=0.7
    ),
    "longrope": dict(
        rope_type="longrope",
        original_max_position_embeddings=4096,
        short_factor=np.linspace(1, 1.5, 64).tolist(),
        long_factor=np.geomspace(1, 60, 64).tolist(),
    ),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "proportional": dict(rope_type="proportional", partial_rotary_factor=0.25),
    "proportional_factor": dict(rope_type="proportional", partial_rotary_factor=0.5, factor=2.0),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("last", [1000, 8191, 60000, 131071, 200000])
def test_rope_angles_equal(kind, last):
    """Up to a position, which is the length of the row, and at positions before it."""
    hf = transformers.LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        rope_parameters=dict(rope_theta=5e5) | ROPES[kind],
        max_position_embeddings=131072,
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf)
    positions = np.array([[0, 1, last // 2, last]])
    cos, sin = embedding(torch.zeros(1), torch.tensor(positions))
    config = rj.LlamaConfig.from_hf(hf.to_dict())
    ours = rope.rotation(config, jnp.asarray(positions, jnp.int32), jnp.asarray([last + 1], jnp.int32))
    for expected, got in zip((cos, sin), ours, strict=True):
        # one unit in the last place of a float32 frequency rotates a pair by up to position * 6e-8
        np.testing.assert_allclose(got, expected.numpy()[..., :64], atol=max(1e-4, last * 1.2e-7))


def test_rows_choose_their_frequencies_alone():
    """A short row of a batch keeps the short factors beside a long row, and a row's length is known from the start: the
    new tokens count."""
    model = hf_model("phi4_mini")
    config = rj.LlamaConfig.from_hf(model.config.to_dict())
    lengths = jnp.asarray([16, 17], jnp.int32)
    short, long = rope.frequencies(config, lengths)[:, 0]
    np.testing.assert_allclose(short * np.array(LONGROPE["short_factor"]), long * np.array(LONGROPE["long_factor"]))
    assert (np.asarray(short) > np.asarray(long)).all()
