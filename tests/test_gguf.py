"""GGUF files: weights in Hugging Face's order, and tokenizers that split like the original ones."""

import json

import checkpoints
import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recyc_jax as rj
from recyc_jax import rope
from recyc_jax.loading import gguf_convert, gguf_tokenizer, pretrained


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))


def permuted(weight, heads):
    """Interleave the two halves of each head, as llama.cpp's converter does to q and k."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(file, params, config, *, arch="llama", quantise=None, divisors=None, extra=()):
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(config.head_dim)
    for name, value in extra:
        writer.add_string(name, value)
    made = json.loads(checkpoints.tokenizer().to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<eos>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in made["merges"]])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages }}")
    names = {hf: ours for ours, hf in gguf_convert._NAMES.items()} | {
        hf: o for o, hf in gguf_convert._TOP_NAMES.items()
    }
    for name, tensor in checkpoints.hf_tensors(params, config).items():
        stem, _, kind = name.rpartition(".")
        layer, prefix = "", stem
        if stem.startswith("model.layers."):
            number, _, prefix = stem.removeprefix("model.layers.").partition(".")
            layer = f"blk.{number}."
        if arch == "llama" and prefix.endswith(("q_proj", "k_proj")):
            tensor = permuted(tensor, config.num_attention_heads if "q_proj" in prefix else config.num_key_value_heads)
        target = f"{layer}{names[prefix]}.{kind}"
        if quantise is not None and tensor.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(tensor, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(target, tensor)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model(**overrides):
    shape = dict(vocab_size=400, rms_norm_eps=1e-5, rope_theta=1e5) | overrides
    config = rj.LlamaConfig.tiny(**shape, eos_token_ids=(0,))
    return rj.init_params(config, jax.random.key(4)), config


@pytest.mark.parametrize(
    ("arch", "options"),
    [("llama", {}), ("llama", dict(tie_word_embeddings=True, head_dim=16)), ("qwen2", dict(qkv_bias=True))],
    ids=str,
)
def test_float32_weights_come_back_exactly(tmp_path, arch, options, caplog):
    params, config = model(**options)
    write(tmp_path / "m.gguf", params, config, arch=arch)
    lm = rj.load_pretrained(str(tmp_path / "m.gguf"), dtype=jnp.float32)
    assert lm.config == config
    chex.assert_trees_all_equal(lm.params, params)
    assert "converted once" in caplog.text
    caplog.clear()
    again = rj.load_pretrained(str(tmp_path / "m.gguf"), dtype=jnp.float32)
    assert not caplog.text
    chex.assert_trees_all_equal(again.params, params)
    assert lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("in 1850")["input_ids"])[-5:] == ["Ġ", *"1850"]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q5_0", "BF16", "F16"])
def test_other_types_are_dequantised(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    params, config = model()
    write(tmp_path / "m.gguf", params, config, quantise=kind)
    loaded = rj.load_pretrained(str(tmp_path / "m.gguf"), dtype=jnp.float32).params
    weight = np.asarray(params["layers_1"]["mlp"]["up_proj"]["kernel"]).T
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    got = np.asarray(loaded["layers_1"]["mlp"]["up_proj"]["kernel"]).T
    # dequantised values are stored as float16, with 11 significant bits
    np.testing.assert_allclose(got, expected, rtol=2**-11, atol=1e-7)
    np.testing.assert_array_equal(loaded["final_norm"]["scale"], params["final_norm"]["scale"])


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised(tmp_path, factor):
    params, config = model(head_dim=64, rope_theta=5e5)
    scaled = rj.LlamaConfig(**vars(config) | dict(rope_scaling=rj.RopeScaling("llama3", factor)))
    divisors = rope.inverse_frequencies(config) / rope.inverse_frequencies(scaled)
    write(tmp_path / "m.gguf", params, config, divisors=divisors)
    assert rj.load_pretrained(str(tmp_path / "m.gguf")).config == scaled
    write(tmp_path / "odd.gguf", params, config, divisors=divisors * 2)
    with pytest.raises(ValueError, match=r"odd\.gguf: rope_freqs\.weight is not"):
        rj.load_pretrained(str(tmp_path / "odd.gguf"))


def test_what_is_not_supported_is_named(tmp_path):
    params, config = model()
    write(tmp_path / "m.gguf", params, config, arch="gemma")
    with pytest.raises(ValueError, match=r"m\.gguf: general\.architecture='gemma' is not supported"):
        rj.load_pretrained(str(tmp_path / "m.gguf"))
    write(tmp_path / "yarn.gguf", params, config, extra=[("llama.rope.scaling.type", "yarn")])
    with pytest.raises(ValueError, match=r"rope\.scaling\.type='yarn'"):
        rj.load_pretrained(str(tmp_path / "yarn.gguf"))


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path, monkeypatch):
    params, config = model()
    write(tmp_path / "m.gguf", params, config)

    dequantize = gguf.quants.dequantize

    def refuse(data, kind):
        """The library's own function, called with a type that it cannot dequantise."""
        return dequantize(data, gguf.GGMLQuantizationType.Q8_K)

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    with pytest.raises(ValueError, match=r"m\.gguf: tensor token_embd\.weight has type F32, which is not supported"):
        rj.load_pretrained(str(tmp_path / "m.gguf"))


