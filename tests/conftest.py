"""Every test runs under strict dtype promotion, with shapes and dtypes of annotated functions checked at run time."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")

with install_import_hook("recyc_jax", "beartype.beartype"):
    import recyc_jax as rj

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    """GPU tests asked for (-m gpu) on a machine without a GPU are an error of the caller: say so, don't pass."""
    if any(item.get_closest_marker("gpu") for item in items) and os.environ.get("RECYC_JAX_REQUIRE_GPU"):
        assert jax.default_backend() == "gpu", f"no GPU: JAX found {jax.devices()}"


@pytest.fixture(scope="session")
def config():
    return rj.LlamaConfig.tiny()


@pytest.fixture(scope="session")
def params(config):
    # four times the usual initial scale: attention and logits far from uniform, so that selection matters
    return jax.tree.map(lambda leaf: 4 * leaf, rj.init_params(config, jax.random.key(0)))


@pytest.fixture
def run_module():
    """Run `python -m MODULE ARGS` as a user would, from the checkout or elsewhere."""

    def run(*args, cwd=ROOT, env=None, timeout=300):
        return subprocess.run(
            [sys.executable, "-m", *map(str, args)],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
