"""The stack of decoder layers in a decode step: the GPU kernels, interpreted, against the model's own layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family_shapes import GEMMA_3, OLMO, windows
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import triton as plt

import recyc_jax as rj
from recyc_jax import implementations, model, rope, sharding
from recyc_jax.attention import reference
from recyc_jax.attention.implementation import Implementation
from recyc_jax.cache import LayerCache, visible
from recyc_jax.cached_attention import CachedAttention
from recyc_jax.kernels.gpu import decoder_layers, products, triton_call
from recyc_jax.kernels.gpu.products import Linear
from recyc_jax.shapes import SHAPES

SLOT, CAPACITY = 5, 9


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")


def close(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    # bfloat16: sums over two layers, rounded in a different order, up to some units in the last place of their largest
    tolerance = 2e-4 if want.dtype == jnp.float32 else 0.06
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, atol=tolerance * max(1, np.abs(want).max() / 2), rtol=tolerance)


def read(layer, heads, cached, state):
    """Attend to everything, and add the queries before RoPE, so that every output of the projections is used."""
    seen = visible(jnp.zeros(heads.q.shape[0], jnp.int32), jnp.int32(SLOT + 1), CAPACITY)
    out = reference.full(heads.q[:, 0], cached.keys, cached.values, seen)
    return (out + heads.q_before_rope[:, 0])[:, None], state


@given(
    rows=st.sampled_from((1, 2, 5, 16)),
    width=st.sampled_from((16, 100, 576)),
    heads=st.sampled_from(((4, 2, 16), (9, 3, 64), (3, 1, 80))),
    dtype=st.sampled_from((jnp.float32, jnp.bfloat16)),
    bias=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=2, deadline=None, derandomize=True)
def test_kernels_agree(rows, width, heads, dtype, bias, seed):
    """Outputs, heads and caches agree for any sizes, over two layers, so that one layer's stream feeds the next."""
    count, kv_count, dim = heads
    config = rj.LlamaConfig.tiny(
        hidden_size=width,
        intermediate_size=70,
        num_attention_heads=count,
        num_key_value_heads=kv_count,
        head_dim=dim,
        qkv_bias=bias,
    )
    agree(config, rows, dtype, seed)


LIKE = {
    "qwen3": dict(qk_norm="head"),
    "qwen3_many_heads": dict(qk_norm="head", num_attention_heads=32, num_key_value_heads=8, head_dim=32),
    "qwen3_wide_heads": dict(qk_norm="head", head_dim=80, qkv_bias=True),
    "olmo": OLMO,
    "phi": dict(partial_rotary_factor=0.75),
    "smollm3": dict(layers_without_rope=(0,)),
    "ministral3": dict(rope_scaling=rj.RopeScaling("yarn", 4.0, llama_4_scaling_beta=0.3)),
    "gemma3": GEMMA_3 | windows(CAPACITY, "sf"),
}


@pytest.mark.parametrize("family", LIKE)
@pytest.mark.parametrize(("rows", "dtype"), [(3, jnp.float32), (16, jnp.bfloat16)], ids=["float32", "bfloat16"])
def test_families_agree(family, rows, dtype):
    shape = dict(hidden_size=96, intermediate_size=70, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    agree(rj.LlamaConfig.tiny(**shape | LIKE[family]), rows, dtype, seed=5)


@pytest.mark.parametrize("family", ["bias", "qwen3", "phi", "smollm3"])
def test_projections_in_shares(family, monkeypatch):
    """Where a device has few heads, programs multiply shares of the features, which the next kernel adds up; the last
    share may be smaller than the others."""
    monkeypatch.setattr(products, "LEAST_SHARE", 16)
    monkeypatch.setattr(products, "SHARE", products.SHARE._replace(depth=16))
    shape = dict(hidden_size=112, intermediate_size=70, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    config = rj.LlamaConfig.tiny(**shape | ({"qkv_bias": True} if family == "bias" else LIKE[family]))
    assert products.shares(config) == 4
    agree(config, 3, jnp.float32, 7, in_shares=True)


def test_which_projections_are_split():
    """Llama-3.1-8B has programs enough on one device, its parts on two and four devices have not."""
    parts = (dict(num_attention_heads=32 // n, num_key_value_heads=8 // n) for n in (1, 2, 4))
    large = SHAPES["llama-3.1-8b"]
    shapes = [dataclasses.replace(large, **part) for part in parts]
    assert [products.makes_heads_at_once(shape) for shape in shapes] == [True, False, False]
    assert [products.shares(shape) for shape in shapes] == [1, 2, 4]
    assert products.shares(SHAPES["smollm2-135m"]) == 1


def agree(config, rows, dtype, seed, in_shares=False):
    with pytest.MonkeyPatch.context() as patch:
        if not in_shares:  # as where there are heads enough
            patch.setattr(products, "SHARE_PROGRAMS", 0)
        agree_as_set(config, rows, dtype, seed)


def agree_as_set(config, rows, dtype, seed):
    rng = np.random.default_rng(seed)
    kv_count, dim, width = config.num_key_value_heads, config.head_dim, config.hidden_size
    shapes = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0), dtype))
    mean = 0.0 if config.norm_scale == "one_plus" else 1.0

    def leaf(shape):  # norms near one, so that rounding is not amplified
        drawn = rng.normal(size=shape)
        return jnp.asarray(drawn / np.sqrt(shape[0]) if len(shape) > 1 else mean + 0.3 * drawn, dtype)

    params = jax.tree.map(lambda one: leaf(one.shape), shapes)
    x = jnp.asarray(rng.normal(size=(rows, 1, width)), dtype)
    positions = jnp.asarray(rng.integers(0, 500, (rows, 1)), jnp.int32)
    by_layer = rope.by_layer(config, positions, positions[:, 0] + 1)
    states = tuple(
        (
            LayerCache(
                *(jnp.asarray(rng.normal(size=(rows, kv_count, CAPACITY, dim)), dtype) for _ in range(2)),
                window=config.window(layer),
            ),
            None,
        )
        for layer in range(2)
    )
    attend = CachedAttention(jnp.int32(SLOT), jnp.zeros(rows, jnp.int32), Implementation(), read)
    run = implementations.resolve("pallas_gpu").decoder_layers(config, rows, dtype)
    assert run is decoder_layers.run
    got = run(params, config, x, by_layer, attend, states)
    want = model.Llama(config).apply({"params": params}, x, by_layer, attend, states, method="decoder_layers")
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, other)


