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


IN_AN_OBJECT = ("factor", "truncate", "short_factor", "long_factor")


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
        (dict(kind="ntk", factor=4.0), "kind='ntk' is not supported; linear, dynamic, yarn, longrope, llama3, prop"),
        (dict(kind="yarn", factor=4.0, beta_slow=64.0), "beta_slow=64 must not exceed beta_fast=32"),
        (dict(kind="yarn", factor=4.0, attention_factor=float("inf")), "attention_factor=inf must lie in"),
        (dict(kind="longrope", long_factor=(1.0, 0.0)), "long_factor=0 must lie in"),
        (dict(kind="yarn", llama_4_scaling_beta=-1.0), "llama_4_scaling_beta=-1 must lie in"),
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
        ("model_type", "mixtral"),
        ("model_type", ["llama"]),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("attention_bias", True),
        ("quantization_config", {"bits": 4}),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"rope_type": "ntk", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "alpha": 1.0}),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 2, 4]}),
        ("truncate", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}),
        ("short_factor", {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0] * 8}}),
        (
            "long_factor",
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
        ),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("use_bidirectional_attention", True),
        ("residual_multiplier", 0.22),
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
        ("layer_types", 0),
        ("layer_types", {}),
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
        ("num_hidden_layers", 2**40),
    ],
)
def test_what_is_not_supported_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        rj.LlamaConfig.from_hf(HF | (value if field in IN_AN_OBJECT else {field: value}))


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_field_is_named(field):
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        rj.LlamaConfig.from_hf(HF | {field: None})
    with pytest.raises(ValueError, match=f"lacks the field '{field}'"):
        rj.LlamaConfig.from_hf({name: value for name, value in HF.items() if name != field})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(layer_types=("full_attention",)), "layer_types=.* for each of 2 layers"),
        (dict(layer_types=("full_attention", "linear_attention"), sliding_window=4), "layer_types"),
        (dict(sliding_window=4), "sliding_window=4 does not go with layer_types"),
        (dict(layer_types=("sliding_attention",) * 2), "sliding_window=None does not go with"),
        (dict(layers_without_rope=(2,)), "must be layers 0 to 1"),
        (dict(partial_rotary_factor=0.4), "rotates 3 of 8 dimensions"),
        (dict(partial_rotary_factor=0.1), "rotates 0 of 8 dimensions"),
        (dict(qk_norm="heads"), "qk_norm='heads' is not supported; .None, 'head', 'projection'. are"),
        (dict(norms="none"), "norms='none' is not supported"),
        (dict(norm_scale="plus"), "norm_scale='plus' is not supported"),
        (dict(activation="relu"), "activation='relu' is not supported"),
        (dict(query_pre_attn_scalar=0.0), "query_pre_attn_scalar=0 must lie in"),
        (dict(rope_scaling=rj.RopeScaling("longrope", short_factor=(1.0,), long_factor=(1.0,))), "short_factor has 1"),
    ],
    ids=str,
)
def test_a_shape_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.LlamaConfig.tiny(**fields)


GEMMA_ACT = {"gemma3_text": dict(hidden_activation="gelu_pytorch_tanh")}
FAMILY = HF | dict(num_hidden_layers=4, sliding_window=32)


@pytest.mark.parametrize(
    ("fields", "full_layers"),
    [
        (dict(model_type="mistral"), ()),
        (dict(model_type="mistral", sliding_window=None), (0, 1, 2, 3)),
        (dict(model_type="mistral", sliding_window=256), (0, 1, 2, 3)),  # the whole context
        (dict(model_type="phi3"), ()),
        (dict(model_type="qwen3"), (0, 1, 2, 3)),
        (dict(model_type="qwen3", use_sliding_window=True, max_window_layers=3), (0, 1, 2)),
        (dict(model_type="qwen2", use_sliding_window=True, max_window_layers=9), (0, 1, 2, 3)),
        (dict(model_type="olmo3"), (3,)),
        (dict(model_type="olmo3", layer_types=["full_attention"] + ["sliding_attention"] * 3), (0,)),
        (dict(model_type="gemma3_text", sliding_window_pattern=2), (1, 3)),
        (dict(model_type="gemma3_text"), ()),
        (dict(model_type="smollm3", use_sliding_window=True), (0, 1, 2)),
        (dict(model_type="smollm3"), (0, 1, 2, 3)),
    ],
    ids=str,
)
def test_the_layers_with_full_attention(fields, full_layers):
    assert rj.LlamaConfig.from_hf(FAMILY | GEMMA_ACT.get(fields["model_type"], {}) | fields).full_layers == full_layers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model_type="llama", use_sliding_window=True), "use_sliding_window"),
        (dict(model_type="qwen3", layer_types=["sliding_attention"] * 4), "layer_types"),
        (dict(model_type="olmo3", layer_types=["full_attention"] * 3), "for each of 4 layers"),
        (dict(model_type="gemma3_text", hidden_activation="gelu"), "hidden_activation='gelu'"),
        (dict(model_type="qwen3", attention_bias=True), "attention_bias"),
        (dict(model_type="smollm3", no_rope_layers=[1, 0, 2, 1]), "no_rope_layers"),
        (dict(model_type="smollm3", no_rope_layers=[1, 0]), "no_rope_layers"),
        (dict(model_type="qwen3", partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(model_type="gemma3"), "text_config=None"),
        (dict(model_type="gemma3_text", sliding_window=None) | GEMMA_ACT["gemma3_text"], "sliding_window is null"),
        (dict(model_type="phi3", rope_scaling=dict(rope_type="linear", factor=2.0)), "rope_type='linear' is not"),
        (dict(model_type="olmo3", rope_parameters=[1]), "rope_parameters=.1. must be an object"),
        (dict(model_type="gemma3", text_config=dict(num_hidden_layers="6")), "num_hidden_layers='6'"),
        (
            dict(model_type="olmo3", rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))),
            "slid",
        ),
        (dict(model_type="mistral", rope_parameters=dict(full_attention=dict(rope_type="default"))), "by layer type"),
    ],
    ids=str,
)
def test_what_a_family_does_not_have_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        rj.LlamaConfig.from_hf(FAMILY | fields)


def test_thetas_of_both_kinds_of_layers():
    """As transformers has them: nested, merged with `rope_scaling` beside them, and in old configs."""
    nested = dict(full_attention=dict(rope_theta=5e4), sliding_attention=dict(rope_theta=2e4))
    scaling = dict(rope_type="linear", factor=8.0)
    for family, old in (("gemma3_text", 1e4), ("olmo3", 5e5)):
        hf = FAMILY | GEMMA_ACT.get(family, {}) | dict(model_type=family, num_hidden_layers=6)
        both = rj.LlamaConfig.from_hf(hf | dict(rope_parameters=nested, rope_scaling=scaling))
        assert (both.rope_theta, both.sliding_rope_theta) == (5e4, 2e4)
        assert both.rope_scaling == rj.RopeScaling("linear", 8.0)
        alone = rj.LlamaConfig.from_hf(hf | dict(rope_theta=7e3))
        assert (alone.rope_theta, alone.sliding_rope_theta) == (7e3, old)
