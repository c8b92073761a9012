"""A layer's matrix products: the GPU's kernels, interpreted, against the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import triton as plt

from recyc_jax import projections, projections_gpu, rope, sharding
from recyc_jax.attention import triton
from recyc_jax.cache import LayerCache
from recyc_jax.projections import Linear, Norm, Stream, ToHeads


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton, "INTERPRET", jax.default_backend() == "cpu")


def close(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    tolerance = 1e-4 if want.dtype == jnp.float32 else 0.04
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(want, np.float32), atol=tolerance, rtol=tolerance
    )


@given(
    rows=st.sampled_from((1, 2, 5, 16, 17)),
    width=st.sampled_from((16, 100, 576)),
    heads=st.sampled_from(((4, 2, 16), (9, 3, 64), (3, 1, 80), (2, 2, 6))),
    dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_kernels_agree(rows, width, heads, dtype, bias, seed):
    """Whatever the sizes; more rows than the kernels take go the plain way."""
    rng = np.random.default_rng(seed)
    count, kv_count, dim = heads

    def made(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0] if len(shape) > 1 else 1), dtype)

    def linear(features):
        return Linear(made(width, features), made(features) if bias else None)

    x, norm, next_norm = (
        jnp.asarray(rng.normal(size=(rows, 1, width)), dtype),
        *(Norm(made(width), 1e-5) for _ in range(2)),
    )
    theta = jnp.asarray(rng.normal(size=(rows, 1, dim // 2)), jnp.float32)
    to_heads = ToHeads(linear(count * dim), linear(kv_count * dim), linear(kv_count * dim))
    cached = LayerCache(*(jnp.asarray(rng.normal(size=(rows, kv_count, 9, dim)), dtype) for _ in range(2)))
    gate, up, down = linear(70), linear(70), Linear(made(70, width))
    hidden = jnp.asarray(rng.normal(size=(rows, 1, 70)), dtype)

    def through(kind):
        """Every product, the last ones from a stream that a product has left."""
        stream = kind.begin(x, norm)
        heads = kind.heads_appended(stream, norm, to_heads, jnp.cos(theta), jnp.sin(theta), dim, cached, jnp.int32(5))
        after = kind.added(hidden, down, stream, next_norm)
        last = kind.added(hidden, down, after, None)
        return heads, kind.gated(stream, norm, gate, up), after.x, kind.gated(after, next_norm, gate, up), last.x

    for got, want in zip(jax.tree.leaves(through(projections_gpu)), jax.tree.leaves(through(projections)), strict=True):
        close(got, want)


def test_heads_are_rotated_projections():
    """The plain form against its parts."""
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 3, 8)), [rng.normal(size=(8, 8)) for _ in range(3)]
    theta = rng.normal(size=(2, 3, 2))
    linears = ToHeads(*(Linear(jnp.asarray(one, jnp.float32)) for one in weights))
    scale = rng.normal(size=8)
    cos, sin = (jnp.asarray(one, jnp.float32) for one in (np.cos(theta), np.sin(theta)))
    stream, norm = Stream(jnp.asarray(x, jnp.float32)), Norm(jnp.asarray(scale, jnp.float32), 1e-5)
    got = projections.heads(stream, norm, linears, cos, sin, 4)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    plain = [(normed @ one).reshape(2, 3, 2, 4) for one in weights]
    np.testing.assert_allclose(got.plain_q, plain[0], atol=1e-5)
    np.testing.assert_allclose(got.v, plain[2], atol=1e-5)
    for rotated, one in ((got.q, plain[0]), (got.k, plain[1])):
        np.testing.assert_allclose(rotated, rope.rotate(jnp.asarray(one, jnp.float32), cos, sin), atol=1e-5)


def test_in_float16_they_are_plain():
    """x times a norm's scale may be too large for it before it is divided by its length."""
    x, norm = jnp.full((1, 1, 16), 9000, jnp.float16), Norm(jnp.full(16, 8, jnp.float16), 1e-5)
    linear = Linear(jnp.eye(16, dtype=jnp.float16))
    out = projections_gpu.gated(projections_gpu.begin(x, norm), norm, linear, linear)
    assert np.isfinite(np.asarray(out)).all()


def test_over_a_mesh_they_are_plain():
    """XLA has to see what it splits."""
    x, norm = jnp.ones((1, 1, 16)), Norm(jnp.ones(16), 1e-5)
    linear = Linear(jnp.ones((16, 16)))

    def run(x):
        stream = projections_gpu.begin(x, norm)
        return projections_gpu.gated(stream, norm, linear, linear)

    with jax.set_mesh(sharding.mesh(1, 1, 1, jax.devices()[:1])):
        assert "pallas_call" not in str(jax.make_jaxpr(run)(x))
    assert "pallas_call" in str(jax.make_jaxpr(run)(x))


def test_calls_that_are_alike_are_traced_once(monkeypatch):
    """A model's layers call the same kernels; what is interpreted is not what is compiled."""
    traced = []

    def doubled(x_ref, out_ref, *, times):
        traced.append(times)
        plt.store(out_ref.at[jnp.arange(16)], plt.load(x_ref.at[jnp.arange(16)]) * times)

    def twice(x, times):
        shape = [jax.ShapeDtypeStruct((16,), jnp.float32)]
        for _ in range(2):
            (x,) = triton.call(doubled, [x], shape, (1,), "doubled", warps=1, stages=1, times=times)
        return x

    x = jnp.ones(16, jnp.float32)
    assert np.asarray(jax.jit(twice, static_argnums=1)(x, 2.0)).tolist() == [4.0] * 16
    assert traced == [2.0]
    jax.make_jaxpr(lambda x: twice(x, 3.0))(x)
    assert traced == [2.0, 3.0]
    if triton.INTERPRET:
        monkeypatch.setattr(triton, "INTERPRET", False)
        jax.make_jaxpr(lambda x: twice(x, 3.0))(x)
        assert traced == [2.0, 3.0, 3.0]
