"""Model configs: which fields are read, and which values are refused by name."""

import pytest

import recyc_jax as rj

HF = dict(
    model_type="llama",
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    eos_token_id=[2, 7],
)


def test_defaults_follow_hugging_face():
    config = rj.LlamaConfig.from_hf({name: value for name, value in HF.items() if name != "num_key_value_heads"})
    assert config.num_key_value_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10000.0
    assert not config.tie_word_embeddings
    assert config.eos_token_ids == (2, 7)
    assert not config.qkv_bias
    assert rj.LlamaConfig.from_hf(HF | dict(model_type="qwen2")).qkv_bias


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="yarn", factor=4.0), "kind='yarn' is not supported; linear and llama3 are"),
        (dict(kind="dynamic", factor=4.0), "kind='dynamic' is not supported"),
        (dict(kind="linear", factor=0.0), "factor=0 must lie in"),
        (dict(kind="linear", factor=float("nan")), "factor=nan must lie in"),
        (dict(kind="llama3", factor=8.0, low_freq_factor=4.0), "low_freq_factor=4 must be below high_freq_factor=4"),
        (dict(kind="llama3", factor=8.0, original_max_position_embeddings=0), "must be at least 1"),
    ],
    ids=str,
)
def test_a_scaling_that_is_not_computed_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.RopeScaling(**fields)


def test_of_both_rope_fields_the_older_counts_as_in_transformers():
    both = HF | dict(rope_parameters=dict(rope_type="default", rope_theta=5.0), rope_theta=7.0)
    config = rj.LlamaConfig.from_hf(both | dict(rope_scaling=dict(type="linear", factor=2.0)))
    assert (config.rope_theta, config.rope_scaling) == (7.0, rj.RopeScaling("linear", 2.0))


def test_old_and_new_rope_fields_agree():
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    old = HF | dict(rope_theta=5e5, rope_scaling=scaling | dict(rope_type="llama3"))
    older = HF | dict(rope_theta=5e5, rope_scaling=scaling | dict(type="llama3"))
    new = HF | dict(rope_parameters=scaling | dict(rope_type="llama3", rope_theta=5e5))
    assert rj.LlamaConfig.from_hf(old) == rj.LlamaConfig.from_hf(new) == rj.LlamaConfig.from_hf(older)
    assert rj.LlamaConfig.from_hf(new).rope_theta == 5e5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("attention_bias", True),
        ("quantization_config", {"bits": 4}),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("vocab_size", 0),
        ("vocab_size", "many"),
        ("num_attention_heads", 0),
        ("hidden_size", 66),
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("eos_token_id", [2, None]),
        ("eos_token_id", "two"),
        ("eos_token_id", -1),
        ("layer_types", 3),
        ("layer_types", [["full_attention"]]),
        ("rope_scaling", ["yarn"]),
        ("rope_scaling", {"rope_type": ["llama3"]}),
        ("factor", {"rope_scaling": {"rope_type": "linear", "factor": "two"}}),
        ("rope_theta", float("nan")),
        ("rope_theta", 10**400),
        ("rms_norm_eps", "1e-5"),
        ("tie_word_embeddings", "false"),
        ("vocab_size", True),
        ("vocab_size", 10**30),
        ("num_hidden_layers", 10**6),
    ],
)
def test_what_is_not_supported_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        rj.LlamaConfig.from_hf(HF | (value if field == "factor" else {field: value}))


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_field_is_named(field):
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        rj.LlamaConfig.from_hf(HF | {field: None})
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        rj.LlamaConfig.from_hf({name: value for name, value in HF.items() if name != field})
