"""What a step must read, and the commands that estimate and measure its time."""

import json

import jax
import jax.numpy as jnp
import pytest
from checkpoints import write_folder
from conftest import environment

import recyc_jax as rj
from eval.speed import roofline
from eval.waterfall.__main__ import bytes_read
from recyc_jax.commands import measuring
from recyc_jax.shapes import SHAPES

SET = rj.RecycledAttention(4096, rj.FixedStride(10))


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_that_are_made(name):
    shapes = jax.eval_shape(lambda: rj.init_params(SHAPES[name], jax.random.key(0), jnp.bfloat16))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    embedding = 0 if SHAPES[name].tie_word_embeddings else shapes["embedding"].size * 2
    assert roofline.weight_bytes(SHAPES[name]) == (held, held - embedding)


def test_cache_is_what_prefill_makes():
    config = rj.LlamaConfig.tiny()
    params = rj.init_params(config, jax.random.key(0))
    state = rj.prefill(params, config, [[1, 2, 3, 4]], max_new_tokens=13)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers))
    assert roofline.token_bytes(config, size=4) * state.cache.capacity == held


@pytest.mark.parametrize(
    ("batch", "length", "kind", "stride", "measured"),
    [  # ms, the best that prototype kernels reached on an H100 (docs/results/estimate.md)
        (1, 131072, "partial", 10, 5.77),
        (1, 131072, "full", 10, 11.58),
        (1, 131072, "refresh", 10, 13.25),
        (1, 131072, "mean", 50, 5.89),
        (8, 32768, "partial", 10, 7.46),
        (8, 32768, "refresh", 10, 21.04),
        (8, 32768, "mean", 50, 7.86),
    ],
)
def test_estimates_are_within_a_fifth_of_what_was_reached(batch, length, kind, stride, measured):
    policy = rj.FullAttention() if kind == "full" else rj.RecycledAttention(4096, rj.FixedStride(stride))
    found = roofline.estimate(SHAPES["llama-3.1-8b"], policy, batch, length)
    h100 = roofline.DEVICES["h100"]
    steps = {"partial": found.partial, "full": found.full, "refresh": found.full}
    estimated = found.milliseconds(h100) if kind == "mean" else steps[kind].milliseconds(h100)
    assert 0.8 * measured <= estimated <= measured


def test_tokens_read():
    """A full step reads all, and what a method reads in order to choose counts."""
    shape, length = SHAPES["qwen2.5-0.5b"], 32768
    for text, tokens in {
        "full": length,
        "recycled:budget=1024,stride=10": (9 * 1024 + length) / 10,
        "lookahead:budget=1024,stride=50,remainder=false": (49 * 1024 + length + 1024) / 50,
        "lookahead:budget=1024,stride=50": (49 * (1024 + 2 * 7) + length + 1024) / 50,  # 7 heads a group, in float32
        "snapkv:budget=1024": 1024,
        "quest:budget=1024": (2 * length + 22 * (1024 + length / 16)) / 24,
        "top_k:budget=1024": length / 2 + 1024,
    }.items():
        assert roofline.tokens_read(shape, rj.parse_policy(text), length) == pytest.approx(tokens, rel=1e-3)
    dynamic = rj.parse_policy("recycled:budget=1024,check_every=5,threshold=0.9")
    assert roofline.tokens_read(shape, dynamic, length, stride=20) == pytest.approx((19 * 1024 + length) / 20, rel=1e-3)


def test_a_mean_lies_between_its_steps_and_copies_cost():
    for batch, length in ((1, 8192), (8, 131072)):
        for copies in (False, True):
            found = roofline.estimate(SHAPES["llama-3.1-8b"], SET, batch, length, copies)
            ms = [one.milliseconds(roofline.DEVICES["v5e"]) for one in (found.partial, found, found.full)]
            assert ms == sorted(ms)
        plain = roofline.estimate(SHAPES["llama-3.1-8b"], SET, batch, length)
        assert plain.full.bytes < found.full.bytes
        assert plain.partial.bytes < found.partial.bytes


def test_a_large_batch_of_a_short_context_computes():
    found = roofline.estimate(SHAPES["llama-3.1-8b"], rj.FullAttention(), 4096, 16)
    h100 = roofline.DEVICES["h100"]
    assert found.full.milliseconds(h100) == pytest.approx(1000 * found.full.operations / 989e12)
    assert found.full.milliseconds(h100, chips=2) == pytest.approx(found.full.milliseconds(h100) / 2)


