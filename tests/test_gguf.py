"""GGUF files: weights in Hugging Face's order, and no tensor or part of a file that is passed over."""

import struct

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import metadata, model, permuted, refused, tensors, write, write_file

import recyc_jax as rj
from recyc_jax.loading import gguf_convert


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))


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


def test_a_type_that_cannot_be_dequantised_is_named(tmp_path, monkeypatch):
    params, config = model()
    write(tmp_path / "m.gguf", params, config)

    dequantize = gguf.quants.dequantize

    def refuse(data, kind):
        """The library's own function, called with a type that it cannot dequantise."""
        return dequantize(data, gguf.GGMLQuantizationType.Q8_K)

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    refused(tmp_path / "m.gguf", r"m\.gguf: tensor token_embd\.weight has type F32, which is not supported")


def test_large_files_are_converted_in_shards(tmp_path, monkeypatch):
    params, config = model()
    write(tmp_path / "m.gguf", params, config)
    monkeypatch.setattr(gguf_convert, "_SHARD_BYTES", 30_000)
    lm = rj.load_pretrained(str(tmp_path / "m.gguf"), dtype=jnp.float32)
    assert len(list((tmp_path / "cache").glob("*/model-*.safetensors"))) > 2
    chex.assert_trees_all_equal(lm.params, params)


@pytest.mark.parametrize("zeros", [(), ("attn_output",), ("attn_output", "ffn_up", "ffn_gate", "ffn_down")], ids=str)
def test_llama_with_biases_in_q_k_and_v(tmp_path, zeros):
    """They are interleaved as the weights are; biases of zeros elsewhere change nothing."""
    params, config = model(qkv_bias=True)
    sizes = dict(attn_output=config.hidden_size, ffn_down=config.hidden_size)
    more = {
        f"blk.{layer}.{name}.bias": np.zeros(sizes.get(name, config.intermediate_size), np.float32)
        for name in zeros
        for layer in range(config.num_hidden_layers)
    }
    file = write(tmp_path / "m.gguf", params, config, more=more)
    lm = rj.load_pretrained(str(file), dtype=jnp.float32)
    assert lm.config == config
    chex.assert_trees_all_equal(lm.params, params)


def test_llama_with_biases_of_zeros_is_llama(tmp_path):
    params, config = model()
    sizes = dict(attn_q=config.num_attention_heads * config.head_dim, attn_output=config.hidden_size)
    more = {f"blk.1.{name}.bias": np.zeros(size, np.float32) for name, size in sizes.items()}
    lm = rj.load_pretrained(str(write(tmp_path / "m.gguf", params, config, more=more)), dtype=jnp.float32)
    assert lm.config == config
    chex.assert_trees_all_equal(lm.params, params)


def test_llama_with_biases_has_the_logits_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="the reference extra (torch) is not installed")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_key_value_heads=2, attention_bias=True, initializer_range=0.2)
    ).eval()
    ours = rj.LlamaConfig.from_hf(hf.config.to_dict() | dict(attention_bias=False))
    weights = {}
    for name, parameter in hf.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            torch.nn.init.normal_(parameter, std=0.5)
        heads = dict(q_proj=4, k_proj=2).get(name.split(".")[-2])
        array = parameter.detach().numpy()
        weights[gguf_convert.gguf_name(name, ours)] = np.ascontiguousarray(permuted(array, heads) if heads else array)
    lm = rj.load_pretrained(str(write_file(tmp_path / "m.gguf", metadata(ours), weights)), dtype=jnp.float32)
    tokens = np.arange(2, 60)[None]
    got = rj.forward(lm.params, lm.config, jnp.asarray(tokens))
    np.testing.assert_allclose(got, hf(torch.tensor(tokens)).logits.detach(), atol=2e-5)


