"""Decoding compiled for four H100s of one host without one: which collectives a step has, and that none moves a cache."""

import functools
import re

import jax
import pytest
from h100 import STEPS, devices, shapes
from jax.sharding import NamedSharding

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.generation import decode_tokens

pytestmark = pytest.mark.cuda_aot

LENGTH = 131072
COLLECTIVE = re.compile(r" = (\S.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
BYTES = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1, "s8": 1, "u32": 4}


@functools.cache
def compiled(data, tensor, layers, batch, text):
    """The program's text, and the bytes of temporary memory on each device."""
    mesh, policy = sharding.mesh(data, 1, tensor, devices(data * tensor)), rj.parse_policy(text)
    with jax.set_mesh(mesh):
        config, params, _, _, state = shapes("llama-3.1-8b", layers, batch, LENGTH, policy)
        letters = sharding.by_letters(batch, mesh)

        def place(leaf):
            by_head = leaf.ndim > 2 and leaf.shape[1] == config.num_key_value_heads
            by_row = leaf.ndim and leaf.shape[0] == batch
            return NamedSharding(mesh, letters("BK" if by_head else "B" if by_row else ""))

        def run(params, state):
            options = config, policy, STEPS, rj.Greedy(), (), 0, "pallas_gpu"
            return decode_tokens.__wrapped__(params, state, None, *options)

        def placed(leaf, where):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        params = jax.tree.map(placed, params, sharding.shardings(params, mesh))
        state = jax.tree.map(lambda leaf: placed(leaf, place(leaf)), state)
        program = jax.jit(run, donate_argnums=1).lower(params, state).compile()
    return program.as_text(), program.memory_analysis().temp_size_in_bytes


def collectives(text, kernel):
    """The kinds and bytes of the collectives in the loop's body that has this kernel."""
    for body in re.split(r"\n(?=%|ENTRY)", text):
        if f"/{kernel}/" in body and "gated_projections" in body:
            found = []
            for shape, kind in COLLECTIVE.findall(body):
                sizes = [
                    BYTES[dtype] * functools.reduce(int.__mul__, map(int, filter(None, dims.split(","))), 1)
                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
                ]
                found.append((kind, max(sizes)))
            return found
    raise AssertionError(f"no body with {kernel}")


@pytest.mark.parametrize("kernel", ["recycled_attention", "full_attention"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_layer_adds_twice(tensor, kernel):
    """Attention's output and the feed-forward's, a hidden state each; beside the layers the token's embedding and the best
    token of each share of the vocabulary. No key, value, score or logit leaves its device."""
    two, three = (collectives(compiled(1, tensor, n, 1, "recycled:budget=4096,stride=50")[0], kernel) for n in (2, 3))
    hidden = 4096 * 4
    assert [kind for kind, _ in three].count("all-reduce") - [kind for kind, _ in two].count("all-reduce") == 2
    assert max(size for _, size in three) == hidden
    assert sorted(size for kind, size in three if kind != "all-reduce") == [4 * tensor]


def test_rows_apart_need_nothing():
    for kernel in ("recycled_attention", "full_attention"):
        assert collectives(compiled(4, 1, 2, 12, "recycled:budget=4096,stride=50")[0], kernel) == []


@pytest.mark.parametrize(("data", "tensor", "batch"), [(1, 4, 1), (4, 1, 12)])
def test_no_device_holds_more_than_its_share(data, tensor, batch):
    """Temporary memory of two layers: a refresh's logits and scores of the device's own rows and heads."""
    _, temporary = compiled(data, tensor, 2, batch, "recycled:budget=4096,stride=50")
    logits = batch // data * 4 * 32 // tensor * LENGTH
    assert temporary < 4 * logits + 2**26
