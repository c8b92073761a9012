"""Of two real processes one fails, is killed or is told to end: both end soon, and each says why in one line."""

import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment
from test_several_devices import on_two_hosts

PROGRAM = """
import sys, time
from recyc_jax.commands import command_line, hosts

def prepare(what):
    if what == "refuses":
        raise ValueError("--what refuses is wrong")

    def go():
        hosts.from_first(lambda: "all are here")
        print("ready", flush=True)
        if what == "fails":
            raise RuntimeError("no luck")
        if what == "sleeps":
            time.sleep(600)
        hosts.from_first(lambda: "a process that sleeps never comes here")

    return go

sys.exit(command_line.run(prepare, sys.argv[1], "nothing was done"))
"""
AGAIN = "; the same command, started again in every process, resumes"


@pytest.fixture
def start():
    """Starts a process of two that does what `what` says."""
    started, named = [], environment() | on_two_hosts()

    def begin(number, what, program=PROGRAM):
        command, pipes = [sys.executable, "-c", program, what], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        env = named | {"JAX_PROCESS_ID": str(number)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def begin_both(start, first, second):
    """Two processes, which have both reached `go`."""
    both = start(0, first), start(1, second)
    for process in both:
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, process.communicate()
    return both


def errors(process, seconds):
    """The lines on stderr of a process that ends within so many seconds."""
    return process.communicate(timeout=seconds)[1].splitlines()


@pytest.mark.parametrize(("what", "status", "why"), [("fails", 1, "failed: RuntimeError: no luck" + AGAIN),
                                               ("refuses", 2, "ended: --what refuses is wrong")])  # fmt: skip
def test_the_other_process_says_which_one_failed(start, what, status, why):
    waits, fails = start(0, "meets"), start(1, what)
    assert errors(waits, 60) == [f"error: process 1 {why}"]
    assert errors(fails, 10)[-1] in ("RuntimeError: no luck", "error: --what refuses is wrong")
    assert [waits.returncode, fails.returncode] == [status, status]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("what", ["meets", "sleeps"])
def test_a_killed_process_is_missed(start, killed, what):
    doing = [what, what]
    doing[killed] = "sleeps"
    both = begin_both(start, *doing)
    both[killed].kill()
    other = both[1 - killed]
    assert errors(other, 30) == [f"error: process {killed} no longer answers{AGAIN}"]
    assert other.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_second_signal_ends_a_process_that_waits_in_a_collective(start, told):
    doing = ["sleeps", "sleeps"]
    doing[told] = "meets"
    both = begin_both(start, *doing)
    time.sleep(1)
    both[told].send_signal(signal.SIGINT)  # Python's handler cannot run
    time.sleep(1)
    assert both[told].poll() is None
    both[told].send_signal(signal.SIGINT)
    assert errors(both[told], 3) == ["SIGINT: ended at once"]
    assert both[told].returncode == 130
    assert len(errors(both[1 - told], 30)) == 1


@pytest.mark.slow
def test_a_process_that_waits_for_others_says_so_and_heeds_a_signal(start):
    patient = PROGRAM.replace("def prepare", "hosts._EACH = 1\n\ndef prepare", 1)
    for number in range(2):
        process = start(number, "meets", patient)
        assert (
            f"process {number} of 2 has waited 1 s for the others (process 0 is expected" in process.stderr.readline()
        )
        process.send_signal(signal.SIGTERM)
        assert errors(process, 3)[-1] == "SIGTERM: ended at once"
        assert process.returncode == 143


@pytest.mark.slow
def test_a_process_that_nobody_joins_ends_in_time(start):
    short = PROGRAM.replace("def prepare", "hosts.TIMEOUT = 2\n\ndef prepare", 1)
    for number in range(2):
        process = start(number, "meets", short)
        said = errors(process, 60)
        assert len(said) == 1
        assert said[0].startswith(
            f"error: the run's processes did not find each other: process {number} of 2 has waited"
        )
        assert process.returncode == 2