def test_estimate_says_where_it_pays_and_what_does_not_fit(call_module):
    policies = ["--policies", "full", "recycled:budget=4096,stride=10"]
    ran = call_module(
        "eval.speed", "--estimate", "--device", "v5e", "--model", "llama-3.1-8b", "--lengths", "32768", *policies
    )
    assert ran.returncode == 0, ran.stderr
    assert "1.1 times as fast as full attention from" in ran.stdout
    assert "warning: weights and cache take 20.4 GB at 32768 tokens; 1 x v5e have 16" in ran.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "gpt"], "--model 'gpt' is no known shape (smollm2-135m"),
        (["--batch", "0"], "--batch 0 must be at least 1"),
        (["--lengths", "9000"], "exceeds the model's context of 8192"),
        (["--estimate", "--bandwidth", "-1"], "--bandwidth -1.0 must be above 0"),
        (["--chips", "2"], "--chips goes with --estimate"),
        (["--estimate", "--mesh", "auto"], "--mesh measures"),
        (["--implementation", "pallas", "--backend", "cpu"], "there are no kernels for cpu"),
        (["--policies", "magic"], "magic"),
    ],
)
def test_bad_input(call_module, flags, message):
    ran = call_module("eval.speed", *flags)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_measuring_a_small_model(call_module, tmp_path):
    policies = ["full", "lookahead:budget=16,stride=4", "recycled:budget=16,stride=4", "streaming_llm:budget=16"]
    write_folder(tmp_path / "model")
    ran = call_module(
        *("eval.speed", "--model", str(tmp_path / "model"), "--lengths", "128", "--repeats", "2", "--prefill"),
        *("--policies", *policies[1:], "--out", str(tmp_path / "out")),
    )
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "speed.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == policies
    assert all(row["mean_ms"] is not None and row["floor_ms"] > 0 and row["prefill_ms"] > 0 for row in rows)
    assert [row[name] is None for row in rows for name in ("full_ms", "partial_ms")] == [0, 1, 0, 0, 0, 0, 1, 0]
    assert (tmp_path / "out" / "speed.png").stat().st_size > 10_000


def test_measuring_over_a_mesh(run_module, tmp_path):
    """Four simulated devices take two rows apart, two of them share each row's heads."""
    write_folder(tmp_path / "model")
    ran = run_module(
        *("eval.speed", "--model", str(tmp_path / "model"), "--lengths", "128", "--repeats", "1", "--batch", "2"),
        *("--policies", "full", "--mesh", "auto", "--backend", "cpu", "--out", str(tmp_path / "out")),
        env=environment("--xla_force_host_platform_device_count=4"),
    )
    assert ran.returncode == 0, ran.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "speed.jsonl").read_text().splitlines()]
    assert (row["rows_of_a_device"], row["devices_of_a_row"]) == (1, 2)


def test_a_waterfall_needs_a_gpu(call_module):
    ran = call_module("eval.waterfall")
    assert ran.returncode == 2
    assert ran.stderr.strip() == "error: eval.waterfall reads a GPU's profile; JAX runs on cpu"


@pytest.mark.parametrize("name", SHAPES)
def test_kernels_read_what_a_step_must_read(name):
    """Except for norms and biases, `eval.waterfall` counts the same bytes over all kernels as `eval.speed` for a step."""
    shape, policy = SHAPES[name], rj.SnapKV(4096)

    def read(*kernels):
        return sum(bytes_read(kernel, shape, policy, 3, 8192, 2) for kernel in kernels)

    sizes = (shape.num_attention_heads * shape.head_dim, f"{shape.intermediate_size}__1")
    products = ("heads_projections__2", "gated_projections", *(f"added_projection_{size}" for size in sizes))
    full = len(shape.full_layers)
    windows = 3 * roofline.window_bytes(shape, 8192)  # whose kernels have the name of full attention's
    found = shape.num_hidden_layers * read(*products) + full * read("recycled_attention") + windows + read("head")
    of_heads = 2 * shape.head_dim if shape.qk_norm else 0
    of_layer = shape.hidden_size * (4 if shape.norms == "both" else 2) + of_heads
    if shape.qkv_bias:
        of_layer += shape.head_dim * (shape.num_attention_heads + 2 * shape.num_key_value_heads)
    norms = 2 * (shape.num_hidden_layers * of_layer + shape.hidden_size)
    assert found + norms == roofline.estimate(shape, policy, 3, 8192).partial.bytes
    if windows == 0:
        assert read("full_attention") == 2 * read("recycled_attention")
    assert all(bytes_read(other, shape, policy, 3, 8192, 2) is None for other in ("norm", "gemm_fusion_dot_6"))


def test_the_peer(call_module, tmp_path):
    pytest.importorskip("torch")
    write_folder(tmp_path / "model")
    ran = call_module(
        *(
            "eval.peer",
            "--model",
            str(tmp_path / "model"),
            "--lengths",
            "64,128",
            "--repeats",
            "2",
            "--dtype",
            "float32",
        ),
        *("--no-compiled", "--batch", "2", "--out", str(tmp_path / "out")),
    )
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "out" / "peer.jsonl").read_text().splitlines()]
    assert [(row["length"], row["batch"], row["mean_ms"] > 0) for row in rows] == [(64, 2, True), (128, 2, True)]
    assert "holds the results" in ran.stdout


def test_a_filled_state_is_decoded_as_a_prefilled_one_is(params, config):
    """Filled states have the shapes of prefilled ones, so both run the same compiled program."""
    policy = rj.RecycledAttention(6, rj.FixedStride(3))
    filled = measuring.filled(config, params, policy, 2, 40, 9, None)
    real = rj.prefill(params, config, jnp.ones((2, 31), jnp.int32), policies=(policy,), max_new_tokens=9)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), one.without_room()) for one in (filled, real)]
    assert shapes[0] == shapes[1]
    assert int(filled.cache.length) == int(real.cache.length)