VECTOR = np.full(8, 0.5, np.float32)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"blk.0.attn_q.bias": VECTOR}, r"blk\.0\.attn_k\.bias is missing|blk\.0\.attn_q\.bias has shape"),
        ({"blk.1.attn_output.bias": VECTOR}, r"blk\.1\.attn_output\.bias is a bias"),
        ({"blk.0.ffn_up.bias": VECTOR}, r"blk\.0\.ffn_up\.bias is a bias"),
        ({"blk.0.attn_norm.bias": VECTOR}, r"blk\.0\.attn_norm\.bias is a bias"),
        ({"output_norm.bias": VECTOR}, r"output_norm\.bias is a bias"),
        ({"output.bias": VECTOR}, r"output\.bias is a bias"),
        ({"blk.0.attn_q_norm.weight": VECTOR}, r"blk\.0\.attn_q_norm\.weight is not part of"),
        ({"blk.0.attn_sinks.bias": VECTOR}, r"blk\.0\.attn_sinks\.bias is not part of"),
        ({"blk.0.attn_q.scale": VECTOR}, r"blk\.0\.attn_q\.scale is not part of"),
        ({"rope_factors_long.weight": VECTOR}, r"rope_factors_short\.weight is missing, which longrope"),
        ({"blk.2.attn_norm.weight": VECTOR}, r"blk\.2\.attn_norm\.weight is of a block beyond"),
        ({"blk.17.attn_q.bias": 0 * VECTOR}, r"blk\.17\.attn_q\.bias is of a block beyond"),
        ({"blk.1.ffn_down.weight": None}, r"tensor blk\.1\.ffn_down\.weight is missing"),
        ({"output_norm.weight": None}, r"tensor output_norm\.weight is missing"),
        ({"token_embd.weight": None}, r"tensor token_embd\.weight is missing"),
        ({"blk.1.attn_norm.weight": VECTOR}, r"blk\.1\.attn_norm\.weight has shape \[8\], the metadata ask for \[32\]"),
        ({"output.weight": np.ones((400, 64), np.float32)}, r"output\.weight has shape \[400, 64\]"),
        (
            {"token_embd.weight": np.ones((100, 32), np.float32)},
            r"tokens has \d+ entries, .* has 100 rows|output\.weight",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_tensors_that_are_missing_odd_or_too_many_are_named(tmp_path, more, message):
    refused(write(tmp_path / "m.gguf", *model(), more=more), rf"m\.gguf: .*({message})")


def test_qwen2_needs_its_biases_and_has_no_others(tmp_path):
    params, config = model(qkv_bias=True)
    for name, value, message in [
        ("blk.1.attn_v.bias", None, r"blk\.1\.attn_v\.bias is missing"),
        ("blk.0.attn_output.bias", VECTOR, r"blk\.0\.attn_output\.bias is a bias"),
    ]:
        refused(write(tmp_path / "m.gguf", params, config, arch="qwen2", more={name: value}), message)


@pytest.mark.parametrize("kept", [0, 3, 1000, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, kept):
    params, config = model()
    file = tmp_path / "m.gguf"
    write(file, params, config)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refused(file, r"m\.gguf: not a complete GGUF file")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF", b"GGML", "does not begin with GGUF"),
        (struct.pack("<I", 3), struct.pack("<I", 1), "GGUF's version 1"),
        (struct.pack("<I", 3), struct.pack("<I", 4), "GGUF's version 4"),
        (b"blk.1.attn_q.weight", b"blk.0.attn_q.weight", r"tensor 'blk\.0\.attn_q\.weight' is there twice"),
        (b"llama.block_count", b"llama.rope.typo_X", r"llama\.rope\.typo_X=2 is not supported"),
        (b"general.architecture", b"llama.attention.scal", r"field 'general\.architecture' is missing"),
        (b"llama.block_count", b"llama.feed_\xff\xfecount", "not UTF-8"),
        # lengths of a list, of a text and of a tensor, each as one damaged byte leaves it
        (struct.pack("<IIQ", 9, 5, 400)[:-8], struct.pack("<IIQ", 9, 55, 400)[:-8], "type 55"),
        (
            b"\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00llama",
            b"\x08\x00\x00\x00\x05\x00\x00\x00\x00\x00\x01\x00llama",
            "ends within",
        ),
        (struct.pack("<QQ", 32, 400), struct.pack("<QQ", 32, 1 << 60), "ends within the tensor"),
    ],
    ids=str,
)
def test_a_damaged_file_is_named(tmp_path, old, new, message):
    file = write(tmp_path / "m.gguf", *model())
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))
    refused(file, rf"m\.gguf: .*{message}")


def test_the_length_of_a_list_is_checked_before_it_is_read(tmp_path):
    file = write(tmp_path / "m.gguf", *model(), extra={"general.layers": [7] * 11})
    data = file.read_bytes()
    for damaged in (1 << 40, (1 << 64) - 1):
        at = data.index(struct.pack("<Q", 11), data.index(b"general.layers"))
        file.write_bytes(data[:at] + struct.pack("<Q", damaged) + data[at + 8 :])
        refused(file, "ends within its header")


def test_a_tensor_that_lies_elsewhere_is_named(tmp_path):
    """A damaged offset would read another tensor's bytes."""
    file = write(tmp_path / "m.gguf", *model())
    data = bytearray(file.read_bytes())
    at = data.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight") + 4 + 2 * 8 + 4
    data[at : at + 8] = struct.pack("<Q", 0)
    file.write_bytes(data)
    refused(file, r"'blk\.0\.attn_k\.weight' does not begin where the one before it ends")


def test_big_endian_files_are_refused(tmp_path):
    file = write(tmp_path / "m.gguf", *model(), endianess=gguf.GGUFEndian.BIG)
    refused(file, r"m\.gguf: .*big-endian.*gguf-convert-endian")


def test_alignments(tmp_path):
    params, config = model()
    for alignment in (8, 128):
        file = tmp_path / f"a{alignment}.gguf"
        writer = gguf.GGUFWriter(file, "llama")
        writer.add_custom_alignment(alignment)
        for key, value in metadata(config).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
            add[type(value)](key, value)
        for name, tensor in tensors(params, config).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        chex.assert_trees_all_equal(rj.load_pretrained(str(file), dtype=jnp.float32).params, params)
    refused(
        write(tmp_path / "odd.gguf", params, config, extra={"general.alignment": 24}), "alignment=24 is not a power"
    )
