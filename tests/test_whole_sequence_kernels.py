"""Outputs and gradients of recycled attention in training: the GPU kernels, interpreted, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recyc_jax as rj
from recyc_jax import sharding, training_implementations
from recyc_jax.attention import whole_sequence
from recyc_jax.attention.whole_sequence import Recycle
from recyc_jax.kernels.gpu import triton_call
from recyc_jax.kernels.gpu.whole_sequence import backward
from recyc_jax.kernels.gpu.whole_sequence import forward as kernels_forward
from recyc_jax.kernels.gpu.whole_sequence import recycled as kernels
from train import forward, step


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")


def arrays(width, heads=4, kv_heads=2, dim=8, rows=1, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, width, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


# interpreted kernels take long to compile and little time to run
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames="attend", compiler_options=QUICK)
def out_and_gradients(attend, q, k, v, weights):
    def loss(q, k, v):
        out = attend(q, k, v)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def assert_alike(recycle, inputs, atol=5e-5):
    plain = out_and_gradients(lambda q, k, v: whole_sequence.recycled(q, k, v, recycle), *inputs)
    ours = out_and_gradients(lambda q, k, v: kernels.recycled(q, k, v, recycle, whole_sequence.causal), *inputs)
    for name, expected, got in zip(("out", "q", "k", "v"), plain, ours, strict=True):
        assert got.dtype == expected.dtype
        expected, got = (np.asarray(x, np.float32) for x in (expected, got))
        np.testing.assert_allclose(got, expected, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("width", "recycle", "more"),
    [
        (41, Recycle(30, 12, 7), {"rows": 2}),  # the paper's form
        (41, Recycle(13, 7, 3, pool=3, lookahead=2, evict=True), {"kv_heads": 4}),
        pytest.param(41, Recycle(4, 9, 50, evict=True), {"heads": 3, "kv_heads": 1, "dim": 24}, marks=pytest.mark.slow),
        (100, Recycle(3, 23, 40), {"heads": 8, "kv_heads": 1}),  # several tiles of rows and of entries
    ],
)
def test_kernels_do_what_the_plain_form_does(width, recycle, more):
    assert_alike(recycle, arrays(width, **more))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_form_far_and_wide(data):
    width, kv_heads = data.draw(st.integers(2, 90)), data.draw(st.integers(1, 2))
    recycle = Recycle(
        prefix=data.draw(st.integers(1, width - 1)),
        stride=data.draw(st.integers(1, width + 5)),  # 1: every token selects; longer than the row: one segment
        budget=data.draw(st.integers(1, width + 5)),
        pool=data.draw(st.sampled_from([1, 3, 7])),
        lookahead=data.draw(st.integers(0, 6)),
        evict=data.draw(st.booleans()),
    )
    heads = kv_heads * data.draw(st.integers(1, 8))
    inputs = arrays(width, heads, kv_heads, data.draw(st.sampled_from([8, 16, 24])), seed=data.draw(st.integers(0, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_call, "INTERPRET", jax.default_backend() == "cpu")
        assert_alike(recycle, inputs)


def test_segments_of_more_rows_than_a_program_takes(monkeypatch):
    """Separate programs compute the gradients of queries and of entries."""
    monkeypatch.setattr(backward, "SEGMENT", backward.SEGMENT._replace(rows=32))
    monkeypatch.setattr(backward, "QUERIES", backward.QUERIES._replace(rows=32))
    assert_alike(Recycle(3, 17, 20), arrays(60, heads=4, kv_heads=1))


def test_long_sequences_go_in_parts(monkeypatch):
    """Few selecting tokens are scored at a time, and the entry gradients of few segments are in memory at a time."""
    monkeypatch.setattr(kernels, "AT_ONCE", 1 << 12)
    monkeypatch.setattr(kernels_forward, "SCORES", kernels_forward.SCORES._replace(rows=16))
    assert_alike(Recycle(2, 3, 6), arrays(80, heads=2, kv_heads=1))


def test_bfloat16():
    """The selection is the same, because the budget holds everything. The tolerance allows for sums of a hundred
    products of bfloat16 numbers."""
    assert_alike(Recycle(5, 9, 60), arrays(60, dtype=jnp.bfloat16), atol=0.2)


def test_the_kernels_in_a_model_are_score(params, config):
    tokens = jax.random.randint(jax.random.key(0), (1, 30), 0, config.vocab_size)
    recycle = Recycle(7, 6, 5)
    expected = rj.score(
        params, config, tokens, policy=rj.RecycledAttention(5, rj.FixedStride(6), evict=True), context_length=7
    )

    def attention(q, k, v, segments):
        return kernels.recycled(q, k, v, recycle._replace(evict=True), whole_sequence.causal)

    stacked = forward.stack_layers(params, config.num_hidden_layers)
    got = -jax.jit(lambda params: forward.token_losses(params, config, tokens, None, attention))(stacked)
    np.testing.assert_allclose(got[:, 6:], expected, atol=2e-4)


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("recycle", [None, Recycle(1, 8, 16), Recycle(20, 9, 16)])
def test_the_gradient_neither_selects_nor_attends_again(config, remat, recycle, monkeypatch):
    """Attention runs over a mesh, as in training."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda *_, **__: 91000)  # traced only: cuDNN need not be there
    params = jax.eval_shape(lambda: forward.stack_layers(rj.init_params(config, jax.random.key(0), jnp.bfloat16), 2))
    attention = step.attention_over(
        sharding.mesh(1, 1, 1, jax.devices()[:1]), training_implementations.attention("pallas", recycle)
    )

    def loss(params, tokens):
        return jnp.sum(forward.token_losses(params, config, tokens, None, attention, remat=remat))

    traced = jax.make_jaxpr(jax.grad(loss))(params, jax.ShapeDtypeStruct((1, 64), jnp.int32))
    names = [called(equation) for equation in jaxprs.equations(traced.jaxpr)]
    for name in ("dot_product_attention_fwd_wrapper", "selecting_attention", "selection_scores", "recycled_segments"):
        there = (recycle is None or recycle.prefix > 1) if name.startswith("dot") else recycle is not None
        assert names.count(name) == there, name