def test_large_files_are_converted_in_shards(tmp_path, monkeypatch):
    params, config = model()
    write(tmp_path / "m.gguf", params, config)
    monkeypatch.setattr(gguf_convert, "_SHARD_BYTES", 30_000)
    lm = rj.load_pretrained(str(tmp_path / "m.gguf"), dtype=jnp.float32)
    assert len(list((tmp_path / "cache").glob("*/model-*.safetensors"))) > 2
    chex.assert_trees_all_equal(lm.params, params)


def test_ends_of_turns_and_messages_end_too():
    fields = {f"tokenizer.ggml.{name}_token_id": number for name, number in (("eos", 9), ("eot", 7), ("eom", 9))}
    assert gguf_convert._eos_ids(fields) == [9, 7]
    assert gguf_convert._eos_ids({}) == []


@pytest.mark.parametrize("kept", [0, 3, 1000, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, kept):
    params, config = model()
    file = tmp_path / "m.gguf"
    write(file, params, config)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"m\.gguf: not a complete GGUF file"):
        rj.load_pretrained(str(file))
    assert not list((tmp_path / "cache").glob("*"))


def byte_level(pre, **more):
    made = json.loads(checkpoints.tokenizer().to_str())["model"]
    tokens = sorted(made["vocab"], key=made["vocab"].get)
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in made["merges"]],
        "tokenizer.ggml.token_type": [3 if token == "<eos>" else 1 for token in tokens],
        "tokenizer.ggml.bos_token_id": 0,
    }
    return gguf_tokenizer.build(fields | more)[0]


def pieces(tokenizer, text):
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_pre_tokenizers():
    text = "It's 1234567 o'clock\n\nnow"
    assert pieces(byte_level("smollm"), text)[2:9] == ["Ġ", "1", "2", "3", "4", "5", "6"]
    assert pieces(byte_level("llama-bpe"), text)[2:6] == ["Ġ", "123", "456", "7"]
    assert pieces(byte_level("qwen2"), text)[2:6] == ["Ġ", "1", "2", "3"]
    assert pieces(byte_level("gpt-2"), text)[2] == "Ġ1234567"
    assert pieces(byte_level("llama-bpe"), text)[-2:] == ["ĊĊ", "now"]
    assert byte_level("llama-bpe").encode("is").ids[0] == 0  # BOS comes first
    assert byte_level("smollm").encode("is").ids[0] != 0
    assert byte_level("smollm", **{"tokenizer.ggml.add_bos_token": True}).encode("is").ids[0] == 0
    assert byte_level("smollm").encode("a<eos>b").ids[1] == 0
    with pytest.raises(ValueError, match="pre='deepseek'"):
        byte_level("deepseek")
    with pytest.raises(ValueError, match="model='bert'"):
        byte_level("smollm", **{"tokenizer.ggml.model": "bert"})


def test_sentencepiece():
    """Merges by score, byte fallback, a space before the text, BOS first; decoding returns the text."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ehlotr"]
    words = {"he": -1.0, "ll": -2.0, "hell": -3.0, "hello": -4.0, "▁hello": -5.0, "▁t": -6.0, "lo": -0.5}
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*letters, *words],
        "tokenizer.ggml.scores": [0.0] * len(letters) + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(letters) - 259 + len(words)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tokenizer, config = gguf_tokenizer.build(fields)
    assert config["bos_token"] == "<s>"
    # "lo" has the best score, so it is merged before "ll"
    assert tokenizer.encode("hello the").tokens == ["<s>", "▁", "he", "l", "lo", "▁t", "he"]
    assert tokenizer.encode("é").tokens == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello thé").ids) == "hello thé"


def test_the_packaged_smollm2():
    """The alias resolves to a complete model, whose tokenizer splits digits one by one."""
    folder = pretrained.resolve("smollm2-135m")
    tokenizer = pretrained.load_tokenizer(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("is 1234567")["input_ids"]) == ["is", "Ġ", *"1234567"]
    text = "Café №12\n\n\t«The magic number» is 55-01 … 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([dict(role="user", content="Hi")], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(1) == 3
