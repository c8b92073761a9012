"""`python -m train.step_speed`: whole steps of every form, on a small model."""

import dataclasses
import json

import jax
import pytest

from train import attention_speed, step_speed


def test_rows_of_every_form(tmp_path, capsys, config):
    shape = dataclasses.asdict(config) | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    flags = ["--model", tmp_path, "--lengths", "64", "--tokens", "128", "--stride", "16", "--budget", "8"]
    flags += ["--forms", "dense,cudnn,strided,paper", "--repeats", "1", "--out", tmp_path / "out"]
    assert step_speed.main(list(map(str, flags))) == 0
    assert "cudnn is left out: it needs a GPU" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "training_step.jsonl").read_text().splitlines()]
    assert [(row["form"], row["rows"], row["budget"]) for row in rows] == [
        (form, 2, 8) for form in ("dense", "strided", "paper")
    ]
    assert all(row["step_ms"] > 0 and row["mfu"] is None for row in rows)


def test_float32_is_refused_where_cudnn_is_asked_for(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="--dtype float32: the form cudnn needs bfloat16"):
        attention_speed.usable_forms("strided,cudnn", "float32")
    assert attention_speed.usable_forms("dense,strided,paper", "float32") == ["dense", "strided", "paper"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--forms", "sparse"], "--forms: 'sparse' is unknown"),
        (["--model", "llama-9"], "--model 'llama-9' is no known shape"),
        (["--lengths", "50"], "--stride 50 leaves no context of --lengths 50"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--profile"], "--profile reads a GPU's profile; JAX runs on cpu"),
        (["--implementation", "pallas"], "--implementation pallas needs an NVIDIA GPU of compute capability"),
    ],
)
def test_bad_flags_end_in_one_line(flags, message, capsys, tmp_path):
    assert step_speed.main([*flags, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
