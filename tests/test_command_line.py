"""`recyc_jax.commands.command_line`."""

import gc
import os
import signal

import pytest

from recyc_jax.commands import command_line


# pytest warns of the exception that Python drops
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_finalizer_swallows_is_heeded_later(capsys):
    class Unlucky:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the interpreter checks for signals between bytecodes
                pass

    reached = []

    def go():
        Unlucky()
        gc.collect()
        reached.append("after the finalizer")
        command_line.heed_interrupt()
        reached.append("after heeding")

    before = signal.getsignal(signal.SIGINT)
    assert command_line.run(lambda config: go, None, "the same command goes on") == 130
    assert reached == ["after the finalizer"]
    assert "interrupted; the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    assert command_line.run(lambda config: command_line.heed_interrupt, None, "nothing") == 0  # forgotten by now
