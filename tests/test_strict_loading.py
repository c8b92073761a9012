"""Folders as transformers reads them: which weights count, and what is refused by name."""

import json
import os
import struct

import checkpoints
import chex
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import recyc_jax as rj
from recyc_jax.loading import digests, identity, tokenizer, weights

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    return tensors


def test_a_head_of_its_own_counts_though_the_config_ties_it(tmp_path):
    checkpoints.write_folder(tmp_path, tie_word_embeddings=True)
    own = np.random.default_rng(0).normal(size=(400, 32)).astype(np.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: own}))
    lm = rj.load_pretrained(str(tmp_path))
    assert not lm.config.tie_word_embeddings
    np.testing.assert_array_equal(lm.params["head"], own)


def test_a_head_that_is_the_embedding_stays_tied(tmp_path):
    params, _ = checkpoints.write_folder(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].copy()}))
    lm = rj.load_pretrained(str(tmp_path))
    assert lm.config.tie_word_embeddings
    chex.assert_trees_all_equal(lm.params, params)


def test_tied_embeddings_may_be_stored_as_the_head(tmp_path):
    params, _ = checkpoints.write_folder(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path)).params, params)


@pytest.mark.parametrize("left", ["index alone", "index and shards", "an index that is not JSON"])
def test_a_single_file_counts_before_an_index(tmp_path, left):
    checkpoints.write_folder(tmp_path / "old", shards=2)
    params, _ = checkpoints.write_folder(tmp_path / "m")
    index = tmp_path / "m/model.safetensors.index.json"
    index.write_text("{" if "JSON" in left else (tmp_path / "old/model.safetensors.index.json").read_text())
    for file in (tmp_path / "old").glob("model-*") if "shards" in left else ():
        save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, tmp_path / "m" / file.name)
    chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path / "m")).params, params)


@pytest.mark.parametrize(
    "name", ["hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json"]
)
def test_quantisation_that_another_file_names_is_refused(tmp_path, name):
    checkpoints.write_folder(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}: quantised weights are not supported"):
        rj.load_pretrained(str(tmp_path))


PROJECTION = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{PROJECTION}.weight", np.zeros((32, 32), np.int8), "holds I8, which is not supported"),
        (f"{PROJECTION}.weight", np.zeros((32, 32), bool), "holds BOOL, which is not supported"),
        ("model.norm.weight", np.zeros(32, np.int64), "holds I64, which is not supported"),
        (f"{PROJECTION}.weight_scale", np.ones((), np.float32), "belongs to quantised weights"),
        (f"{PROJECTION}.weight_scale_inv", np.ones((1, 1), np.float32), "belongs to quantised weights"),
        (f"{PROJECTION}.bias", np.zeros(32, np.float32), "is no part of the model"),
        ("model.layers.1.self_attn.q_norm.weight", np.zeros(8, np.float32), "is no part of the model"),
        ("model.layers.2.mlp.up_proj.weight", np.zeros((64, 32), np.float32), "is of a layer beyond the config's"),
        ("score.weight", np.zeros((2, 32), np.float32), "is no part of the model"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, name, tensor, message):
    checkpoints.write_folder(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {name} .*{message}"):
        rj.load_pretrained(str(tmp_path))


def test_float8_is_named(tmp_path):
    checkpoints.write_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{PROJECTION}.weight"
    header, data = {}, b""
    for key, tensor in tensors.items():
        raw = bytes(tensor.size) if key == name else tensor.tobytes()
        kind = "F8_E4M3" if key == name else "F32"
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    encoded = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    with pytest.raises(ValueError, match=rf"tensor {name} holds F8_E4M3"):
        rj.load_pretrained(str(tmp_path))


def test_constants_of_old_checkpoints_are_no_weights(tmp_path):
    params, _ = checkpoints.write_folder(tmp_path)
    inverse = np.ones(4, np.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": inverse}))
    chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path)).params, params)


@pytest.mark.parametrize("places", [[], {"a": 3}, {"model.norm.weight": "../elsewhere.safetensors"}])
def test_an_odd_index_is_named(tmp_path, places):
    checkpoints.write_folder(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"index\.json: "):
        rj.load_pretrained(str(tmp_path))


def test_an_adapter_is_named(tmp_path):
    checkpoints.write_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json: adapters are not supported; merge it"):
        rj.load_pretrained(str(tmp_path))


