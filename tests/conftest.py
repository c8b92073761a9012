"""Every test runs under strict dtype promotion, and shapes and dtypes of annotated functions are checked at run time.

Compilation takes most of the tests' time, so programs are compiled with little optimization and cached for the other
processes of the run. XLA's HLO passes, whose result tests/test_hlo.py inspects, stay the same.
"""

import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def quick_flags():
    """XLA flags that halve the time to compile a small program for a CPU, or none if this jaxlib does not know them: an
    unknown flag ends the process. The first process of a run tries them and passes the answer on in the environment."""
    if "RECYC_JAX_TEST_FLAGS" not in os.environ:
        flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_experimental_ynn_fusion_type="
        flags += " --xla_cpu_parallel_codegen_split_count=1"
        environment = os.environ | {"XLA_FLAGS": f"{USERS_FLAGS} {flags}".strip(), "JAX_PLATFORMS": "cpu"}
        tried = [sys.executable, "-c", "import jax; jax.devices()"]
        known = subprocess.run(tried, env=environment, capture_output=True, check=False).returncode == 0
        os.environ["RECYC_JAX_TEST_FLAGS"] = flags if known else ""
    return os.environ["RECYC_JAX_TEST_FLAGS"]


USERS_FLAGS = os.environ.get("XLA_FLAGS", "")
QUICK = {"XLA_FLAGS": f"{USERS_FLAGS} {quick_flags()}".strip(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""Environment of processes that tests start on tiny models."""
os.environ["XLA_FLAGS"] = QUICK["XLA_FLAGS"]

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")  # tests compare tokens exactly; a GPU would use TF32
jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
os.environ["XLA_FLAGS"] = USERS_FLAGS  # the back end has read the flags; processes that tests start are given QUICK
install_import_hook("recyc_jax", "beartype.beartype")  # works because its modules are imported on first use

import recyc_jax as rj  # noqa: E402

ROOT = Path(__file__).parent.parent
pytest_plugins = ["training_runs", "serving"]  # fixtures of several files


def pytest_configure(config):
    """Share compiled programs between all processes of a run, including those that tests start."""
    folder = config.cache.mkdir("programs") if hasattr(config, "cache") else Path(tempfile.gettempdir())
    programs = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.02")
    jax.config.update("jax_compilation_cache_dir", programs)
    # programs that were compiled for hardware that is not here cannot be read back
    jax.config.update("jax_enable_compilation_cache", config.option.markexpr not in ("tpu_aot", "cuda_aot"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.fail(f"-m gpu asks for a GPU; JAX found {jax.devices()}")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drop the compiled programs of each module after its tests: thousands exceed a process's limit on memory maps, and
    modules that monkeypatch constants must not find programs of others."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def config(request):
    """A tiny model of two layers, or of as many as the module's LAYERS says: half the layers compile in half the time."""
    return rj.LlamaConfig.tiny(num_hidden_layers=getattr(request.module, "LAYERS", 2))


@pytest.fixture(scope="module")
def params(config):
    # four times the usual initial scale makes attention and logits far from uniform, so that selection matters
    return jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))


@pytest.fixture
def unchecked():
    """Disables the run-time type checks, which users don't have and which would fail before our own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def call_module(capsys):
    """`run_module` in this process, for commands that need no signals and no environment of their own."""

    def call(module, *args):
        status, said = called(module, *args), capsys.readouterr()
        return subprocess.CompletedProcess([module, *args], status, said.out, said.err)

    return call


def called(module, *args):
    """The exit status of `python -m MODULE ARGS`, run in this process."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):  # a package: `python -m` runs its __main__
        found = importlib.import_module(f"{module}.__main__")
    return found.main(list(map(str, args)))


@pytest.fixture
def run_module():
    """Runs `python -m MODULE ARGS` as a user would, in the checkout or another folder."""

    def run(*args, cwd=ROOT, env=None, timeout=300):
        command = [sys.executable, "-m", *map(str, args)]
        found = environment() | (env or {})
        return subprocess.run(command, cwd=cwd, env=found, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture
def start_module():
    """Starts `python -m MODULE ARGS` in the checkout and returns the process, which is killed when the test ends."""
    started = []

    def start(*args, env=None):
        command, pipes = [sys.executable, "-m", *map(str, args)], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment() | (env or {}), text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def environment(xla_flags=""):
    """The environment of processes that tests start: only the CPU, no hub, and the checkout's and the tests' modules."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    quick = QUICK | {"XLA_FLAGS": f"{QUICK['XLA_FLAGS']} {xla_flags}".strip()}
    return os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | quick


def send_when(process, ready, number):
    """Send a signal to the process as soon as `ready()` holds; the exit status."""
    until = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    return process.wait(timeout=120)
