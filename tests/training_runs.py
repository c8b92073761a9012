"""Fixtures and helpers of tests that run `python -m train.continued_pretrain` on a tiny checkpoint."""

import contextlib
import io
import json
import random
import subprocess
from pathlib import Path

import checkpoints
import pytest
from conftest import called

STEPS, SAVE_EVERY = 12, 4


@pytest.fixture(scope="session")
def training_command(tmp_path_factory):
    """Makes the command, as its module and arguments, of a run on 40 rows: an epoch ends within the run."""
    model, texts = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("texts")
    checkpoints.write_folder(model, context=512)
    draw, words = random.Random(0), checkpoints.TEXT.split()
    for number in range(8):
        (texts / f"document{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(160)))

    def make(out, *more, export=False, **flags):
        usual = {
            "model": model,
            "data": f"t={texts}",
            "out": out,
            "length": 64,
            "stride": 12,
            "batch-size": 8,
            "steps": STEPS,
            "save-every": SAVE_EVERY,
            "held-out": 0,
            "learning-rate": 0.01,
        }
        usual |= {name.replace("_", "-"): value for name, value in flags.items()}
        listed = [part for name, value in usual.items() for part in (f"--{name}", str(value))]
        return ["train.continued_pretrain", *listed, *more, *([] if export else ["--no-export"])]

    return make


@pytest.fixture(scope="session")
def straight_run(training_command, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = finish(training_command(out))
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in train_rows(out)] == list(range(1, STEPS + 1))
    return out


def finish(command):
    """Run the command in this process, to its end."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        status = called(*command)
    return subprocess.CompletedProcess(command, status, out.getvalue(), error.getvalue())


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def train_rows(out):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(out) if row["kind"] == "train"]


def lines(out):
    """The number of finished steps, while the run goes on."""
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def saved_steps(out):
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())


def card(out, step=STEPS):
    return json.loads((out / "checkpoints" / str(step) / "card" / "metadata").read_text())


def assert_same(out, straight):
    """Every leaf of the last checkpoint, the position in the data and every step's loss are bitwise the same."""
    assert card(out)["fingerprints"] == card(straight)["fingerprints"]
    assert card(out)["position"] == card(straight)["position"]
    assert train_rows(out) == train_rows(straight)
