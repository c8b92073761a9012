"""Programs compiled for TPUs without a TPU, and reports of their memory, copies and collectives.

XLA:TPU and Mosaic run on a CPU host; nothing is executed. Decoding unrolls the layers, so only a few are compiled,
which show what a layer needs; weights and caches of all layers are counted by their shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import recyc_jax as rj
from recyc_jax import sharding
from recyc_jax.attention import whole_sequence
from recyc_jax.attention.whole_sequence import Recycle
from recyc_jax.decoding import Call, decode_tokens
from recyc_jax.prefilling import read_prompts
from recyc_jax.shapes import SHAPES, shortened
from train import forward, step
from train.optimizer import Optimizer, shardings

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # skips the query of the cloud metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

NEW = 128  # room in the cache for new tokens
BUDGET = 4096
POLICIES: dict[str, Any] = {
    "full": rj.FullAttention(),
    "lookahead": rj.Lookahead(BUDGET, 50),
    "recycled": rj.RecycledAttention(BUDGET, rj.FixedStride(10)),
    "dynamic": rj.RecycledAttention(BUDGET, rj.QuerySimilarity(5, 0.85)),
    "streaming_llm": rj.StreamingLLM(BUDGET),
    "h2o": rj.H2O(BUDGET),
    "snapkv": rj.SnapKV(BUDGET),
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips of one kind, and the mesh axes that a model is sharded over."""

    topology: str
    hbm: float  # GiB per chip
    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def mesh(self) -> Mesh:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=self.topology).devices
        return sharding.mesh(self.data, self.fsdp, self.tensor, devices[: self.data * self.fsdp * self.tensor])


