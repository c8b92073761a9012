"""Loading checkpoints from folders, and the errors for damaged ones."""

import json

import checkpoints
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import recyc_jax as rj
from recyc_jax.loading import fetch, pretrained


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("options", [{}, dict(tie_word_embeddings=True), dict(qkv_bias=True)], ids=str)
def test_a_folder_loads_whole(tmp_path, shards, options):
    params, config = checkpoints.write_folder(tmp_path, shards=shards, **options)
    lm = rj.load_pretrained(str(tmp_path), dtype=jnp.float32)
    chex.assert_trees_all_equal(lm.params, params)
    chex.assert_trees_all_equal_structs(lm.params, params)
    assert lm.config == rj.LlamaConfig(**{**vars(config), "eos_token_ids": (0,)})
    assert lm.tokenizer("is green")["input_ids"] == checkpoints.tokenizer().encode("is green").ids


def test_dtypes(tmp_path):
    """The default on CPU is float32; stored bfloat16 is read unchanged for dtype=bfloat16."""
    params, _ = checkpoints.write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in load_file(file).items()}, file)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path), dtype=jnp.bfloat16).params, expected)
    if jax.default_backend() == "cpu":
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), expected)
        chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path)).params, wide)


@pytest.mark.parametrize("dtype", ["int8", "int32", "bogus", object()])
def test_weights_are_floating_point(tmp_path, dtype):
    checkpoints.write_folder(tmp_path)
    with pytest.raises(ValueError, match="must be a floating-point dtype"):
        rj.load_pretrained(str(tmp_path), dtype)


def test_what_generation_config_would_change_is_said(tmp_path, caplog):
    checkpoints.write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"suppress_tokens": [5], "bad_words_ids": null, "eos_token_id": 2}'
    )
    pretrained.read_config(tmp_path)
    assert "suppress_tokens not heeded" in caplog.text
    assert "bad_words_ids" not in caplog.text


def test_generation_config_names_the_eos(tmp_path):
    checkpoints.write_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert pretrained.read_config(tmp_path).eos_token_ids == (5, 6)


def test_a_missing_shard_is_named(tmp_path):
    checkpoints.write_folder(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: this shard is missing"):
        rj.load_pretrained(str(tmp_path))


@pytest.mark.parametrize("kept", [0, 5, 3000, -10])
def test_a_truncated_file_is_named(tmp_path, kept):
    checkpoints.write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        rj.load_pretrained(str(tmp_path))


def test_a_missing_tensor_is_named(tmp_path):
    checkpoints.write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight is missing"
    ):
        rj.load_pretrained(str(tmp_path))


def test_a_tensor_that_the_index_places_wrongly_is_named(tmp_path):
    checkpoints.write_folder(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    del places["model.norm.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    rj.load_pretrained(str(tmp_path))  # the shard has it, and transformers takes it from there
    places["model.norm.weight"] = places["model.embed_tokens.weight"]
    index.write_text(json.dumps({"weight_map": places | {"model.embed_tokens.weight": places["lm_head.weight"]}}))
    with pytest.raises(ValueError, match=r"safetensors: tensor model\.\S+ is missing"):
        rj.load_pretrained(str(tmp_path))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    checkpoints.write_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((8, 32), np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"k_proj\.weight has shape \[8, 32\], the config asks for \[16, 32\]"):
        rj.load_pretrained(str(tmp_path))


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        rj.load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="neither a folder"):
        rj.load_pretrained("no-such-model")
    with pytest.raises(ValueError, match="there is no such file"):
        rj.load_pretrained(str(tmp_path / "none.gguf"))
    checkpoints.write_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: cannot be read as JSON"):
        rj.load_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"config\.json: model_type='gpt2' is not supported"):
        rj.load_pretrained(str(tmp_path))


def test_no_weights_are_named(tmp_path):
    checkpoints.write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        rj.load_pretrained(str(tmp_path))


def test_what_is_being_built_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "model"

    def fail_half_way():
        with fetch.building(target) as work:
            work.mkdir()
            (work / "part").write_text("x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list((tmp_path / "cache").iterdir()) == []
    with fetch.building(target) as work:
        work.mkdir()
        (work / "part").write_text("x")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]


def test_a_broken_tokenizer_is_named_before_weights_load(tmp_path, monkeypatch):
    checkpoints.write_folder(tmp_path)
    monkeypatch.setattr(pretrained, "load_params", lambda *args: pytest.fail("weights were read"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: its tokenizer cannot be loaded; the installed tokenizers .* and "
    ):
        rj.load_pretrained(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}: its tokenizer cannot be loaded; "):
        rj.load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "asks for an accepted licence and a login"),
        ("LocalEntryNotFoundError", "no earlier download is cached"),
        ("HfHubHTTPError", "the download broke off"),
    ],
)
def test_what_the_hub_refuses_is_named(monkeypatch, error, message):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args, **options):
        kind = getattr(errors, error)
        raise kind.__new__(kind)  # skips the constructor, which needs an HTTP response

    monkeypatch.setattr(fetch, "hub_answers", lambda *args: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(fetch.UnavailableError, match=f"model 'owner/name': .*{message}"):
        rj.load_pretrained("owner/name")