def called(equation):
    """The name of an equation's kernel, or of its primitive."""
    if equation.primitive.name != "pallas_call":
        return equation.primitive.name
    return str(equation.params.get("name") or equation.params["name_and_src_info"].name)


def test_names_and_what_they_need():
    with pytest.raises(ValueError, match="attention='triton' is unknown; there is reference, cudnn, pallas"):
        training_implementations.attention("triton", None)
    assert training_implementations.lacking("reference", "float32", 64, packed=True) == []
    lacking = training_implementations.lacking("pallas", "float32", 256, packed=True)
    assert lacking[0].startswith("an NVIDIA GPU of compute capability 8.0, 9.0")
    assert lacking[1:] == [
        "a 16-bit dtype",
        "one document a row",
        "a head dimension that is a multiple of 8, at most 128",
    ]
    assert training_implementations.best(recycle=True, dtype="bfloat16", head_dim=64, packed=False) == "reference"


def test_the_best_there_is_on_a_gpu(monkeypatch):
    monkeypatch.setattr(training_implementations, "_capability", lambda: "9.0")
    best = functools.partial(training_implementations.best, dtype="bfloat16", head_dim=64)
    assert best(recycle=True, packed=False) == "pallas"
    assert best(recycle=False, packed=False) == "cudnn"
    assert best(recycle=False, packed=True) == "reference"
    monkeypatch.setattr(training_implementations, "_imports", lambda module: False)  # a JAX without the Triton backend
    assert best(recycle=True, packed=False) == "cudnn"
    assert training_implementations.lacking("pallas", "bfloat16", 64, packed=False) == [
        "a JAX with Pallas' Triton backend"
    ]
    monkeypatch.setattr(
        training_implementations, "_capability", lambda: "8.9"
    )  # less shared memory than the kernels need
    assert best(recycle=True, packed=False) == "cudnn"
    monkeypatch.setattr(training_implementations, "_capability", lambda: "gfx942")
    assert best(recycle=True, packed=False) == "reference"
