"""Decoding compiled for an H100 without one: Triton and XLA compile the programs, and nothing is executed.

No step copies a cache, and a layer has no more kernels than when decoding was measured: each kernel costs some two
microseconds, whatever it does (docs/results/speed.md).
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import pytest
from h100 import STEPS, devices, shapes

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.attention import whole_sequence
from recyc_jax.attention.kept import Reads
from recyc_jax.cache import LayerCache
from recyc_jax.decoding import Call, decode_tokens
from recyc_jax.implementations import resolve
from recyc_jax.kernels.gpu.implementation import KeptSlotsByKernel
from recyc_jax.kernels.gpu.whole_sequence import recycled as recycled_by_kernel
from recyc_jax.shapes import SHAPES

pytestmark = pytest.mark.cuda_aot

RECYCLED = rj.RecycledAttention(4096, rj.FixedStride(10))
KERNELS = {"partial": 6, "full": 6}
"""Kernels per layer: the projections to heads, attention and the merge of its parts, three products."""


@pytest.fixture(scope="module", autouse=True)
def h100():
    """A mesh of one H100 to compile for. Arrays are not split over it."""
    mesh = jax.sharding.Mesh(devices(1), ("one",))
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh):
        patch.setattr(sharding, "unsplit", lambda: True)
        yield mesh


DRAFTING = rj.Lossless(rj.RecycledAttention(1024, rj.FixedStride(1)), draft_length=8)


@functools.cache
def compiled(name, layers, batch, length, policy, mesh):
    config, params, _, _, state = shapes(name, layers, batch, length, policy)

    def run(params, state):
        return decode_tokens.__wrapped__(params, state, Call(config, policy, STEPS, implementation="pallas_gpu"))

    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    options = {"in_shardings": here, "out_shardings": here, "donate_argnums": 1}
    return jax.jit(run, **options).lower(params, state).compile(), state


def in_loop(text, kind):
    """The number of kernels in the body of the loop over steps of this kind."""
    # the other computations are bodies of fusions
    for body in re.split(r"\n(?=%|ENTRY)", text):
        full, partial = "/full_attention/" in body, "/recycled_attention/" in body
        if (full, partial) == ((True, False) if kind == "full" else (False, True)) and "added_projection" in body:
            return len(re.findall(r"\s(?:fusion|custom-call|copy|dynamic-update-slice)\(", body))
    raise AssertionError(f"no loop of {kind} steps")


@pytest.mark.parametrize(
    ("model", "kind"), [("llama-3.1-8b", "partial"), ("llama-3.1-8b", "full"), ("qwen3-8b", "partial")]
)
def test_kernels_of_a_layer(h100, model, kind):
    """Qwen3's norms of heads take no kernel of their own."""
    policy = RECYCLED if kind == "partial" else rj.FullAttention()
    two, three = (in_loop(compiled(model, layers, 1, 131072, policy, h100)[0].as_text(), kind) for layers in (2, 3))
    assert three - two <= KERNELS[kind]


def test_layers_that_decide_ask_no_cond(h100):
    """Kernels check for each row whether it is due; the refresh has one `lax.cond` for all layers."""
    policy = rj.RecycledAttention(4096, rj.QuerySimilarity(10, 0.8))
    two, three = (compiled("llama-3.1-8b", layers, 1, 32768, policy, h100)[0].as_text() for layers in (2, 3))
    assert two.count(" conditional(") == three.count(" conditional(")


@pytest.mark.parametrize(
    ("name", "batch", "length", "policy"),
    [
        ("llama-3.1-8b", 1, 131072, RECYCLED),
        ("llama-3.1-8b", 8, 32768, RECYCLED),
        ("llama-3.1-8b", 1, 32768, rj.RecycledAttention(4096, rj.QuerySimilarity(10, 0.8))),
        ("llama-3.1-8b", 1, 131072, rj.Lookahead(4096, 50)),
        ("qwen2.5-0.5b", 8, 32768, rj.Lookahead(1024, 10)),
        ("llama-3.1-8b", 1, 32768, rj.SnapKV(4096, window=32)),
        ("llama-3.1-8b", 1, 32768, rj.StreamingLLM(4096, full_stride=10)),
        ("smollm2-135m", 1, 8192, rj.RecycledAttention(512, rj.FixedStride(50))),
        ("qwen3-8b", 1, 131072, RECYCLED),
        ("gemma-3-12b", 1, 131072, RECYCLED),
        ("llama-3.1-8b", 1, 131072, DRAFTING),
        ("llama-3.1-8b", 3, 131072, DRAFTING),
    ],
)
def test_no_step_copies_a_cache(h100, name, batch, length, policy):
    program, state = compiled(name, 2, batch, length, policy, h100)
    cache = state.cache.full_layers[0].stored_keys
    shape = ",".join(map(str, cache.shape))
    assert not re.findall(rf"\[{shape}\]\S* copy\(", program.as_text())
    # a refresh of two layers needs the logits of every query head, scores, and the chosen slots
    logits = batch * 4 * SHAPES[name].num_attention_heads * cache.shape[2]
    assert program.memory_analysis().temp_size_in_bytes < 4 * logits + 2**26


