"""GGUF files of each architecture: the model of transformers that the file was made from, and the refusals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_shapes import GEMMA_3, OLMO, windows
from gguf_files import metadata as common
from gguf_files import refused, tensors, write, write_file

import recyc_jax as rj
from recyc_jax.loading import gguf_metadata

WIDE = dict(vocab_size=400, num_hidden_layers=4, rms_norm_eps=1e-5, rope_theta=1e6, eos_token_ids=(0,))
YARN = rj.RopeScaling("yarn", 4.0, original_max_position_embeddings=128)
GEMMA = (
    GEMMA_3
    | windows(6, "ssss")
    | dict(
        embedding_multiplier=32**0.5,
        query_pre_attn_scalar=8.0,
        tie_word_embeddings=True,
        sliding_rope_theta=10000.0,
        rope_scaling=rj.RopeScaling("linear", 8.0),
    )
)
OLMO_3 = OLMO | windows(9, "sssf") | dict(sliding_rope_theta=1e6, rope_scaling=YARN)
PHI = dict(fused_projections=True, partial_rotary_factor=0.75)
LONGROPE = rj.RopeScaling(
    "longrope",
    4.0,
    original_max_position_embeddings=128,
    attention_factor=1.25,
    short_factor=(1.0, 1.5, 2.0),
    long_factor=(1.0, 4.0, 9.0),
)
MINISTRAL = rj.RopeScaling("yarn", 16.0, original_max_position_embeddings=32, llama_4_scaling_beta=0.125)
SCALED = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
FILES = {  # arch, config, further keys, further tensors
    "qwen3": ("qwen3", dict(qk_norm="head", head_dim=16), {"attention.value_length": 16}, {}),
    "qwen3_yarn": ("qwen3", dict(qk_norm="head", head_dim=8, rope_scaling=YARN), SCALED, {}),
    "qwen2_yarn": ("qwen2", dict(qkv_bias=True, rope_scaling=YARN), SCALED | {"rope.scaling.yarn_ext_factor": 1.0}, {}),
    "smollm3": ("smollm3", dict(layers_without_rope=(3,), tie_word_embeddings=True), {"rope.dimension_count": 8}, {}),
    "mistral3": (
        "mistral3",
        dict(rope_scaling=MINISTRAL),
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.125,
        },
        {},
    ),
    "olmo2": ("olmo2", OLMO, {}, {}),
    "olmo3": ("olmo2", OLMO_3, SCALED | {"attention.sliding_window": 9, "rope.scaling.attn_factor": 1.138629436}, {}),
    "olmo3_pattern": (
        "olmo2",
        OLMO_3,
        SCALED | {"attention.sliding_window": 9, "attention.sliding_window_pattern": [True] * 3 + [False]},
        {},
    ),
    "phi4": (
        "phi3",
        PHI | dict(partial_rotary_factor=1.0),
        {"rope.dimension_count": 8, "attention.sliding_window": 0},
        {},
    ),
    "phi3_window": (
        "phi3",
        PHI | dict(partial_rotary_factor=1.0, sliding_window=17, layer_types=("sliding_attention",) * 4),
        {"attention.sliding_window": 17},
        {},
    ),
    "phi4_mini": (
        "phi3",
        PHI | dict(rope_scaling=LONGROPE),
        {
            "rope.dimension_count": 6,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.attn_factor": 1.25,
        },
        {f"rope_factors_{name}.weight": getattr(LONGROPE, f"{name}_factor") for name in ("short", "long")},
    ),
    "gemma3": (
        "gemma3",
        GEMMA,
        {
            "attention.sliding_window": 6,
            "attention.key_length": 8,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "gemma3_full_first": (
        "gemma3",
        GEMMA | dict(layer_types=("full_attention", "sliding_attention") * 2),
        {
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": [False, True] * 2,
            "attention.key_length": 8,
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
    "gemma3_pattern": (
        "gemma3",
        GEMMA | dict(layer_types=("sliding_attention", "full_attention") * 2, sliding_rope_theta=500.0),
        {
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": 2,
            "attention.key_length": 8,
            "rope.freq_base_swa": 500.0,
            "rope.scaling.factor": 8.0,
        },
        {},
    ),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))


def made(name):
    arch, options, fields, more = FILES[name]
    config = rj.LlamaConfig.tiny(**WIDE | options)
    drawn = jax.random.normal(jax.random.key(9), (32 * 96,))

    def other_than_one(leaf):  # exact in half precision, also with Gemma's one added
        return leaf if leaf.ndim > 1 else leaf + jnp.round(drawn[: leaf.size] * 64) / 1024

    params = jax.tree.map(other_than_one, rj.init_params(config, jax.random.key(4)))
    extra = {f"{arch}.{key}": value for key, value in fields.items()}
    return arch, params, config, extra, {key: np.asarray(value, np.float32) for key, value in more.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_back_the_model(tmp_path, name):
    arch, params, config, extra, more = made(name)
    write(tmp_path / "m.gguf", params, config, arch=arch, extra=extra, more=more)
    lm = rj.load_pretrained(str(tmp_path / "m.gguf"), dtype=jnp.float32)
    got, wanted = lm.config, config
    if wanted.rope_scaling is not None and wanted.rope_scaling.kind == "yarn":  # the amplitude may be stated
        assert got.rope_scaling.amplitude == pytest.approx(1.0 if name == "mistral3" else wanted.rope_scaling.amplitude)
        got, wanted = (rj.LlamaConfig(**vars(one) | dict(rope_scaling=None)) for one in (got, wanted))
        assert lm.config.rope_scaling.factor == config.rope_scaling.factor
        assert lm.config.rope_scaling.llama_4_scaling_beta == config.rope_scaling.llama_4_scaling_beta
    assert got == wanted
    chex.assert_trees_all_equal(lm.params, params)


def test_every_architecture_is_here():
    assert {arch for arch, *_ in FILES.values()} | {"llama"} == set(gguf_metadata.ARCHITECTURES)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("qwen3_yarn", {"rope.scaling.attn_factor": 0.7}, r"attn_factor=0\.7"),
        ("qwen3_yarn", {"rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor=0\.5"),
        ("qwen3", {"rope.scaling.yarn_beta_fast": 32.0}, r"yarn_beta_fast=32\.0 is not supported without YaRN"),
        ("qwen3", {"attention.sliding_window": 9}, r"sliding_window=9 is below"),
        ("qwen3", {"attention.temperature_scale": 0.1}, "temperature_scale=.* it asks for another attention"),
        ("mistral3", {"attention.temperature_length": 64}, "temperature_length=64 differs"),
        ("olmo3", {"rope.freq_base_swa": 5.0}, r"freq_base_swa=5\.0 differs"),
        ("olmo3", {"attention.sliding_window_pattern": [True]}, "for each of 4 layers"),
        ("gemma3", {"attention.scale": 0.5}, r"attention\.scale=0\.5"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "capped logits"),
        ("phi4_mini", {"rope.dimension_count": 4}, "short_factor has 3 numbers for 2 rotated pairs"),
        ("phi4", {"rope.scaling.attn_factor": 1.5}, r"attn_factor=1\.5 is not supported without"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(tmp_path, name, fields, message):
    arch, params, config, extra, more = made(name)
    extra |= {f"{arch}.{key}": value for key, value in fields.items()}
    refused(write(tmp_path / "m.gguf", params, config, arch=arch, extra=extra, more=more), rf"m\.gguf: .*{message}")


def test_the_largest_gemma_is_known_by_its_layers(tmp_path):
    """As in llama.cpp: no key states that its queries are scaled by the width of a head of the hidden size."""
    shape = GEMMA | dict(num_hidden_layers=62, layer_types=(("sliding_attention",) * 5 + ("full_attention",)) * 11)
    shape["layer_types"] = shape["layer_types"][:62]
    config = rj.LlamaConfig.tiny(**WIDE | shape | dict(head_dim=4, num_key_value_heads=1, hidden_size=32))
    params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, np.float32),
        jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0))),
    )
    extra = {"gemma3.attention.sliding_window": 6, "gemma3.attention.key_length": 4, "gemma3.rope.scaling.factor": 8.0}
    write_file(tmp_path / "m.gguf", common(config, "gemma3") | extra, tensors(params, config, "gemma3"), arch="gemma3")
    assert rj.load_pretrained(str(tmp_path / "m.gguf")).config.query_pre_attn_scalar == 32 / 4
