"""What the keys of a GGUF file ask for: each is used, known to be irrelevant, or refused by name."""

import re

import numpy as np
import pytest
from gguf_files import converted, model, refused, write

import recyc_jax as rj
from recyc_jax import rope
from recyc_jax.loading import gguf_convert


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path, factor):
    params, config = model(head_dim=64, rope_theta=5e5)
    scaled = rj.LlamaConfig(**vars(config) | dict(rope_scaling=rj.RopeScaling("llama3", factor)))
    divisors = (rope.inverse_frequencies(config) / rope.inverse_frequencies(scaled)).astype(np.float32)
    original = {"llama.rope.scaling.original_context_length": 8192}
    file = write(tmp_path / "m.gguf", params, config, more={"rope_freqs.weight": divisors}, extra=original)
    assert rj.load_pretrained(str(file)).config == scaled
    for odd, fields, message in [
        (divisors * 2, {}, r"odd\.gguf: rope_freqs\.weight is not"),
        (divisors[:7], {}, r"rope_freqs\.weight has 7 entries"),
        (divisors, {"llama.rope.scaling.factor": 4.0}, "both scale RoPE"),
        (divisors, {"llama.rope.scaling.original_context_length": 1024}, "original_context_length=1024"),
    ]:
        write(tmp_path / "odd.gguf", params, config, more={"rope_freqs.weight": odd}, extra=fields)
        with pytest.raises(ValueError, match=message):
            gguf_convert.cached_folder(tmp_path / "odd.gguf")


def test_what_is_not_supported_is_named(tmp_path):
    params, config = model()
    write(tmp_path / "m.gguf", params, config, arch="gemma")
    refused(tmp_path / "m.gguf", r"m\.gguf: general\.architecture='gemma' is not supported")