def test_a_projection_added_to_the_stream():
    """One product against numpy, with and without a norm after it (the last layer has none)."""
    rng = np.random.default_rng(0)
    x, residual, kernel = rng.normal(size=(2, 1, 70)), rng.normal(size=(2, 1, 48)), rng.normal(size=(70, 48))
    scale = rng.normal(size=48)
    x, residual, kernel, scale = (jnp.asarray(one, jnp.float32) for one in (x, residual, kernel, scale))
    want = residual + x @ kernel
    for norm in (scale, None):
        stream = products.added(x, Linear(kernel), products.begin(residual, scale), norm)
        np.testing.assert_allclose(stream.x, want, atol=1e-4)
    assert stream.scaled is None
    stream = products.added(x, Linear(kernel), products.begin(residual, scale), scale)
    np.testing.assert_allclose(stream.scaled, want * scale, atol=1e-3)
    np.testing.assert_allclose(stream.squares.sum(axis=-1), (want**2).sum(axis=-1), rtol=1e-4)


def test_where_the_models_own_layers_run(config, caplog, monkeypatch):
    """The model's own layers run for too many rows; for float16, in which x times a norm's scale can overflow; for a
    head dimension with too few contiguous columns; and over devices that share a row's heads where they do not divide or
    are normed together."""
    gpu = implementations.resolve("pallas_gpu")
    wide = dataclasses.replace(config, head_dim=16)
    assert gpu.decoder_layers(wide, 16, jnp.bfloat16) is decoder_layers.run
    assert gpu.decoder_layers(wide, 17, jnp.bfloat16) is None
    assert gpu.decoder_layers(wide, 1, jnp.float16) is None
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert gpu.decoder_layers(dataclasses.replace(config, head_dim=6), 1, jnp.bfloat16) is None
    assert [record.message.split(":")[0] for record in caplog.records] == ["head_dim=6 is no multiple of 16"]
    assert implementations.resolve("reference").decoder_layers(wide, 1, jnp.bfloat16) is None
    with jax.set_mesh(sharding.mesh(1, 1, 1, jax.devices()[:1])):
        assert gpu.decoder_layers(wide, 1, jnp.bfloat16) is decoder_layers.run
    monkeypatch.setattr(sharding, "split_of", lambda rows: sharding.Split(rows // 4, 2))
    assert gpu.decoder_layers(wide, 64, jnp.bfloat16) is decoder_layers.run
    assert gpu.decoder_layers(dataclasses.replace(wide, qk_norm="projection"), 4, jnp.bfloat16) is None
    assert gpu.decoder_layers(dataclasses.replace(wide, num_key_value_heads=1), 4, jnp.bfloat16) is None


def test_calls_that_are_alike_are_traced_once(monkeypatch):
    """Layers call the same kernels, so each is traced once, and once more if it is compiled instead of interpreted."""
    traced = []

    def doubled(x_ref, out_ref, *, times):
        traced.append(times)
        plt.store(out_ref.at[jnp.arange(16)], plt.load(x_ref.at[jnp.arange(16)]) * times)

    def twice(x, times):
        shape = [jax.ShapeDtypeStruct((16,), jnp.float32)]
        for _ in range(2):
            (x,) = triton_call.call(doubled, [x], shape, (1,), "doubled", warps=1, stages=1, times=times)
        return x

    x = jnp.ones(16, jnp.float32)
    assert np.asarray(jax.jit(twice, static_argnums=1)(x, 2.0)).tolist() == [4.0] * 16
    assert traced == [2.0]
    jax.make_jaxpr(lambda x: twice(x, 3.0))(x)
    assert traced == [2.0, 3.0]
    if triton_call.INTERPRET:
        monkeypatch.setattr(triton_call, "INTERPRET", False)
        jax.make_jaxpr(lambda x: twice(x, 3.0))(x)
        assert traced == [2.0, 3.0, 3.0]
