"""Commands where a machine is not as usual: odd names of folders, a home that cannot be written, a locale without UTF-8."""

import pytest
from checkpoints import write_folder

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "odd [x] {y} 'q' é"
    folder.mkdir()
    write_folder(folder / "mo del", context=2048)
    (folder / "d[oc].txt").write_text("Où est la clé? " * 20, encoding="utf-8")
    return folder


def test_a_text_from_a_folder_of_any_name_in_any_home(folder, run_module):
    """The file has letters that the locale's encoding lacks, and so has the answer: they are printed as question marks."""
    env = ASCII | {"HOME": "/dev/null/x", "XDG_CACHE_HOME": ""}
    small = ("--model", "mo del", "--max-new-tokens", "6")
    ran = run_module("recyc_jax", "Which key?", "--file", "d[oc].txt", *small, cwd=folder, env=env)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.isascii()
    assert "6 made" in ran.stderr
    ran = run_module("recyc_jax", "Quelle clé?", *small, cwd=folder, env=env)
    assert ran.returncode == 2
    assert "error: prompt: character 9 is no text in this locale's encoding, " in ran.stderr
    assert "set PYTHONUTF8=1" in ran.stderr


def test_results_in_a_folder_of_any_name(folder, call_module, monkeypatch):
    monkeypatch.chdir(folder)
    flags = ("--domains", "t=d[oc].txt", "--lengths", 64, "--sequences", 1, "--new-tokens", 4, "--out", "o [1] é")
    ran = call_module("eval.language_modeling", "--model", "mo del", *flags)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "o [1] é" / "report.md").exists()
