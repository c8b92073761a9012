"""Compiling for TPU on a machine without one: set before JAX first looks for devices."""

import os

import jax
import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # don't ask a cloud's metadata server what this machine is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.fixture(scope="session", autouse=True)
def compiler():
    """The TPU compiler; its absence is an error, as `-m tpu_aot` was asked for."""
    jax.config.update("jax_platforms", "cpu")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        pytest.fail("-m tpu_aot compiles for TPU and needs jax[tpu]: pip install -e '.[test,tpu]'")
