"""GGUF files in several parts, and the cache of converted ones."""

import errno
import os
import re
from pathlib import Path

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from gguf_files import cached, metadata, model, refused, tensors, write, write_file

import recyc_jax as rj
from recyc_jax.loading import gguf_convert


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECYC_JAX_CACHE", str(tmp_path / "cache"))


def write_parts(folder, stem, params, config, cuts, extra=(), said=None):
    """A model cut as gguf-split cuts it: the metadata in the first part, tensors up to each of `cuts` in each part.
    `extra` are further fields of each part."""
    weights = list(tensors(params, config).items())
    bounds = [0, *cuts, len(weights)]
    files = []
    for number in range(len(bounds) - 1):
        split = {"split.no": number, "split.count": len(bounds) - 1, "split.tensors.count": said or len(weights)}
        fields = (metadata(config) if number == 0 else {}) | split | (dict(extra[number]) if extra else {})
        file = folder / f"{stem}-{number + 1:05}-of-{len(bounds) - 1:05}.gguf"
        files.append(write_file(file, fields, dict(weights[bounds[number] : bounds[number + 1]])))
    return files


@pytest.mark.parametrize("cuts", [(20,), (0,), (3, 9), (1, 2, 3, 4)], ids=str)
def test_parts_are_joined(tmp_path, cuts):
    """Whichever part is given, the whole model is loaded, and it is converted once."""
    params, config = model()
    files = write_parts(tmp_path, "big", params, config, cuts)
    for file in (files[0], files[-1]):
        lm = rj.load_pretrained(str(file), dtype=jnp.float32)
        assert lm.config == config
        chex.assert_trees_all_equal(lm.params, params)
    assert len(list((tmp_path / "cache").glob("big-*"))) == 1


def test_parts_that_are_missing_are_named(tmp_path):
    files = write_parts(tmp_path, "big", *model(), (5, 10))
    files[1].unlink()
    for given in (files[0], files[2]):
        refused(given, r"part 2 of 3 is missing: .*big-00002-of-00003\.gguf")
    files[0].unlink()
    refused(files[2], r"part 1 of 3 is missing: .*big-00001-of-00003\.gguf")


def test_parts_that_are_renamed_are_named(tmp_path):
    first, second = write_parts(tmp_path, "big", *model(), (5,))
    alone = first.rename(tmp_path / "alone.gguf")
    refused(alone, r"alone\.gguf: split\.count=2, so it is one part of several")
    refused(second.rename(tmp_path / "big-00002-of-00001.gguf"), r"split\.count=2, so it is one part of several")

    first, second = write_parts(tmp_path, "swapped", *model(), (5,))
    first.rename(tmp_path / "third")
    second.rename(first)
    (tmp_path / "third").rename(second)
    refused(first, r"split\.no=1, counted from 0, but the name says part 1")

    first, second = write_parts(tmp_path, "more", *model(), (5,))
    for number, file in enumerate((first, second, second), 1):
        (tmp_path / f"more-{number:05}-of-00003.gguf").write_bytes(file.read_bytes())
    refused(tmp_path / "more-00001-of-00003.gguf", r"split\.count=2, but the name says that it is one part of 3")


def test_parts_that_do_not_belong_together_are_named(tmp_path):
    params, config = model()
    first, _ = write_parts(tmp_path, "count", params, config, (5,), said=22)
    refused(first, r"split\.tensors\.count=22, but the 2 parts hold 21 tensors")
    first, second = write_parts(tmp_path, "twice", params, config, (5,))
    late = dict(list(tensors(params, config).items())[4:])
    write_file(second, {"split.no": 1, "split.count": 2, "split.tensors.count": 21}, late)
    refused(first, r"twice-00002-of-00002\.gguf: the tensor '.*' is in twice-00001-of-00002\.gguf as well")
    first, _ = write_parts(tmp_path, "other", params, config, (5,), extra=[{}, {"llama.context_length": 77}])
    refused(first, r"other-00002-of-00002\.gguf: llama\.context_length is not what other-00001-of-00002\.gguf says")
    first, _ = write_parts(tmp_path, "odd", params, config, (5,), extra=[{"split.count": "2"}, {}])
    refused(first, r"odd-00001-of-00002\.gguf: split\.count='2'")


def test_a_whole_file_may_be_named_like_a_part(tmp_path):
    """gguf-split leaves the keys, with a count of 0, in a file that it has merged."""
    params, config = model()
    merged = {"split.no": 0, "split.count": 0, "split.tensors.count": 21}
    for name, fields in (("m-00001-of-00004.gguf", merged), ("m-00001-of-00001.gguf", merged | {"split.count": 1})):
        file = write(tmp_path / name, params, config, extra=fields)
        chex.assert_trees_all_equal(rj.load_pretrained(str(file), dtype=jnp.float32).params, params)
    refused(write(tmp_path / "m.gguf", params, config, extra=merged | {"split.tensors.count": 20}), "hold 21|holds 21")


def test_the_cache_knows_a_file_by_all_its_bytes(tmp_path):
    """Not by its first MiB and its time, which two files can share; and not by its time at all."""
    fields, weights = metadata(model()[1]), tensors(*model())
    weights["token_embd.weight"] = np.ones((9000, 32), np.float32)
    weights["output.weight"] = np.ones((9000, 32), np.float32)
    folders = []
    for name, last in (("one", 1.0), ("two", 2.0), ("three", 1.0)):
        (tmp_path / name).mkdir()
        weights["output.weight"][-1] = last
        file = write_file(tmp_path / name / "m.gguf", fields, weights)
        os.utime(file, (1e9, 1e9) if name != "three" else None)
        folders.append(gguf_convert.cached_folder(file))
    assert folders[0] != folders[1]
    assert folders[0] == folders[2]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left in"),
        (OSError(errno.EFBIG, "File too large"), "no space left in"),
        (safetensors.SafetensorError("I/O error: No space left on device (os error 28)"), "no space left in"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written to .*Read-only file system"),
        (safetensors.SafetensorError("Invalid header"), "cannot be written to .*Invalid header"),
    ],
    ids=str,
)
def test_a_conversion_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, error, said):
    file = write(tmp_path / "m.gguf", *model())
    real = safetensors.numpy.save_file

    def fail(shard, path, **options):
        real(shard, path, **options)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", fail)
        refused(file, rf"m\.gguf: .*{said}.*")
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "cache"))):
            gguf_convert.cached_folder(file)
    assert (gguf_convert.cached_folder(file) / "config.json").is_file()


def test_a_disk_that_fills_up_while_the_tokenizer_is_written(tmp_path, monkeypatch):
    file, real = write(tmp_path / "m.gguf", *model()), Path.write_text

    def fail(path, text, **options):
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    refused(file, r"m\.gguf: there is no space left in .*cache")


def test_a_conversion_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", *model())

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf.quants, "dequantize", fail)
        with pytest.raises(KeyboardInterrupt):
            gguf_convert.cached_folder(file)
    assert cached() == []
    assert (gguf_convert.cached_folder(file) / "config.json").is_file()
