"""`python -m train.attention_speed`: its measurements, and that it measures the forms that training uses."""

import json

import pytest

from train import attention_speed


def test_rows_of_every_form(tmp_path, capsys):
    flags = ["--lengths", "128,256", "--heads", "4", "--kv-heads", "2", "--head-dim", "8", "--stride", "16"]
    assert attention_speed.main([*flags, "--budget", "32", "--repeats", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "cudnn is left out: it needs a GPU" in said
    rows = [json.loads(line) for line in (tmp_path / "training_attention.jsonl").read_text().splitlines()]
    assert [(row["length"], row["form"]) for row in rows] == [
        (length, form) for length in (128, 256) for form in ("dense", "strided", "paper")
    ]
    assert all(row["step_ms"] > 0 and row["budget"] == 32 for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forms", "sparse"], "--forms: 'sparse' is unknown"),
        (["--heads", "6", "--kv-heads", "4"], "--heads 6 is no multiple of --kv-heads 4"),
        (["--lengths", "50"], "--stride 50 leaves no context of --lengths 50"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--profile"], "--profile reads a GPU's profile; JAX runs on cpu"),
        (["--implementation", "cudnn", "--forms", "paper"], "--implementation cudnn needs an NVIDIA GPU"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, capsys, tmp_path):
    assert attention_speed.main([*flags, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