SCALING = "llama.rope.scaling."


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({SCALING + "type": "linear", SCALING + "factor": 4.0}, dict(rope_type="linear", factor=4.0)),
        ({SCALING + "factor": 2.5, SCALING + "finetuned": True}, dict(rope_type="linear", factor=2.5)),
        ({"llama.rope.scale_linear": 8.0}, dict(rope_type="linear", factor=8.0)),
        ({"llama.rope.scale_linear": 8.0, SCALING + "factor": 8.0}, dict(rope_type="linear", factor=8.0)),
        (
            {SCALING + "type": "linear", SCALING + "factor": 1.1, SCALING + "original_context_length": 1024},
            dict(rope_type="linear", factor=1.1),
        ),
        ({SCALING + "type": "none"}, None),
        ({SCALING + "type": "none", SCALING + "factor": 1.0, SCALING + "attn_factor": 1.0}, None),
        ({SCALING + "type": "linear", SCALING + "factor": 1.0}, None),
        ({SCALING + "finetuned": False, SCALING + "original_context_length": 131072}, None),
    ],
    ids=str,
)
def test_rope_scaling(tmp_path, fields, expected):
    fields |= {"llama.context_length": 131072}
    assert converted(tmp_path, **fields).get("rope_scaling") == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "model"),
        ("general.name", "any"),
        ("general.quantization_version", 2),
        ("general.tags", ["one", "two"]),
        ("quantize.imatrix.chunks_count", 3),
        ("llama.rope.dimension_count", 8),
        ("llama.attention.key_length", 8),
        ("llama.attention.value_length", 8),
        ("llama.attention.head_count", [4, 4]),
        ("llama.attention.head_count_kv", [2, 2]),
        ("llama.feed_forward_length", [64, 64]),
        ("llama.vocab_size", 400),
        ("llama.attention.sliding_window", 0),
        ("llama.attention.sliding_window", 1 << 17),
        ("llama.attention.sliding_window_pattern", [True, False]),
        ("llama.attention.causal", True),
        ("llama.attention.scale", 8**-0.5),
        ("llama.attention.layer_norm_epsilon", 1e-5),
        ("llama.use_parallel_residual", False),
        ("llama.expert_count", 0),
        ("llama.expert_used_count", 0),
        ("llama.logit_scale", 1.0),
        ("llama.embedding_scale", 1.0),
        ("llama.residual_scale", 1.0),
        ("llama.attn_logit_softcapping", 0.0),
        ("llama.pooling_type", 0),
        ("llama.tensor_data_layout", "Meta AI original pth"),
        ("tokenizer.ggml.seperator_token_id", 9999),
        ("tokenizer.ggml.fim_pre_token_id", 3),
        ("tokenizer.ggml.remove_extra_whitespaces", False),
        ("tokenizer.ggml.add_space_prefix", False),
        ("tokenizer.ggml.add_sep_token", False),
        ("tokenizer.ggml.eot_token_id", (1 << 32) - 1),  # llama.cpp's way to say that there is none
        ("tokenizer.huggingface.json", "{}"),
        ("tokenizer.chat_template.tool_use", "{{ tools }}"),
    ],
    ids=str,
)
def test_keys_that_change_nothing(tmp_path, key, value):
    (tmp_path / "plain").mkdir()
    plain = converted(tmp_path / "plain")
    assert converted(tmp_path, **{key: value}) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("general.type", "adapter"),
        ("general.type", "mmproj"),
        ("general.quantization_version", 1),
        ("adapter.type", "lora"),
        ("clip.has_vision_encoder", True),
        ("llama.rope.scaling.type", "ntk"),
        ("llama.rope.scaling.yarn_beta_fast", 32.0),  # and no YaRN
        ("llama.rope.scaling.attn_factor", 1.5),
        ("llama.rope.scaling.original_context_length", 1024),
        ("llama.rope.scaling.yarn_ext_factor", 1.0),
        ("llama.rope.scaling.alpha", 1000.0),
        ("llama.rope.dimension_count", 4),
        ("llama.rope.dimension_sections", [8, 4, 4, 0]),
        ("llama.attention.value_length", 32),
        ("llama.attention.sliding_window", 64),
        ("llama.attention.sliding_window", 1),
        ("llama.attention.scale", 0.0078125),
        ("llama.attention.causal", False),
        ("llama.attention.layer_norm_epsilon", 0.5),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.max_alibi_bias", 8.0),
        ("llama.attention.q_lora_rank", 16),
        ("llama.attention.head_count", [4, 2]),
        ("llama.attention.head_count", [4, 4, 4]),
        ("llama.attention.head_count_kv", [2, 4]),
        ("llama.feed_forward_length", [64, 128]),
        ("llama.feed_forward_length", []),
        ("llama.expert_count", 8),
        ("llama.expert_used_count", 2),
        ("llama.logit_scale", 16.0),
        ("llama.embedding_scale", 12.0),
        ("llama.residual_scale", 0.22),
        ("llama.attn_logit_softcapping", 50.0),
        ("llama.final_logit_softcapping", 30.0),
        ("llama.use_parallel_residual", True),
        ("llama.pooling_type", 3),
        ("llama.vocab_size", 401),
        ("llama.tensor_data_layout", "another"),
        ("llama.embedding_length_out", 16),
        ("llama.classifier.output_labels", ["yes", "no"]),
        ("llama.no_such_key", 0),
        # of another type, or no number that there can be
        ("llama.block_count", "two"),
        ("llama.block_count", 0),
        ("llama.block_count", [2, 2]),
        ("llama.block_count", True),
        ("llama.context_length", 2.5),
        ("llama.embedding_length", "64\n"),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", ["4", "4"]),
        ("llama.attention.head_count_kv", 3),
        ("llama.attention.key_length", 15),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.rope.freq_base", float("inf")),
        ("llama.rope.freq_base", -1.0),
        ("llama.rope.scaling.factor", 0.0),
        ("llama.rope.scaling.type", 1),
        ("llama.attention.sliding_window", "all"),
        ("general.alignment", "32"),
        ("general.type", 3),
        ("tokenizer.chat_template", ["{{ messages }}"]),
        ("tokenizer.ggml.model", "bert"),
        ("tokenizer.ggml.model", 2),
        ("tokenizer.ggml.pre", "deepseek-llm"),
        ("tokenizer.ggml.pre", False),
        ("tokenizer.ggml.tokens", [1, 2]),
        ("tokenizer.ggml.tokens", ["a", "b", "a"]),
        ("tokenizer.ggml.token_type", [1, 1]),
        ("tokenizer.ggml.token_type", ["1", "1"]),
        ("tokenizer.ggml.merges", ["a"]),
        ("tokenizer.ggml.merges", ["no where"]),
        ("tokenizer.ggml.merges", 3),
        ("tokenizer.ggml.bos_token_id", 400),
        ("tokenizer.ggml.eos_token_id", "<eos>"),
        ("tokenizer.ggml.eos_token_ids", [0, 9999]),
        ("tokenizer.ggml.unknown_token_id", 1 << 20),
        ("tokenizer.ggml.padding_token_id", 0.5),
        ("tokenizer.ggml.add_bos_token", True),  # and no bos_token_id
        ("tokenizer.ggml.add_eos_token", 1),
        ("tokenizer.ggml.add_space_prefix", True),
        ("tokenizer.ggml.remove_extra_whitespaces", True),
        ("tokenizer.ggml.add_sep_token", True),
        ("tokenizer.ggml.precompiled_charsmap", [1, 2, 3]),
        ("tokenizer.ggml.normalizer.lowercase", True),
        ("tokenizer.ggml.suppress_tokens", [5]),
        ("tokenizer.ggml.token_type_count", 2),
        ("tokenizer.ggml.added_tokens", ["<|nowhere|>"]),
        ("tokenizer.ggml.no_such_key", 0),
    ],
    ids=str,
)
def test_keys_that_ask_for_what_is_not_supported(tmp_path, key, value):
    message = refused(
        write(tmp_path / "m.gguf", *model(), extra={key: value}), rf"m\.gguf: .*{re.escape(key.split('.')[-1])}"
    )
    assert len(message) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.sliding_window", 511), ("rope.scaling.type", "ntk"), ("pooling_type", 1), ("expert_count", 4)],
    ids=str,
)
def test_qwen2_keys_are_refused_as_well(tmp_path, key, value):
    file = write(tmp_path / "m.gguf", *model(qkv_bias=True), arch="qwen2", extra={f"qwen2.{key}": value})
    refused(file, rf"m\.gguf: qwen2\.{re.escape(key)}={value!r} is")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({SCALING + "type": "yarn"}, r"field 'llama\.rope\.scaling\.factor' is missing"),
        ({SCALING + "type": "longrope"}, r"rope_factors_short\.weight is missing"),
        ({SCALING + "type": "linear"}, r"field 'llama\.rope\.scaling\.factor' is missing"),
        ({SCALING + "type": "none", SCALING + "factor": 4.0}, r"factor=4\.0 and llama\.rope\.scaling\.type='none'"),
        ({SCALING + "factor": 4.0, "llama.rope.scale_linear": 2.0}, r"factor=4\.0 and .*scale_linear=2\.0 contradict"),
        ({"llama.block_count": None}, r"field 'llama\.block_count' is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon' is missing"),
        ({"tokenizer.ggml.merges": None}, r"field 'tokenizer\.ggml\.merges' is missing"),
        ({"tokenizer.ggml.model": None}, r"field 'tokenizer\.ggml\.model' is missing"),
        ({"llama.attention.head_count": 3}, "embedding_length=32 is not a multiple of 3 heads"),
    ],
    ids=str,
)
def test_keys_that_are_missing_or_contradict_each_other(tmp_path, fields, message):
    refused(write(tmp_path / "m.gguf", *model(), extra=fields), rf"m\.gguf: .*{message}")


def test_one_number_for_all_layers_may_be_a_list(tmp_path):
    config = converted(tmp_path, llama__attention__head_count_kv=[2, 2], llama__feed_forward_length=[64, 64])
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 64)
