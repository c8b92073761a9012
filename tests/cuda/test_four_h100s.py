"""Decoding compiled for four H100s of one host without one: which collectives a step has, and that none moves a cache."""

import dataclasses
import functools
import re

import jax
import pytest
from h100 import STEPS, devices, shapes
from jax.sharding import NamedSharding

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.cache import LayerCache
from recyc_jax.decoding import Call, decode_tokens
from recyc_jax.shapes import SHAPES

pytestmark = pytest.mark.cuda_aot

LENGTH = 131072
COLLECTIVE = re.compile(r" = (\S.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
BYTES = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1, "s8": 1, "u32": 4}


@functools.cache
def compiled(sizes, layers, batch, text, name="llama-3.1-8b"):
    """The program's text, and the bytes of temporary memory on each device. `sizes`: of data, tensor and sequence."""
    (data, tensor, sequence), policy, kv_heads = sizes, rj.parse_policy(text), SHAPES[name].num_key_value_heads
    on = devices(data * tensor * sequence)
    mesh = sharding.mesh(data, 1, tensor, on, sequence=sequence, kv_heads=kv_heads)
    with jax.set_mesh(mesh):
        config, params, _, _, state = shapes(name, layers, batch, LENGTH, policy)
        letters = sharding.by_letters(batch, mesh)

        def place(leaf):
            if isinstance(leaf, LayerCache):
                return jax.tree.map(lambda _: NamedSharding(mesh, letters(leaf.letters)), leaf)
            by_head = leaf.ndim > 2 and leaf.shape[1] == config.num_key_value_heads
            by_row = leaf.ndim and leaf.shape[0] == batch
            return NamedSharding(mesh, letters("BK" if by_head else "B" if by_row else ""))

        def run(params, state):
            return decode_tokens.__wrapped__(params, state, Call(config, policy, STEPS, implementation="pallas_gpu"))

        def placed(leaf, where):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

        params = jax.tree.map(placed, params, sharding.shardings(params, mesh))
        places = jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, LayerCache))
        state = jax.tree.map(placed, state, places)
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
    two, three = (
        collectives(compiled((1, tensor, 1), n, 1, "recycled:budget=4096,stride=50")[0], kernel) for n in (2, 3)
    )
    hidden = 4096 * 4
    assert [kind for kind, _ in three].count("all-reduce") - [kind for kind, _ in two].count("all-reduce") == 2
    assert max(size for _, size in three) == hidden
    assert sorted(size for kind, size in three if kind != "all-reduce") == [4 * tensor]


def test_rows_apart_need_nothing():
    for kernel in ("recycled_attention", "full_attention"):
        assert collectives(compiled((4, 1, 1), 2, 12, "recycled:budget=4096,stride=50")[0], kernel) == []


@pytest.mark.parametrize("kernel", ["recycled_attention", "full_attention"])
def test_parts_of_the_cache_give_an_output_each(kernel):
    """Slots over four devices: in each layer every device gathers all parts' outputs and logsumexps. A deciding step also
    gathers each device's best slots and their scores, of all layers at once."""
    two, three = (collectives(compiled((1, 1, 4), n, 1, "recycled:budget=4096,stride=50")[0], kernel) for n in (2, 3))
    outputs, chosen = 4 * 32 * (128 + 1) * 4, 3 * 8 * 4 * 4096 * 4
    assert two.count(("all-gather", outputs)) == 2
    assert three.count(("all-gather", outputs)) == 3
    others = [(kind, size) for kind, size in three if (kind, size) != ("all-gather", outputs)]
    assert max((size for _, size in others), default=0) <= (chosen if kernel == "full_attention" else 0), others


@pytest.mark.parametrize("kernel", ["recycled_attention", "full_attention"])
def test_a_group_shares_a_head(monkeypatch, kernel):
    """Two key/value heads over four devices: a step adds twice a layer, as with as many heads as devices, and a deciding
    one takes the maximum of the heads' scores over the devices of a group."""
    monkeypatch.setitem(SHAPES, "two", dataclasses.replace(SHAPES["llama-3.1-8b"], num_key_value_heads=2))
    policy = "recycled:budget=4096,stride=50"
    two, three = (collectives(compiled((1, 4, 1), n, 1, policy, "two")[0], kernel) for n in (2, 3))
    hidden, scores = ("all-reduce", 4096 * 4), 3 * 4 * LENGTH
    assert three.count(hidden) - two.count(hidden) == 2
    assert max(size for _, size in three) <= (1.01 * scores if kernel == "full_attention" else hidden[1])


@pytest.mark.parametrize(("data", "tensor", "batch"), [(1, 4, 1), (4, 1, 12)])
def test_no_device_holds_more_than_its_share(data, tensor, batch):
    """Temporary memory of two layers: a refresh's logits and scores of the device's own rows and heads."""
    _, temporary = compiled((data, tensor, 1), 2, batch, "recycled:budget=4096,stride=50")
    logits = batch // data * 4 * 32 // tensor * LENGTH
    assert temporary < 4 * logits + 2**26
