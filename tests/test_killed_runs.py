"""Training runs that are killed or asked to end by real signals, on one process and on two, and what they leave."""

import os
import shutil
import signal
import socket

import numpy as np
import pytest
from conftest import send_when
from training_runs import SAVE_EVERY, STEPS, assert_same, finish, lines, saved_steps, train_rows


@pytest.mark.parametrize(
    "moment",
    [pytest.param("before a save", marks=pytest.mark.slow), "at a save", "after a save and an epoch's end"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_been(training_command, straight_run, start_module, tmp_path, moment):
    out = tmp_path / "run"
    ready = {
        "before a save": lambda: lines(out) >= 2,
        "at a save": lambda: any((out / "checkpoints").glob("4*")),  # orbax writes in the background, then renames
        "after a save and an epoch's end": lambda: lines(out) >= 7,
    }[moment]
    process = start_module(*training_command(out))
    assert send_when(process, ready, signal.SIGKILL) == -signal.SIGKILL
    assert lines(out) < STEPS
    done = finish(training_command(out))
    assert done.returncode == 0, done.stderr
    assert_same(out, straight_run)


def test_an_interrupt_ends_the_step_and_saves(training_command, straight_run, start_module, tmp_path):
    """SIGTERM, which one process of two gets, is tested below."""
    out = tmp_path / "run"
    process = start_module(*training_command(out))
    assert send_when(process, lambda: lines(out) >= 2, signal.SIGINT) == 130
    said = process.communicate()[0]
    steps = saved_steps(out)
    assert f"saved step {steps[-1]}" in said
    assert steps[-1] == lines(out) < STEPS
    done = finish(training_command(out))
    assert done.returncode == 0, done.stderr
    assert f"goes on from step {steps[-1]}" in done.stdout
    assert_same(out, straight_run)


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
def test_a_damaged_checkpoint_is_passed_over(training_command, straight_run, tmp_path, how):
    out = tmp_path / "run"
    shutil.copytree(straight_run, out)
    damage(out, STEPS, how)
    done = finish(training_command(out))
    assert done.returncode == 0, done.stderr
    assert f"checkpoints/{STEPS} is damaged and is passed over" in done.stderr
    assert f"goes on from step {STEPS - SAVE_EVERY}" in done.stdout
    assert_same(out, straight_run)


def test_damaged_checkpoints_alone_end_the_run_each_time(training_command, straight_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(straight_run, out)
    for step in (4, 8, 12):
        damage(out, step, "torn")
    for _ in range(2):
        done = finish(training_command(out))
        assert done.returncode == 2
        # not always the last line: orbax may print about the reads that it abandoned
        assert "error: " in done.stderr
        assert "none of the checkpoints 4, 8, 12 can be read whole" in done.stderr
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"4", "8", "12"}
    assert train_rows(out) == train_rows(straight_run)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def test_two_processes_train_as_one_does_and_end_together(
    training_command, straight_run, start_module, free_port, tmp_path
):
    """A run over gloo, whose processes each have one of the two devices that share the batch; SIGTERM comes to one."""
    out = tmp_path / "run"
    where = dict(coordinator=f"localhost:{free_port}", processes=2, fsdp=2, backend="cpu")
    first, second = (start_module(*training_command(out, process_id=number, **where)) for number in range(2))
    assert send_when(second, lambda: lines(out) >= 2, signal.SIGTERM) == 143
    said, error = first.communicate(timeout=120)
    assert first.returncode == 143, error
    assert f"SIGTERM: saved step {lines(out)}" in said
    resumed = finish(training_command(out))  # one process can resume what two have saved
    assert resumed.returncode == 0, resumed.stderr
    np.testing.assert_allclose(np.array(train_rows(out)), np.array(train_rows(straight_run)), rtol=1e-4)


def test_a_signal_that_comes_while_processes_speak_is_not_lost(monkeypatch):
    """One process acts as both."""
    from train.signals import Stop, listening

    def exchange(mine):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return np.stack([mine, np.zeros_like(mine)])

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", exchange)
    signals = [signal.SIGTERM]
    with listening() as asked:
        asked.look()  # the signal arrives during this exchange
        with pytest.raises(Stop):
            asked.look()
    assert asked.number == signal.SIGTERM
