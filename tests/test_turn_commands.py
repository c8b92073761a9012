"""The commands that time turns and drafts."""

import gzip
import json

import pytest
from checkpoints import write_folder

import recyc_jax as rj


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts") / "model"
    write_folder(folder)
    return folder


def rows(file):
    data = file.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if file.suffix == ".gz" else data).splitlines()]


def test_turns_are_timed(call_module, folder, tmp_path):
    flags = "--model", folder, "--length", 40, "--question", 5, "--answer", 4, "--questions", 2, "--stream", 20
    ran = call_module("eval.turns", *flags, "--policies", "lookahead:budget=8,stride=4", "--out", tmp_path)
    assert ran.returncode == 0, ran.stderr
    (row,) = rows(tmp_path / "turns.jsonl")
    assert row["policy"] == "lookahead:budget=8,stride=4"
    assert 0 < row["first_token_s"] <= row["questions_s"]


def test_rounds_are_timed_and_estimated(call_module, folder, tmp_path):
    flags = "--model", folder, "--length", 100, "--batch", 2, "--repeats", 1, "--out", tmp_path, "--policies"
    ran = call_module("eval.drafts", *flags, "recycled:budget=8,draft=2", "--tokens-per-pass", 2)
    assert ran.returncode == 0, ran.stderr
    (row,) = rows(tmp_path / "rounds.jsonl")
    assert row["token_ms"] == pytest.approx(row["round_ms"] / 2, abs=1e-3)
    ran = call_module("eval.drafts", *flags, "recycled:budget=8,draft=2,refresh_every=5", "--tokens-per-pass", 2)
    assert ran.returncode == 0, ran.stderr
    _, row = rows(tmp_path / "rounds.jsonl")
    with_it, without = row["with_refresh_ms"], row["without_refresh_ms"]
    assert row["round_ms"] == pytest.approx(without + (with_it - without) / 3, abs=1e-3)
    ran = call_module("eval.drafts", "--estimate", "--model", "llama-3.1-8b", "--batch", 3)
    assert ran.returncode == 0, ran.stderr
    assert "131072" in ran.stdout


def test_texts_are_continued(call_module, folder, tmp_path):
    """With the tokens of full attention, and counts that fit together."""
    text = tmp_path / "a text.txt"
    text.write_text("The grass is green. What is the special magic number? " * 20)
    flags = "--model", folder, "--text", text, "--length", 60, "--batch", 2, "--new-tokens", 11, "--out", tmp_path
    ran = call_module("eval.drafts", *flags, "--policies", "recycled:budget=8,draft=2,adapt=false")
    assert ran.returncode == 0, ran.stderr
    full, drafted = rows(tmp_path / "texts.jsonl")
    assert full["policy"] == "full"
    assert drafted["rows_equal"] == 2
    assert all(1 <= one <= 3 for one in drafted["tokens_per_pass"])


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("eval.drafts", ["--policies", "full"], "must all draft"),
        ("eval.drafts", ["--text", "/no/such/text"], "no such file"),
        ("eval.drafts", ["--tokens-per-pass", "0.5"], "at least 1"),
        ("eval.turns", ["--length", "8192"], "8192"),
        ("eval.speed", ["--policies", "recycled:budget=8,draft=2"], "eval.drafts"),
    ],
)
def test_bad_flags_end_in_one_line(call_module, module, flags, message):
    ran = call_module(module, *flags)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_ruler_counts_drafts(call_module, folder, tmp_path):
    flags = "--model", folder, "--tasks", "niah_single_1", "--lengths", 800, "--samples", 1, "--out", tmp_path
    ran = call_module("eval.ruler", *flags, "--policies", "full", "recycled:budget=64,draft=4,adapt=false")
    assert ran.returncode == 0, ran.stderr
    (file,) = tmp_path.rglob("*.jsonl*")
    full, drafted = rows(file)
    assert drafted["prediction"] == full["prediction"]
    assert drafted["drafted"] >= drafted["accepted"]


def test_text_level(folder):
    lm = rj.load_pretrained(str(folder))
    want = lm.generate("The grass is", policy="full", max_new_tokens=20)
    drafted = lm.generate("The grass is", policy="lookahead:budget=8,draft=4,adapt=false", max_new_tokens=20)
    assert drafted.tokens == want.tokens
    assert drafted.full_steps <= want.full_steps
