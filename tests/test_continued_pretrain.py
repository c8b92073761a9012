"""The training command as users run it: real processes, killed with real signals, and what they leave behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest

import recyc_jax as rj

ROOT = Path(__file__).parent.parent
STEPS, SAVE_EVERY = 12, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    checkpoints.write_folder(folder, context=512)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents of 40 rows in all: an epoch ends within a run."""
    folder, draw, words = tmp_path_factory.mktemp("texts"), random.Random(0), checkpoints.TEXT.split()
    for number in range(8):
        (folder / f"document{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(160)))
    return folder


@pytest.fixture(scope="module")
def command(model, texts):
    def make(out, *more, **flags):
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
        return [sys.executable, "-m", "train.continued_pretrain", *listed, "--no-export", *more]

    return make


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | more


def finish(arguments, **more):
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(**more), capture_output=True, text=True, timeout=300, check=False
    )


def train_rows(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["kind"] == "train"]


def card(out, step=STEPS):
    return json.loads((out / "checkpoints" / str(step) / "card" / "metadata").read_text())


@pytest.fixture(scope="module")
def straight(command, tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = finish(command(out))
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in train_rows(out)] == list(range(1, STEPS + 1))
    return out


def assert_same(out, straight):
    """Bit for bit: every leaf of the last checkpoint, the data's position, every step's loss."""
    assert card(out)["fingerprints"] == card(straight)["fingerprints"]
    assert card(out)["position"] == card(straight)["position"]
    assert train_rows(out) == train_rows(straight)


def kill_when(process, ready, number):
    until = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    return process.wait(timeout=120)


