"""Of two processes one is killed at a random moment, again and again: the other ends within 30 seconds, and the same
command, started again in both, does the rest."""

import json
import random
import signal
import time

import numpy as np
import pytest
from checkpoints import write_folder
from conftest import send_when
from test_several_devices import on_two_hosts
from training_runs import finish, lines, train_rows

RUNS = 6


@pytest.fixture
def twice(start_module):
    """Starts both processes of a command."""

    def start(command):
        env = on_two_hosts()
        return [start_module(*command, env=env | {"JAX_PROCESS_ID": str(number)}) for number in range(2)]

    return start


def killed_then_done(twice, command, begun, draw):
    """Kill one process of the command soon after `begun()` holds, and run both again to their end."""
    both, killed = twice(command), draw.randrange(2)

    def ready():
        if not begun():
            return False
        time.sleep(draw.random() / 2)
        return True

    assert send_when(both[killed], ready, signal.SIGKILL) == -signal.SIGKILL
    said = both[1 - killed].communicate(timeout=30)[1]
    assert f"error: process {killed} no longer answers" in said, said
    assert both[1 - killed].returncode == 1
    again = twice(command)
    errors = [process.communicate(timeout=240)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], errors


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_training(twice, training_command, straight_run, tmp_path, seed):
    draw, out = random.Random(seed), tmp_path / "run"
    steps = draw.randrange(1, 9)
    killed_then_done(twice, training_command(out, fsdp=2, backend="cpu"), lambda: lines(out) >= steps, draw)
    np.testing.assert_allclose(np.array(train_rows(out)), np.array(train_rows(straight_run)), rtol=1e-4)


@pytest.fixture(scope="module")
def ruler(tmp_path_factory):
    """Makes the command of a run that writes to a folder."""
    folder = tmp_path_factory.mktemp("ruler")
    write_folder(folder / "model")

    def command(out):
        arguments = [
            "eval.ruler",
            "--model",
            folder / "model",
            "--tasks",
            "niah_single_1,niah_single_2",
            "--lengths",
            "720",
        ]
        arguments += ["--samples", "40", "--batch-size", "2", "--out", out, "--backend", "cpu"]
        return [*arguments, "--policies", "full", "recycled:budget=0.25,stride=10"]

    return command


def rows(out):
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    found = [{name: row[name] for name in row if name != "seconds"} for row in found]
    return sorted(found, key=lambda row: (row["policy"], row["task"], row["index"]))


@pytest.fixture(scope="module")
def undisturbed(ruler, tmp_path_factory):
    """The rows of a run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert finish(ruler(out)).returncode == 0
    return rows(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RUNS))
def test_ruler(twice, ruler, undisturbed, tmp_path, seed):
    draw, out = random.Random(seed), tmp_path / "run"
    samples, file = draw.randrange(1, 12), out / "results.jsonl"
    killed_then_done(twice, ruler(out), lambda: file.exists() and file.read_bytes().count(b"\n") >= samples, draw)
    assert rows(out) == undisturbed
    assert len(rows(out)) == 160
