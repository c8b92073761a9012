"""Every CI run compiles for TPU: programs fit into memory, copy no cache, and use only the intended collectives.

`python tests/tpu/matrix.py` compiles all programs (docs/results/tpu.md).
"""

import importlib.util

import aot
import jax
import pytest

pytestmark = pytest.mark.tpu_aot


@pytest.fixture(autouse=True, scope="module")
def compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("-m tpu_aot compiles for TPU and needs jax[tpu]: pip install -e '.[test,tpu]'")
    jax.config.update("jax_platforms", "cpu")  # libtpu only compiles; there is no TPU


ON = [("llama-3.2-1b", "v5e"), ("llama-3.2-1b", "v6e"), ("llama-3.1-8b", "v5e 2x4"), ("llama-3.1-8b", "v6e 2x2")]


OTHERS = [("recycled", model, "v6e 2x2") for model in ("qwen3-8b", "gemma-3-12b")]
OTHERS += [("lookahead", "llama-3.2-1b", "v6e")]
PROGRAMS = [(name, *on) for name in ("prefill", "full", "recycled", "dynamic") for on in ON] + OTHERS


@pytest.mark.parametrize(("program", "model", "machine"), PROGRAMS)
def test_decoding(program, model, machine):
    report = aot.decoding(machine, model, program, 32768)
    report.check(aot.MACHINES[machine])
    # sums over split heads, features and vocabulary, and the greedy choice over the whole vocabulary
    assert set(report.collectives) <= {"all-reduce"}, report
    assert bool(report.collectives) == (aot.MACHINES[machine].tensor > 1), report


def test_training():
    report = aot.training_step("v5e 2x4, training", "llama-3.2-1b", "strided")
    report.check(aot.MACHINES["v5e 2x4, training"])
    # parameters are gathered (partly by permutes that overlap with matrix products), gradients are summed, and the rows
    # of the embedding, which is split over both axes, take one all-to-all
    assert set(report.collectives) <= {*aot.COLLECTIVES}, report
    assert report.collectives.get("all-to-all", 0) <= 1, report


def test_a_copy_would_be_seen():
    """Check of the check: the reference implementation, which gathers by index, transposes a cache at each refresh."""
    report = aot.decoding("v5e", "llama-3.2-1b", "recycled", 32768, implementation="reference")
    assert report.copies > 0
    with pytest.raises(AssertionError, match=r"recycled of llama-3.2-1b at 32768 tokens on v5e: \d+"):
        report.check(aot.MACHINES["v5e"])