def lines(out):
    file = out / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("moment", ["before a save", "at a save", "after a save and an epoch's end"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(command, straight, tmp_path, moment):
    out = tmp_path / "run"
    ready = {
        "before a save": lambda: lines(out) >= 2,
        "at a save": lambda: any((out / "checkpoints").glob("4*")),  # orbax writes in the background, then renames
        "after a save and an epoch's end": lambda: lines(out) >= 7,
    }[moment]
    process = subprocess.Popen(
        command(out), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert kill_when(process, ready, signal.SIGKILL) == -signal.SIGKILL
    assert lines(out) < STEPS
    done = finish(command(out))
    assert done.returncode == 0, done.stderr
    assert_same(out, straight)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_saves(command, straight, tmp_path, number, status):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert kill_when(process, lambda: lines(out) >= 2, number) == status
    said = process.communicate()[0]
    steps = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert f"saved step {steps[-1]}" in said
    assert steps[-1] == lines(out) < STEPS
    done = finish(command(out))
    assert done.returncode == 0, done.stderr
    assert f"goes on from step {steps[-1]}" in done.stdout
    assert_same(out, straight)


def damage(out, step, how):
    files = [file for file in (out / "checkpoints" / str(step) / "state").rglob("d/*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    if how == "torn":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 4
    largest.write_bytes(content)


@pytest.mark.parametrize("how", ["torn", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(command, straight, tmp_path, how):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    damage(out, STEPS, how)
    done = finish(command(out))
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{STEPS} is damaged and is passed over" in done.stderr
    assert f"goes on from step {STEPS - SAVE_EVERY}" in done.stdout
    assert_same(out, straight)


def test_damaged_checkpoints_alone_end_the_run_each_time(command, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    for step in (4, 8, 12):
        damage(out, step, "torn")
    for _ in range(2):
        done = finish(command(out))
        assert done.returncode == 2
        # not always the last line: orbax may leave words of its own about the reads that it gave up
        assert "error: " in done.stderr
        assert "none of the checkpoints 4, 8, 12 can be read whole" in done.stderr
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "8", "12"}
    assert train_rows(out) == train_rows(straight)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (dict(stride=13), "recycle's prefix was 52 and is 51 now"),
        (dict(steps=13), "training's steps was 12 and is 13 now"),
        (dict(seed=1), "data's seed was 42 and is 1 now"),
    ],
)
def test_another_configuration_is_refused(command, straight, flags, what):
    refused = finish(command(straight, **flags))
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert f"holds a run of another configuration: {what}" in refused.stderr


def test_a_forced_run_goes_on_with_another_configuration(command, straight, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    done = finish(command(out, "--force", steps=13))
    assert done.returncode == 0, done.stderr
    assert train_rows(out)[:-1] == train_rows(straight)
    other = finish(command(out, "--force", optimizer="adafactor"))
    assert other.returncode == 2
    assert "holds checkpoints of another shape" in other.stderr


def test_numbers_that_are_not_finite_end_the_run_and_are_not_kept(command, tmp_path):
    out = tmp_path / "run"
    done = finish(command(out, learning_rate=1e30, warmup_steps=0, max_bad_steps=3, clip=0, save_every=1))
    assert done.returncode == 1
    assert "3 steps in a row" in done.stderr
    assert "loss or gradients are not finite; the update is left out" in done.stdout
    kept = sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
    assert kept
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] == 3
    assert rows[-1]["loss"] is None


@pytest.mark.parametrize("recycle", ["paper", "strided", "off"])
def test_a_whole_run_with_evaluation_and_export(command, tmp_path, recycle):
    out = tmp_path / "run"
    arguments = command(
        out, recycle=recycle, held_out=0.2, steps=3, eval_every=2, eval_new_tokens=8, eval_sequences=2, eval_lengths=60
    )
    if recycle == "strided":  # the same tokens with less before them
        arguments.insert(arguments.index("--eval-lengths") + 1, "40")
    arguments.remove("--no-export")
    done = finish([*arguments, "--tensorboard"])
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if row["kind"] == "evaluation"]
    assert sorted({row["step"] for row in evaluated}) == [0, 2, 3]
    assert len(evaluated) == (18 if recycle == "strided" else 9)
    evaluated = [row for row in evaluated if row["length"] == 60]
    full = {row["step"]: row["nll"] for row in evaluated if row["policy"] == "full"}
    assert full[3] < full[0]
    assert (out / "loss.png").stat().st_size > 5000
    assert list((out / "tensorboard").glob("events*"))
    # the exported folder is a model again, and gives the perplexity that was reported of it
    lm = rj.load_pretrained(str(out / "model"))
    held = card(out, 3)["data"]["held_out"]
    assert len(held) == 2
    import jax.numpy as jnp

    from eval import documents
    from train import data, evaluate

    texts = documents.load(arguments[arguments.index("--data") + 1])
    corpus = data.tokenize([texts], lm.tokenizer, tmp_path / "tokens")
    windows = evaluate.windows(corpus, data.hold_out(corpus, 0.2, 60, 42)[1], 60, 2, 42)
    scores = rj.score(lm.params, lm.config, jnp.asarray(windows.tokens), policy=rj.FullAttention(), context_length=52)
    np.testing.assert_allclose(-scores.mean(), full[3], rtol=1e-5)


def test_the_export_loads_in_transformers(command, tmp_path):
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: the export was not read by transformers' models"
    )
    from transformers import AutoModelForCausalLM

    out = tmp_path / "run"
    arguments = command(out, steps=1)
    arguments.remove("--no-export")
    assert finish(arguments).returncode == 0
    theirs = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    lm = rj.load_pretrained(str(out / "model"))
    tokens = np.arange(40)[None] % lm.config.vocab_size
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(rj.forward(lm.params, lm.config, tokens), expected, atol=1e-4)


def test_a_dry_run_allocates_nothing_and_says_what_would_be(command, tmp_path):
    done = finish(
        command(tmp_path / "run", "--dry-run", fsdp=2, tensor=2), XLA_FLAGS="--xla_force_host_platform_device_count=8"
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert said["mesh"] == "data 2 x fsdp 2 x tensor 2 on 8 x cpu"
    _, config = 0, rj.LlamaConfig.tiny(vocab_size=400)
    assert said["parameters"] == f"{count_of(config):,}"
    assert said["steps"] == "12, 512 tokens each"
    assert "GiB" in said["memory a device"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def count_of(config):
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0)))))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(data="poems"), "--data: 'poems' is unknown"),
        (dict(data="t=nowhere.txt"), "there is no such file or folder"),
        (dict(length=400, batch_size=80), "rows of --length 400 are fewer than --batch-size 80"),
        (dict(stride=64), "--stride 64 leaves no context of --length 64"),
        (dict(budget=0), "budget=0 must be at least 1"),
        (dict(budget=1.5), "--budget 1.5: a fraction must lie in 0..1"),
        (dict(length=1000), "exceeds the model's context of 512"),
        (dict(accumulate=3), "--accumulate 3 does not divide --batch-size 8"),
        (dict(tensor=2), "does not divide the 1 devices"),
        (dict(held_out=0.2, eval_lengths=500), "one of at least 500 tokens (--eval-lengths)"),
        (dict(held_out=0.2, eval_new_tokens=64), "--eval-new-tokens 64 leaves no context of --eval-lengths 64"),
        (dict(model="nowhere"), "model 'nowhere' is neither"),
        (dict(preset="poem"), "--preset 'poem': there is paper"),
        (dict(attention="cudnn"), "--attention cudnn needs an NVIDIA GPU"),
        (dict(steps=-1), "--steps -1 must not be negative"),
        (dict(epochs=3), "--epochs 3.0 needs --steps 0"),
        (dict(optimizer="adafactor", weight_decay=0.1), "--weight-decay 0.1 goes with --optimizer adamw alone"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line(command, call_module, tmp_path, flags, message):
    done = call_module("train.continued_pretrain", *command(tmp_path / "run", **flags)[3:])
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_bad_input_ends_a_process_with_status_2(command, tmp_path):
    done = finish(command(tmp_path / "run", stride=64))
    assert done.returncode == 2
    assert done.stderr == "error: --stride 64 leaves no context of --length 64\n"


def test_a_folder_that_cannot_be_written_is_refused(command, tmp_path):
    file = tmp_path / "file"
    file.touch()
    done = finish(command(file / "run"))
    assert done.returncode == 2
    assert f"--out {file / 'run'}: Not a directory" in done.stderr


def test_presets_and_files_stand_for_flags_that_others_win_over(tmp_path):
    import tyro

    from train import continued_pretrain

    def parsed(*arguments):
        return tyro.cli(continued_pretrain.Config, args=continued_pretrain._with_files(list(arguments)))

    config = parsed("--stride", "25", "--preset", "paper")
    assert (config.length, config.stride, config.budget, config.learning_rate) == (8242, 25, 2048, 5e-6)
    assert len(config.eval_policies) == 5
    file = tmp_path / "mine.yaml"
    file.write_text("batch-size: 2\nout: here\nrecycle: off\npack: false\neval_policies: full\nlearning_rate: 5e-6\n")
    config = parsed(f"--config={file}")
    assert (config.batch_size, config.out, config.recycle, config.pack) == (2, Path("here"), "off", False)
    assert (config.eval_policies, config.learning_rate) == (("full",), 5e-6)
    file.write_text("batchsize: 2\n")
    with pytest.raises(ValueError, match="'batchsize' is no setting"):
        parsed(f"--config={file}")
    file.write_text("steps: 3.5\n")
    with pytest.raises(SystemExit):
        parsed(f"--config={file}")


@pytest.fixture
def two_processes(command, free_port):
    """Starts a run of two processes over gloo, each with one device of a mesh of two that shares the batch."""
    started = []

    def start(out, **flags):
        where = dict(coordinator=f"localhost:{free_port}", processes=2, fsdp=2, backend="cpu")
        for number in range(2):
            arguments = command(out, process_id=number, **where, **flags)
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment(), **pipes))
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_train_as_one_does(two_processes, command, straight, tmp_path):
    out = tmp_path / "run"
    for process in two_processes(out):
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    np.testing.assert_allclose(np.array(train_rows(out)), np.array(train_rows(straight)), rtol=1e-4)
    resumed = finish(command(out))  # by one process: the checkpoint knows nothing of how many wrote it
    assert resumed.returncode == 0, resumed.stderr


def test_a_signal_that_comes_while_processes_speak_is_not_lost(monkeypatch):
    """One process plays both."""
    from train import loop

    def exchange(mine):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return np.stack([mine, np.zeros_like(mine)])

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", exchange)
    signals = [signal.SIGTERM]
    with loop._listening() as asked:
        asked.look()  # all have spoken already
        with pytest.raises(loop._Stop):
            asked.look()
    assert asked.number == signal.SIGTERM


def test_processes_end_together_when_one_is_asked_to(two_processes, tmp_path):
    out = tmp_path / "run"
    first, second = two_processes(out, steps=5000, save_every=5000)
    assert kill_when(second, lambda: lines(out) >= 2, signal.SIGTERM) == 143
    said, error = first.communicate(timeout=120)
    assert first.returncode == 143, error
    assert f"SIGTERM: saved step {lines(out)}" in said
