"""The TPU kernels, interpreted, against the plain functions: many blocks, partial last blocks, every group size.

tests/test_attention.py runs the kernels in the shared tests and detects races; tests/tpu compiles them.
"""

import subprocess
import sys

import in_pieces
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from recyc_jax.attention import reference
from recyc_jax.kernels.tpu import compaction, decode_attention, prefill_attention


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_attention, "BLOCK", 256)
        patch.setattr(compaction, "BLOCK", 256)
        patch.setattr(prefill_attention, "KEYS", 128)
        patch.setattr(prefill_attention, "QUERIES", 16)
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
    """q, keys, values, the first slot of each row (`starts`), the number of slots written (`length`), and rng."""
    rng = np.random.default_rng(shape["seed"])
    kv = shape["batch"], shape["kv_heads"], shape["capacity"], shape["dim"]
    q = rng.normal(size=(shape["batch"], *queries, kv[1] * shape["groups"], kv[3])) * 3
    arrays = (jnp.asarray(x, shape["dtype"]) for x in (q, rng.normal(size=kv), rng.normal(size=kv)))
    length = int(rng.integers(1, shape["capacity"] + 1))
    starts = jnp.asarray(rng.integers(0, length, shape["batch"]), jnp.int32)
    return *arrays, starts, length, rng


def tolerance(shape):
    return 2e-2 if shape["dtype"] == jnp.bfloat16 else 2e-5  # rounding of the output, or of sums in another order


@given(shapes)
@settings(max_examples=3, deadline=None, derandomize=True)
def test_full(shape):
    q, keys, values, starts, length, _ = made(shape)
    slots = jnp.arange(shape["capacity"])
    visible = (slots >= starts[:, None]) & (slots < length)
    want, want_scores = reference.full_with_log_probabilities(q, keys, values, visible)
    out, scores = decode_attention.full_with_log_probabilities(q, keys, values, visible)
    np.testing.assert_allclose(out.astype(jnp.float32), want.astype(jnp.float32), atol=tolerance(shape))
    seen = np.broadcast_to(visible[:, None, None], scores.shape)
    np.testing.assert_allclose(np.asarray(scores)[seen], np.asarray(want_scores)[seen], atol=1e-4)
    np.testing.assert_array_equal(decode_attention.full(q, keys, values, visible), out)


@given(shapes, st.floats(0, 1))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_compact(shape, share):
    """The result is bitwise exact: a product with a one-hot matrix moves numbers without changing them."""
    _, keys, values, _, _, rng = made(shape)
    chosen = jnp.asarray(rng.random(keys.shape[:3]) < share)
    most = max(1, int(jnp.max(jnp.sum(chosen, axis=2))))
    want = in_pieces.compact(keys, values, chosen, most)
    for got, expected in zip(compaction.compact(keys, values, chosen, most), want, strict=True):
        np.testing.assert_array_equal(got[:, :, :most], expected)
        assert not np.asarray(got[:, :, most:], np.float32).any()


@given(shapes, st.integers(1, 70))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_chunk(shape, queries):
    """Queries in any whole chunk that the length allows, up to the last slots of the cache."""
    shape = shape | {"capacity": max(shape["capacity"], queries)}
    q, keys, values, starts, length, _ = made(shape, (queries,))
    offset = jnp.int32(min(length, shape["capacity"] // queries * queries) // queries * queries)
    offset = jnp.minimum(offset, shape["capacity"] - queries)
    offset = offset // queries * queries  # the plain function needs whole chunks
    want = reference.chunk(q, keys, values, starts, offset).astype(jnp.float32)
    got = prefill_attention.chunk(q, keys, values, starts, offset).astype(jnp.float32)
    real = np.asarray(offset + jnp.arange(queries) >= starts[:, None])
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=tolerance(shape))
    assert np.isfinite(np.asarray(got)).all()


ON_A_MESH = """
import sys
import in_pieces
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from recyc_jax import sharding
from recyc_jax.attention import reference
from recyc_jax.kernels.tpu import compaction, decode_attention, prefill_attention

keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 4, 16), (2, 2, 300, 16), (2, 2, 300, 16))))
visible = (jnp.arange(300) >= jnp.array([[0], [140]])) & (jnp.arange(300) < 290)
chosen = jax.random.bernoulli(keys[0], 0.3, (2, 2, 300))
starts = jnp.array([0, 140], jnp.int32)
with jax.set_mesh(sharding.mesh(2, 1, 2)), pltpu.force_tpu_interpret_mode():
    for name, kernels, plain, arguments, static in (
        ("full", decode_attention, reference, (q, k, v, visible), ()),
        ("full_with_log_probabilities", decode_attention, reference, (q, k, v, visible), ()),
        ("compact", compaction, in_pieces, (k, v, chosen), (256,)),
        ("chunk", prefill_attention, reference, (jnp.stack([q] * 4, axis=1), k, v, starts, jnp.int32(280)), ()),
    ):
        got = jax.jit(lambda *a: getattr(kernels, name)(*a, *static))(*arguments)
        want = getattr(plain, name)(*arguments, *static)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            kept = visible[:, None, None] if one.shape[-1] == 300 else True
            np.testing.assert_allclose(np.where(kept, one, 0), np.where(kept, other, 0), atol=1e-5)
        print(name, len(jax.tree.leaves(got)[0].sharding.device_set))
"""


def test_heads_and_rows_split_over_a_mesh():
    """Our code splits kernels over a mesh, because XLA cannot."""
    env = environment("--xla_force_host_platform_device_count=4")
    ran = subprocess.run([sys.executable, "-c", ON_A_MESH], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["full", "4", "full_with_log_probabilities", "4", "compact", "4", "chunk", "4"]
