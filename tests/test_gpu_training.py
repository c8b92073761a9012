"""Training on a real GPU: its attention against the plain one, and a run that is killed and resumed."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from recyc_jax.attention import whole_sequence
from recyc_jax.attention.whole_sequence import Recycle
from recyc_jax.kernels.gpu import prefill_attention
from recyc_jax.kernels.gpu.whole_sequence import recycled as kernels

pytestmark = pytest.mark.gpu


def heads(dtype, width=1000, dim=64, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, width, n, dim) for n in (8, kv_heads, kv_heads, 8)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def value_and_grads(attend, q, k, v, weights):
    def loss(q, k, v):
        out = attend(q, k, v)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *grads


def assert_near(found, expected):
    """Check output and gradients token by token: the error is below 5% of the token's norm, or of a quarter of the mean
    norm if that is larger, which allows for rounding to bfloat16."""
    for name, mine, theirs in zip(("out", "q", "k", "v"), found, expected, strict=False):
        mine, theirs = (np.asarray(x, np.float32).reshape(*x.shape[:2], -1) for x in (mine, theirs))
        size = np.linalg.norm(theirs, axis=-1)
        off = np.linalg.norm(mine - theirs, axis=-1) / np.maximum(size, size.mean() / 4)
        assert off.max() < 0.05, (name, off.max(), np.unravel_index(off.argmax(), off.shape))


@pytest.mark.parametrize("width", [1000, 949])  # cuDNN itself has no gradient for odd lengths
def test_cudnn_is_causal_attention(width):
    arrays = heads(jnp.bfloat16, width)
    assert_near(value_and_grads(whole_sequence.causal_cudnn, *arrays), value_and_grads(whole_sequence.causal, *arrays))


@pytest.mark.parametrize("recycle", [Recycle(1, 50, 128), Recycle(950, 51, 128), Recycle(300, 20, 64, evict=True)])
def test_recycled_attention_in_bfloat16_is_that_in_float32_where_it_selects_alike(recycle):
    """With a budget as long as the row everything is selected, so rounding cannot change the selection."""
    everything = recycle._replace(budget=1000)
    q, k, v, weights = heads(jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v, weights)]
    found = value_and_grads(lambda q, k, v: whole_sequence.recycled(q, k, v, everything), q, k, v, weights)
    expected = value_and_grads(lambda q, k, v: whole_sequence.recycled(q, k, v, everything), *wide)
    assert_near(found, expected)
    dense = whole_sequence.recycled(q, k, v, recycle, whole_sequence.causal_cudnn)
    assert_near([dense], [whole_sequence.recycled(q, k, v, recycle)])


def sees(slots, width, recycle):
    """The mask [B, K, T, T] of what tokens attend to if segments selected these slots."""
    slots = np.asarray(slots)
    seen = np.tril(np.ones((*slots.shape[1:3], width, width), bool))
    for segment, first in enumerate(range(recycle.prefix - 1, width, recycle.stride)):
        after = slice(first + 1, min(first + recycle.stride, width))
        seen[:, :, after, : first + 1] = False
        for row, head in np.ndindex(*slots.shape[1:3]):
            chosen = slots[segment, row, head]
            seen[row, head, after, chosen[chosen < width]] = True
    return jnp.asarray(seen)


def masked(q, k, v, seen):
    groups = q.shape[2] // k.shape[2]
    k, v, seen = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2), jnp.repeat(seen, groups, axis=1)
    logits = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")


@pytest.mark.parametrize(("dim", "kv_heads"), [(64, 2), (128, 1), (96, 8)])
@pytest.mark.parametrize("recycle", [Recycle(1, 50, 128), Recycle(300, 20, 200, lookahead=19), Recycle(950, 51, 300)])
def test_kernels_are_masked_attention_to_what_they_select(dim, kv_heads, recycle):
    """The kernels agree with masked attention in float32 over the slots that they selected, and give the same bits
    twice. Their slots are nearly all those of the plain form, which rounds its sums differently."""
    q, k, v, weights = heads(jnp.bfloat16, dim=dim, kv_heads=kv_heads)
    width, first = q.shape[1], recycle.prefix - 1

    def ours(q, k, v, dense=whole_sequence.causal_cudnn):
        return kernels.recycled(q, k, v, recycle, dense)

    padded = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -dim % 64))) for x in (q, k)]
    keys, selecting = padded[1].swapaxes(1, 2), padded[0][:, first :: recycle.stride]
    form = kernels._form(width, first, recycle)
    _, normaliser = prefill_attention.strided(selecting, keys, keys, first, recycle.stride, dim)
    slots, _ = jax.jit(lambda *arrays: kernels._select(*arrays, form, recycle, dim))(selecting, keys, normaliser)
    seen = sees(slots, width, recycle)
    found = value_and_grads(ours, q, k, v, weights)
    wide = [x.astype(jnp.float32) for x in (q, k, v, weights)]
    assert_near(found, value_and_grads(lambda q, k, v: masked(q, k, v, seen), *wide))
    by_kernels = functools.partial(ours, dense=whole_sequence.causal)  # cuDNN's gradients are not reproducible
    twice = [value_and_grads(by_kernels, q, k, v, weights) for _ in range(2)]
    for once, again in zip(*twice, strict=True):
        np.testing.assert_array_equal(np.asarray(once, np.float32), np.asarray(again, np.float32))

    plain = whole_sequence.recycled(*wide[:3], recycle)
    near = np.abs(np.asarray(found[0], np.float32) - np.asarray(plain)).max(axis=-1) < 0.05
    assert near.mean() > 0.98


def test_a_killed_run_goes_on_with_the_same_bits_under_deterministic(tmp_path):
    checkpoints.write_folder(tmp_path / "model", context=512)
    texts, draw, words = tmp_path / "texts", random.Random(0), checkpoints.TEXT.split()
    texts.mkdir()
    for number in range(8):
        (texts / f"document{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(160)))
    command = [sys.executable, "-m", "train.continued_pretrain", "--model", tmp_path / "model", "--data", f"t={texts}"]
    command += ["--length", 64, "--stride", 12, "--batch-size", 8, "--steps", 40, "--save-every", 4, "--held-out", 0]
    command += ["--recycle", "strided", "--no-export", "--deterministic", "--backend", "gpu", "--out"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def arguments(out):
        return [str(argument) for argument in [*command, tmp_path / out]]

    def to_its_end(out):
        ended = subprocess.run(arguments(out), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    to_its_end("straight")
    rows, log = tmp_path / "killed" / "metrics.jsonl", tmp_path / "killed.log"
    with (
        log.open("w") as output,
        subprocess.Popen(arguments("killed"), cwd=ROOT, env=env, stdout=output, stderr=output) as killed,
    ):
        limit = time.monotonic() + 300
        while not rows.exists() or rows.read_bytes().count(b"\n") < 10:
            assert killed.poll() is None, log.read_text()
            if time.monotonic() > limit:
                killed.kill()
                pytest.fail(f"no ten steps in five minutes: {log.read_text()}")
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    to_its_end("killed")
    cards = [
        json.loads((tmp_path / out / "checkpoints" / "40" / "card" / "metadata").read_text())
        for out in ("straight", "killed")
    ]
    assert cards[0]["fingerprints"] == cards[1]["fingerprints"]