def test_weights_of_another_kind_are_named(tmp_path):
    checkpoints.write_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"it has pytorch_model\.bin, which cannot be read"):
        rj.load_pretrained(str(tmp_path))


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_model_is_its_weights_and_config(tmp_path):
    """Neither names of folders and files nor the number of shards matter; every byte of weights and config does."""
    checkpoints.write_folder(tmp_path / "a")
    checkpoints.write_folder(tmp_path / "b/c", shards=3)
    same = identity.of_weights(tmp_path / "a")
    assert identity.of_weights(tmp_path / "b/c") == same
    file = tmp_path / "a/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    other = identity.of_weights(tmp_path / "a")
    assert other != same
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"transformers_version": "9", "_name_or_path": "x"}))
    assert identity.of_weights(tmp_path / "a") == other
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert identity.of_weights(tmp_path / "a") != other
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    (tmp_path / "a/generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert identity.of_weights(tmp_path / "a") != other


def test_digests_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", -1)
    file = tmp_path / "file"
    file.write_bytes(b"some bytes")
    first = digests.file_digest(file)
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *args: pytest.fail("read again"))
        assert digests.file_digest(file) == first
    file.write_bytes(b"other byte")
    assert digests.file_digest(file) != first
    replaced = tmp_path / "new"
    replaced.write_bytes(b"third byte")
    replaced.replace(file)
    assert digests.file_digest(file) not in (first, "")


def test_a_changed_file_with_its_old_size_and_time_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_S", -1)
    file = tmp_path / "file"
    file.write_bytes(b"some bytes")
    os.utime(file, (1e9, 1e9))
    first = digests.file_digest(file)
    with file.open("r+b") as opened:
        opened.write(b"more bytes")
    os.utime(file, (1e9, 1e9))
    assert digests.file_digest(file) != first


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    """A second change within the clock's resolution would otherwise go unseen."""
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"x")
    digests.file_digest(tmp_path / "file")
    assert not (tmp_path / "cache-digests").exists()


def test_digests_need_no_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", "/proc/nothing")
    checkpoints.write_folder(tmp_path)
    assert identity.of_weights(tmp_path) == identity.of_weights(tmp_path)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"truncation": {"direction": "Left", "max_length": 7, "strategy": "OnlyFirst", "stride": 2}},
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<eos>"}},
    ],
    ids=str,
)  # fmt: skip
def test_stored_truncation_and_padding_do_not_count(tmp_path, setting):
    checkpoints.write_folder(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    found = tokenizer.load_tokenizer(tmp_path)
    expected = checkpoints.tokenizer().encode(checkpoints.TEXT).ids
    assert found(checkpoints.TEXT)["input_ids"] == expected
    assert found.backend_tokenizer.encode_batch([checkpoints.TEXT, "a"])[0].ids == expected


@pytest.mark.parametrize(
    "change", [{"pre_tokenizer": {"type": "OfTheFuture"}}, {"model": {"type": "Else"}}, {"version": []}, {"decoder": 3}]
)
def test_a_tokenizer_of_another_version_is_named(tmp_path, change):
    checkpoints.write_folder(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*another version may have written it") as error:
        rj.load_pretrained(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path, monkeypatch):
    """Rust's panics are no `Exception`s: a damaged tokenizer.json gave one."""
    import transformers

    class PanicException(BaseException):
        pass

    def panics(*_, **__):
        raise PanicException("range end index 16 out of range for slice of length 14")

    checkpoints.write_folder(tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panics)
    with pytest.raises(ValueError, match=r"cannot read its tokenizer\.json.*range end index 16"):
        rj.load_pretrained(str(tmp_path))


def test_a_config_that_transformers_cannot_read_is_what_is_named(tmp_path):
    """transformers reads config.json before tokenizer.json."""
    checkpoints.write_folder(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | {"bos_token_id": [1]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"reads config\.json first, cannot read that"):
        tokenizer.load_tokenizer(tmp_path)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path):
    """And nobody is asked on the terminal."""
    checkpoints.write_folder(tmp_path)
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ValueError, match="needs Python code of its own, which is not run"):
        tokenizer.load_tokenizer(tmp_path)


def test_special_tokens_around_a_text(tmp_path):
    checkpoints.write_folder(tmp_path)
    file, plain = tmp_path / "tokenizer.json", tokenizer.load_tokenizer(tmp_path)
    assert tokenizer.special_tokens(plain) == ([], [])
    sequence = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": [*sequence, sequence[0]],
        "pair": [],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": template}))
    assert tokenizer.special_tokens(tokenizer.load_tokenizer(tmp_path)) == ([0], [0])


def test_headers_of_safetensors_files_are_checked(tmp_path):
    file = tmp_path / "a.safetensors"
    for content in (b"", b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 8) + b'{"a": 3}'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.safetensors: not a complete safetensors file"):
            weights.safetensors_header(file)