MACHINES = {  # HBM per chip from the vendor's pages
    "v5e": Machine("v5e:2x2", 16),
    "v6e": Machine("v6e:2x2", 32),
    "v5e 2x4": Machine("v5e:2x4", 16, tensor=8),
    "v6e 2x2": Machine("v6e:2x2", 32, tensor=4),
    "v5p 4x4x4": Machine("v5p:4x4x4", 95, data=8, tensor=8),
    "v5e 2x4, training": Machine("v5e:2x4", 16, fsdp=4, tensor=2),
    "v5e 4x4, training": Machine("v5e:4x4", 16, fsdp=8, tensor=2),
    "v6e 2x2, training": Machine("v6e:2x2", 32, fsdp=2, tensor=2),
    "v5p 4x4x4, training": Machine("v5p:4x4x4", 95, fsdp=16, tensor=4),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """Properties of a compiled program. Sizes are bytes per chip."""

    program: str
    machine: str
    model: str
    length: int
    layers: int  # layers compiled; all layers if they are scanned
    seconds: float
    arguments: int  # weights and state of all layers
    temporary: int  # temporaries of the layers compiled
    cache: int  # caches of the layers compiled
    copied: int  # kept sets in the state, of the layers compiled
    choosing: int  # what the choice of slots may take: see `check`
    copies: int  # cache-shaped copies and transposes
    collectives: dict[str, int]
    fetched: int = 0  # the largest array that is prefetched into VMEM

    def peak(self) -> float:
        """An upper bound on the peak in GiB: counts temporaries as if all of them grew with the number of layers."""
        layers = SHAPES[self.model].num_hidden_layers
        return (self.arguments + self.temporary * layers / self.layers) / 2**30

    def check(self, machine: Machine) -> None:
        name = f"{self.program} of {self.model} at {self.length} tokens on {self.machine}"
        assert self.peak() < machine.hbm, f"{name}: {self.peak():.1f} GiB do not fit {machine.hbm} GiB"
        if self.cache and self.program != "prefill":
            # At a refresh, the new copies of the kept sets and the old ones exist together. The choice takes a dozen
            # numbers of four bytes for each slot and head: scores, pooled scores, inputs and outputs of a sort.
            # Weights that XLA prefetches into VMEM, two at a time, count as temporaries too. The rest, activations,
            # does not grow with the cache.
            allowed = 0.05 * self.cache + 2 * self.copied + self.choosing + 2 * self.fetched + 8 * 2**20
            assert self.temporary < allowed, (
                f"{name}: {self.temporary / 2**20:.0f} MiB of temporaries beside a cache of {self.cache / 2**20:.0f}"
            )
        assert self.copies == 0, f"{name}: {self.copies} cache-shaped copies"


def _local(tree: Any) -> int:
    """The bytes of the arrays on one device."""
    return sum(
        leaf.dtype.itemsize * functools.reduce(int.__mul__, leaf.sharding.shard_shape(leaf.shape), 1)
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _placed(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)


_WIDTHS = {"bf16": 2, "s8": 1, "u8": 1, "pred": 1}  # bytes; 4 for other dtypes


def _report(lowered: Any, began: float, state: Any = None, **fields: Any) -> Report:
    compiled = lowered.compile()
    text, copies, cache = compiled.as_text(), 0, 0
    if state is not None:
        stored = state.cache.full_layers[0].stored_keys
        batch, heads, one, other = stored.sharding.shard_shape(stored.shape)
        cache = _local(state.cache.layers)
        copies = len(re.findall(rf"\[{batch},{heads},(?:{one},{other}|{other},{one})\]\S* (?:copy|transpose)\(", text))
    fetched = re.findall(r"= \((\w+)\[([\d,]+)\]\{[^}]*S\(1\)\}[^=]* copy-start\(", text)
    sizes = [math.prod(map(int, shape.split(","))) * _WIDTHS.get(kind, 4) for kind, shape in fetched]
    collectives = Counter({name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES})
    return Report(
        seconds=round(time.perf_counter() - began, 1),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        cache=cache,
        copies=copies,
        fetched=max(sizes, default=0),
        collectives={name: count for name, count in collectives.items() if count},
        **fields,
    )


def _model(model: str, layers: int, mesh: Mesh) -> tuple[rj.LlamaConfig, Any, int]:
    """A config with that many layers, the shapes of its bfloat16 parameters, and the whole model's bytes per chip."""
    whole = SHAPES[model]

    def params(config: rj.LlamaConfig) -> Any:
        shapes = jax.eval_shape(lambda: rj.init_params(config, jax.random.key(0), jnp.bfloat16))
        return _placed(shapes, shardings(shapes, mesh))

    config = shortened(whole, layers)
    return config, params(config), _local(params(whole))


def decoding(
    machine: str,
    model: str,
    program: str,
    length: int,
    *,
    batch: int = 1,
    layers: int = 2,
    implementation: str = "pallas_tpu",
) -> Report:
    """Compile decoding or prefill for a total length of `length` tokens; `program` is a policy's name or "prefill"."""
    mesh = MACHINES[machine].mesh()
    policy = POLICIES.get(program, POLICIES["recycled"])
    config, params, weights = _model(model, layers, mesh)
    rows = sharding.ROWS if batch % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0 else None

    def place(leaf: Any) -> NamedSharding:
        by_head = leaf.ndim >= 3 and leaf.shape[1] in (config.num_key_value_heads, config.num_attention_heads)
        parts = (rows, "tensor") if by_head else (rows,) if leaf.ndim else ()
        return NamedSharding(mesh, PartitionSpec(*parts))

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        tokens = jax.ShapeDtypeStruct((batch, length - NEW), jnp.int32)
        lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
        tokens, lengths = (_placed(one, place(one)) for one in (tokens, lengths))
        read = functools.partial(
            read_prompts,
            config=config,
            max_new_tokens=NEW,
            needs=policy.needs,
            implementation=implementation,
        )
        shapes = jax.eval_shape(read, params, tokens, lengths)
        state = _placed(shapes, jax.tree.map(place, shapes))
        full, count = _local(state.cache.full_layers), len(config.full_layers)
        rings, whole = _local(state.cache.layers) - full, SHAPES[model]
        held = weights + full // count * len(whole.full_layers)
        held += rings // max(1, layers - count) * (whole.num_hidden_layers - len(whole.full_layers))
        copied = choosing = 0
        chooses = 48 * _local([layer.stored_keys for layer in state.cache.full_layers]) // (2 * config.head_dim)
        if isinstance(policy, rj.RecycledAttention | rj.SnapKV):
            copied, choosing = int(full * min(1, BUDGET / state.cache.capacity)), chooses
        elif isinstance(policy, rj.H2O):
            copied = int(full * min(1, BUDGET / 2 / state.cache.capacity))
            choosing = chooses * config.num_attention_heads // config.num_key_value_heads  # scores are per query head
        fields = dict(machine=machine, model=model, length=length, layers=layers, program=program)
        began = time.perf_counter()
        if program == "prefill":
            lowered = read.func.lower(params, tokens, lengths, config, NEW, policy.needs, implementation)
            return _report(lowered, began, state, arguments=held, copied=0, choosing=0, **fields)
        call = Call(config, policy, NEW, eos_ids=(2,), implementation=implementation)
        lowered = decode_tokens.lower(params, state, call)
        return _report(lowered, began, state, arguments=held, copied=copied, choosing=choosing, **fields)


def training_step(machine: str, model: str, form: str, length: int = 8192, budget: int = 2048) -> Report:
    """Compile one training step of the paper's or the strided form, with one row per device of the axes `ROWS`."""
    mesh = MACHINES[machine].mesh()
    config = SHAPES[model]
    optimizer = Optimizer(1e-5, "linear", 5, 100, 0.0, 1.0, "adamw", moment_dtype="bfloat16")
    recycle = Recycle(length, 51, budget) if form == "paper" else Recycle(1, 50, budget)
    width = length + 50 if form == "paper" else length

    def make() -> Any:
        params = rj.init_params(config, jax.random.key(0))
        return step.start(forward.stack_layers(params, config.num_hidden_layers), optimizer)

    shapes = jax.eval_shape(make)
    places = shardings(shapes, mesh)
    state = _placed(shapes, places)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    tokens = jax.ShapeDtypeStruct((rows, width), jnp.int32)
    batch = {"tokens": _placed(tokens, NamedSharding(mesh, PartitionSpec(sharding.ROWS)))}
    one = functools.partial(
        step.train_step,
        config=config,
        optimizer=optimizer,
        attention=step.attention_over(mesh, lambda q, k, v, segments: whole_sequence.recycled(q, k, v, recycle)),
        mesh=mesh,
        accumulate=1,
        compute_dtype=jnp.bfloat16,
        remat="full",
        z_loss=0.0,
    )
    began = time.perf_counter()
    with jax.default_matmul_precision("default"):
        out = (places, NamedSharding(mesh, PartitionSpec()))
        lowered = jax.jit(one, donate_argnums=0, out_shardings=out).lower(state, batch)
        return _report(
            lowered,
            began,
            arguments=_local(state),
            copied=0,
            choosing=0,
            program=f"training, {form}",
            machine=machine,
            model=model,
            length=width,
            layers=config.num_hidden_layers,
        )