@pytest.mark.parametrize(
    ("dim", "dtype"), [(128, jnp.float32), (80, jnp.float32), (256, jnp.bfloat16), (96, jnp.bfloat16)]
)
def test_other_sizes_fit(h100, dim, dtype):
    """Kernels need shared memory that grows with the head dim and the size of the dtype, and that is limited."""
    here = jax.sharding.NamedSharding(h100, jax.sharding.PartitionSpec())
    q, cached, chunk = (jax.ShapeDtypeStruct(s, dtype) for s in ((2, 8, dim), (2, 2, 4096, dim), (2, 256, 8, dim)))
    starts, length = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    slots, visible = jax.ShapeDtypeStruct((2, 2, 512), jnp.int32), jax.ShapeDtypeStruct((2, 4096), jnp.bool_)

    def everything(q, keys, values, visible, slots, starts, length, chunk):
        gpu, cached, kept = resolve("pallas_gpu"), LayerCache(keys, values), KeptSlotsByKernel(slots)
        reads, rows = Reads(starts, length, 10, True), starts > 0
        return (
            gpu.full(q, cached, visible),
            gpu.full_with_log_probabilities(q, cached, visible),
            gpu.full_with_log_probabilities(q, cached, visible, rows),
            kept.attend(q, cached, reads),
            kept.attend(q, cached, reads, rows),
            gpu.chunk(chunk, cached, starts, length),
        )

    arguments = (q, cached, cached, visible, slots, starts, length, chunk)
    jax.jit(everything, in_shardings=here, out_shardings=here).lower(*arguments).compile()


def test_prefill_needs_no_square(h100):
    """Prefill of 128K tokens at Llama-3.1-8B's shape: temporary memory does not grow with the prompt."""
    here = jax.sharding.NamedSharding(h100, jax.sharding.PartitionSpec())

    def temporary(length):
        _, params, prompts, read, _ = shapes("llama-3.1-8b", 2, 1, length, rj.FullAttention())
        lowered = jax.jit(read, in_shardings=here, out_shardings=here).lower(params, *prompts)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(131072) < 1.1 * temporary(32768)


@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "budget", "evict"),
    [(64, 32, 8, 2048, False), (64, 9, 3, 512, True), (128, 32, 8, 2048, False), (96, 4, 4, 200, False)],
)
def test_recycled_training_compiles(h100, dim, heads, kv_heads, budget, evict):
    """Forward and backward pass with the heads of Llama-3.2-1B, SmolLM2-135M, Llama-3.1-8B and another model. Temporary
    memory is a few times `AT_ONCE` and a few copies of the inputs; no array is 8192 x 8192."""
    here = jax.sharding.NamedSharding(h100, jax.sharding.PartitionSpec())
    length = 8192
    recycle = whole_sequence.Recycle(1, 50, budget, evict=evict)
    arrays = [jax.ShapeDtypeStruct((1, length, n, dim), jnp.bfloat16) for n in (heads, kv_heads, kv_heads)]

    def loss(q, k, v):
        return jnp.sum(recycled_by_kernel.recycled(q, k, v, recycle, whole_sequence.causal).astype(jnp.float32))

    step = jax.jit(jax.grad(loss, (0, 1, 2)), in_shardings=here, out_shardings=here).lower(*arrays).compile()
    scores = kv_heads * 4 * length * (length // 50 + 64)
    row = 4 * length * (heads + 2 * kv_heads) * dim
    assert (
        step.memory_analysis().temp_size_in_bytes
        < 3 * min(scores, recycled_by_kernel.AT_ONCE) + recycled_by_kernel.AT_ONCE + 3 * row
    )


def test_nothing_was_run():
    assert os.environ.get("JAX_PLATFORMS") == "cpu"
