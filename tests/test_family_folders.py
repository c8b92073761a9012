"""Folders of other families as the hub has them: models that also read images, decoders without a head, revisions."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FAMILY_FIELDS, hf_tensors, write_folder
from safetensors.numpy import load_file, save_file

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.loading import export, pretrained, weights


def rewritten(folder, rename, more=None, **hf):
    """The folder with its tensors renamed, further ones added, and other fields in its config."""
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()} | (more or {}), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | hf))


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_every_family_comes_back(tmp_path, family):
    params, config = write_folder(tmp_path, family=family, shards=2)
    lm = rj.load_pretrained(str(tmp_path))
    assert lm.config == config
    chex.assert_trees_all_equal(lm.params, params)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_reads_images(tmp_path, prefix):
    """As Gemma 3's published configs are: what the text config leaves out is the family's default."""
    params, config = write_folder(tmp_path, family="gemma3_text")
    whole = json.loads((tmp_path / "config.json").read_text())
    text = {name: value for name, value in whole.items() if name not in ("eos_token_id", "tie_word_embeddings")}
    del text["hidden_activation"]
    image = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    at = "" if prefix.startswith("language_model.") else "model."
    more = {f"{at}{image}": np.ones((2, 2), np.float32), f"{at}multi_modal_projector.x": np.ones(3, np.float32)}
    head = "language_model.lm_head." if prefix == "language_model.model." else "lm_head."
    rewritten(
        tmp_path,
        lambda name: name.replace("model.", prefix, 1).replace("lm_head.", head),
        more,
        model_type="gemma3",
        text_config=text,
        vision_config={"hidden_size": 8},
        hidden_size=None,
    )
    lm = rj.load_pretrained(str(tmp_path))
    assert lm.config == config
    chex.assert_trees_all_equal(lm.params, params)
    export.save_pretrained(tmp_path / "saved", params, config, tmp_path, np.float32)
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "gemma3_text"
    chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path / "saved")).params, params)
    rewritten(tmp_path, lambda name: name, {"audio_tower.x": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"tensor audio_tower\.x .* is no part of the model"):
        rj.load_pretrained(str(tmp_path))


def test_the_whole_models_ends_and_ties_count_as_in_transformers():
    """What transformers saves states both places, and the text part ends at fewer tokens."""
    text = dict(num_hidden_layers=6, eos_token_id=1, tie_word_embeddings=False)
    whole = dict(model_type="gemma3", text_config=text, eos_token_id=[1, 106], tie_word_embeddings=True)
    config = rj.LlamaConfig.from_hf(whole)
    assert (config.eos_token_ids, config.tie_word_embeddings) == ((1, 106), True)
    assert not rj.LlamaConfig.from_hf(whole | dict(tie_word_embeddings=False)).tie_word_embeddings
    assert rj.LlamaConfig.from_hf(whole | dict(tie_word_embeddings=None)).tie_word_embeddings
    assert rj.LlamaConfig.from_hf(whole | dict(eos_token_id=None)).eos_token_ids == (1,)


def test_a_decoder_without_its_head(tmp_path):
    params, _ = write_folder(tmp_path / "tied", tie_word_embeddings=True)
    rewritten(tmp_path / "tied", lambda name: name.removeprefix("model."))
    chex.assert_trees_all_equal(rj.load_pretrained(str(tmp_path / "tied")).params, params)
    write_folder(tmp_path / "untied")
    rewritten(tmp_path / "untied", lambda name: name.removeprefix("model."))
    tensors = load_file(tmp_path / "untied/model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "untied/model.safetensors")
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight is missing: this is a checkpoint of the decoder"):
        rj.load_pretrained(str(tmp_path / "untied"))


def test_a_fused_tensor_of_another_size_is_named(tmp_path):
    params, config = write_folder(tmp_path, family="phi3")
    tensors = hf_tensors(params, config)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    save_file(tensors | {name: tensors[name][:-8].copy()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"qkv_proj\.weight has shape \[56, 32\], the config asks for \[64, 32\]"):
        rj.load_pretrained(str(tmp_path))


def test_parts_of_parameters_are_read_alone(tmp_path):
    """Slices of transposed and of fused tensors, as the shards of a mesh ask for them."""
    params, config = write_folder(tmp_path, family="phi3")
    read = weights.reader(tmp_path, config, np.float32)
    at = (slice(8, 24), slice(4, 12))
    for path in (("attention", "k_proj"), ("mlp", "up_proj"), ("mlp", "down_proj")):
        whole = params["layers_1"][path[0]][path[1]]["kernel"]
        np.testing.assert_array_equal(read(("layers_1", *path, "kernel"), at), whole[at])
    np.testing.assert_array_equal(read(("embedding",), (slice(10, 20), slice(None))), params["embedding"][10:20])


def test_a_mesh_may_lack_axes(tmp_path):
    params, _ = write_folder(tmp_path, family="qwen3")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",))
    lm = rj.load_pretrained(str(tmp_path), mesh=mesh)
    chex.assert_trees_all_equal(lm.params, params)
    kernel = lm.params["layers_0"]["attention"]["q_proj"]["kernel"]
    assert kernel.sharding == jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    assert sharding.on_mesh(jax.sharding.PartitionSpec("fsdp", "tensor"), mesh)[0] is None


def test_a_revision_is_passed_on_to_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    write_folder(tmp_path)
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(pretrained.fetch, "hub_answers", lambda repo: True)
    rj.load_pretrained("owner/name", revision="v1.0", dtype=jnp.float32)
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1.0")

    def refuse(repo, **options):
        response = type("Response", (), {"headers": {}, "status_code": 404, "request": None})()
        raise huggingface_hub.errors.RevisionNotFoundError("404", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"revision=.v9.: model .owner.name. has no such branch, tag or commit"):
        rj.load_pretrained("owner/name", revision="v9")
    with pytest.raises(ValueError, match=r"revision=.main.: .* is no hub id"):
        rj.load_pretrained(str(tmp_path), revision="main")
