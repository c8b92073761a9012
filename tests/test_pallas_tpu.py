"""The TPU's kernels, interpreted: many blocks, ends that fill none, every group size, against the plain functions.

tests/test_attention.py has them in the shared body, with races watched for; tests/tpu compiles them.
"""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from recyc_jax.attention import pallas_tpu, reference


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "BLOCK", 256)
        patch.setattr(pallas_tpu, "KEYS", 128)
        patch.setattr(pallas_tpu, "QUERIES", 16)
        with pltpu.force_tpu_interpret_mode():
            yield


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 2),
        "groups": st.sampled_from((1, 3, 4, 8)),
        "dim": st.sampled_from((16, 64, 128)),
        "capacity": st.integers(1, 700),
        "dtype": st.sampled_from((jnp.float32, jnp.bfloat16)),
        "seed": st.integers(0, 10**6),
    }
)


def made(shape, queries=()):
    """q, keys, values, rng; and the first slot and one past the last of each row."""
    rng = np.random.default_rng(shape["seed"])
    kv = shape["batch"], shape["kv_heads"], shape["capacity"], shape["dim"]
    q = rng.normal(size=(shape["batch"], *queries, kv[1] * shape["groups"], kv[3])) * 3
    arrays = (jnp.asarray(x, shape["dtype"]) for x in (q, rng.normal(size=kv), rng.normal(size=kv)))
    length = int(rng.integers(1, shape["capacity"] + 1))
    starts = jnp.asarray(rng.integers(0, length, shape["batch"]), jnp.int32)
    return *arrays, starts, length, rng


def tolerance(shape):
    return 2e-2 if shape["dtype"] == jnp.bfloat16 else 2e-5  # a rounding of the output, or of the sums' order


@given(shapes)
@settings(max_examples=5, deadline=None, derandomize=True)
def test_full(shape):
    q, keys, values, starts, length, _ = made(shape)
    slots = jnp.arange(shape["capacity"])
    visible = (slots >= starts[:, None]) & (slots < length)
    want, want_scores = reference.full_with_scores(q, keys, values, visible)
    out, scores = pallas_tpu.full_with_scores(q, keys, values, visible)
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=tolerance(shape))
    seen = np.broadcast_to(visible[:, None], scores.shape)
    np.testing.assert_allclose(np.asarray(scores)[seen], np.asarray(want_scores)[seen], atol=1e-4)
    np.testing.assert_array_equal(pallas_tpu.full(q, keys, values, visible), out)


@given(shapes, st.floats(0, 1))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_compact(shape, share):
    """Bit for bit: a one-hot product moves numbers and changes none."""
    _, keys, values, _, _, rng = made(shape)
    chosen = jnp.asarray(rng.random(keys.shape[:3]) < share)
    most = max(1, int(jnp.max(jnp.sum(chosen, axis=2))))
    want = reference.compact(keys, values, chosen, most)
    for got, expected in zip(pallas_tpu.compact(keys, values, chosen, most), want, strict=True):
        np.testing.assert_array_equal(got[:, :, :most], expected)
        assert not np.asarray(got[:, :, most:], np.float32).any()


@given(shapes, st.integers(1, 70))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_chunk(shape, queries):
    """Queries in the cache's last slots, and in whatever chunk the length allows."""
    shape = shape | {"capacity": max(shape["capacity"], queries)}
    q, keys, values, starts, length, _ = made(shape, (queries,))
    offset = jnp.int32(min(length, shape["capacity"] // queries * queries) // queries * queries)
    offset = jnp.minimum(offset, shape["capacity"] - queries)
    offset = offset // queries * queries  # the plain function wants whole chunks
    want = reference.chunk(q, keys, values, starts, offset).astype(jnp.float32)
    got = pallas_tpu.chunk(q, keys, values, starts, offset).astype(jnp.float32)
    real = np.asarray(offset + jnp.arange(queries) >= starts[:, None])
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=tolerance(shape))
    assert np.isfinite(np.asarray(got)).all()


ON_A_MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from recyc_jax import sharding
from recyc_jax.attention import pallas_tpu, reference

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 4, 16), (2, 2, 300, 16), (2, 2, 300, 16))))
visible = (jnp.arange(300) >= jnp.array([[0], [140]])) & (jnp.arange(300) < 290)
chosen = jax.random.bernoulli(keys[0], 0.3, (2, 2, 300))
starts = jnp.array([0, 140], jnp.int32)
with jax.set_mesh(sharding.mesh(2, 1, 2)), pltpu.force_tpu_interpret_mode():
    for name, arguments, static in (
        ("full", (q, k, v, visible), ()),
        ("full_with_scores", (q, k, v, visible), ()),
        ("compact", (k, v, chosen), (256,)),
        ("chunk", (jnp.stack([q] * 4, axis=1), k, v, starts, jnp.int32(280)), ()),
    ):
        got = jax.jit(lambda *a: getattr(pallas_tpu, name)(*a, *static))(*arguments)
        want = getattr(reference, name)(*arguments, *static)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            kept = visible[:, None] if one.shape[1:] == (2, 300) else True
            np.testing.assert_allclose(np.where(kept, one, 0), np.where(kept, other, 0), atol=1e-5)
        print(name, len(jax.tree.leaves(got)[0].sharding.device_set))
"""


def test_heads_and_rows_split_over_a_mesh():
    """Kernels are split by hand: XLA can't."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", ON_A_MESH], env=os.environ | flags, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["full", "4", "full_with_scores", "4", "compact", "4", "chunk", "4"]
