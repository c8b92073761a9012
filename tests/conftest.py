"""Every test runs under strict dtype promotion, with shapes and dtypes of annotated functions checked at run time."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")  # token-for-token laws; a GPU would take TF32

with install_import_hook("recyc_jax", "beartype.beartype"):
    import recyc_jax as rj

ROOT = Path(__file__).parent.parent


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.fail(f"-m gpu asks for a GPU; JAX found {jax.devices()}")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Each module's compiled programs are dropped after it: thousands at once exceed what a process may map."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def config():
    return rj.LlamaConfig.tiny()


@pytest.fixture(scope="session")
def params(config):
    # four times the usual initial scale: attention and logits far from uniform, so that selection matters
    return jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))


@pytest.fixture
def unchecked():
    """Without the run-time type checks, which would come before our own: users don't have them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Commands that tests start share their compiled programs, which most of their time goes to. (This process has read its
    own settings already.)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        yield


@pytest.fixture
def call_module(capsys):
    """As `run_module`, without a process of its own: for what ends before there is work."""

    def call(module, *args):
        status = importlib.import_module(module).main(list(map(str, args)))
        said = capsys.readouterr()
        return subprocess.CompletedProcess([module, *args], status, said.out, said.err)

    return call


@pytest.fixture
def run_module():
    """Run `python -m MODULE ARGS` as a user would, from the checkout or elsewhere."""

    def run(*args, cwd=ROOT, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", *map(str, args)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
