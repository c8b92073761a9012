"""The inputs of a run: model config, mesh, rows and card. All input is checked before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from recyc_jax import LlamaConfig, sharding, training_implementations
from recyc_jax.attention.whole_sequence import Recycle
from recyc_jax.commands import backends, command_line, documents
from recyc_jax.commands import corpus as token_files
from recyc_jax.commands.corpus import Windows
from recyc_jax.loading import identity, pretrained
from train import card, data, evaluation
from train.card import Card
from train.config import Config, eval_lengths, learning_rate, recycle_of
from train.optimizer import Optimizer


class Run(NamedTuple):
    """What a run needs, before any array is on a device."""

    config: Config
    folder: Path  # the model's folder
    model: LlamaConfig
    mesh: Mesh
    rows: Any  # corpus.Windows or data.Packed
    held_out: evaluation.HeldOut | None
    recycle: Recycle | None  # None: ordinary training
    optimizer: Optimizer
    attention: str  # the implementation of causal and recycled attention, by name (`training_implementations.py`)
    compute_dtype: Any
    data: tuple[str, ...]  # lines that say what of the texts is used, held out and dropped, and by which devices
    card: Card  # settings and fingerprints; part of every checkpoint


def connect(config: Config) -> None:
    """Select the backend on all processes of the run, which have found each other if the flags ask for several. Raises
    ValueError if the hardware is missing."""
    backends.select(config.backend, several_hosts=True)


def make(config: Config) -> Run:
    """The run that the flags describe. Raises ValueError that names the setting that does not fit."""
    folder, model, tokenizer = pretrained.open_checkpoint(config.model)
    longest = eval_lengths(config)[0]
    lengths = [config.length, longest] if config.held_out else [config.length]
    command_line.check_context(lengths, model.max_position_embeddings, config.allow_beyond_context)
    mesh = _mesh(config, model)
    domains = [documents.load(spec, flag="--data") for spec in documents.split("--data", config.data)]
    if len({domain.name for domain in domains}) < len(domains):
        raise ValueError(f"--data {config.data} names a domain twice")
    corpus = token_files.tokenize(domains, tokenizer, config.out / "tokens")
    if corpus.largest >= model.vocab_size:
        raise ValueError(f"{folder}: its tokenizer makes ids beyond the model's vocabulary of {model.vocab_size}")
    kept, held = data.hold_out(corpus, config.held_out, longest, config.seed)
    packed = config.recycle == "off" and config.pack
    rows = data.Packed(corpus, kept, config.length, config.seed) if packed else Windows(corpus, kept, config.length)
    if len(rows) < config.batch_size:
        most = int(corpus.lengths[kept].max(initial=0))
        raise ValueError(
            f"--data {config.data}: {len(rows)} rows of --length {config.length} are fewer than --batch-size "
            f"{config.batch_size} (the longest document to train on has {most} tokens)"
        )
    steps = config.steps or max(1, int(config.epochs * len(rows)) // config.batch_size)
    held_out = None
    if len(held):
        held_out = evaluation.windows(corpus, held, longest, config.eval_sequences, config.seed)
    optimizer = Optimizer(
        learning_rate(config),
        config.schedule,
        min(config.warmup_steps, steps),
        steps,
        config.weight_decay,
        config.clip,
        config.optimizer,
        config.b1,
        config.b2,
        config.moment_dtype,
    )
    recycle, dtype = recycle_of(config), command_line.dtype_name(config.dtype)
    attention = training_implementations.choose(
        "--attention", config.attention, recycle is not None, dtype, model.head_dim, packed
    )
    made = card.make(
        config,
        weights=identity.of_weights(folder),
        sources={domain.name: domain.source for domain in domains},
        corpus=corpus,
        held=held,
        packed=packed,
        rows=len(rows),
        recycle=recycle,
        optimizer=optimizer,
        dtype=dtype,
        mesh=sharding.sizes(mesh),
        attention=attention,
    )
    return Run(
        config=config,
        folder=folder,
        model=model,
        mesh=mesh,
        rows=rows,
        held_out=held_out,
        recycle=recycle,
        optimizer=optimizer,
        attention=attention,
        compute_dtype=jnp.dtype(dtype),
        card=made,
        data=(
            *data.described(corpus, kept, held, rows, config.length),
            *_shared_evaluation(config, mesh),
            *_slow_packing(packed, attention, dtype, model.head_dim),
        ),
    )


def _slow_packing(packed: bool, attention: str, dtype: str, head_dim: int) -> list[str]:
    """A line where rows of one document would be read by a fused kernel, and packed ones are not."""
    if not packed or attention != "reference":
        return []
    if training_implementations.best(False, dtype, head_dim, packed=False) == "reference":
        return []
    return ["packed rows are read by plain JAX, since no fused kernel takes them; with --no-pack one does"]


def _shared_evaluation(config: Config, mesh: Mesh) -> list[str]:
    """A line where the windows of an evaluation do not divide among the devices, which then compute all of them."""
    parts = mesh.size // config.tensor
    if not config.held_out or config.eval_batch_size % parts == 0:
        return []
    return [
        f"--eval-batch-size {config.eval_batch_size} does not divide among {parts} devices: each computes every window; a "
        f"multiple of {parts} would share them"
    ]


def _mesh(config: Config, model: LlamaConfig) -> Mesh:
    devices = jax.device_count()
    parts = config.fsdp * config.tensor
    if devices % parts:
        raise ValueError(
            f"--fsdp {config.fsdp} x --tensor {config.tensor} = {parts} does not divide the {devices} devices there are"
        )
    sharding.check_divides(model, config.fsdp, config.tensor)
    micro, row_parts = config.batch_size // config.accumulate, devices // config.tensor
    if micro % row_parts:
        raise ValueError(
            f"--batch-size {config.batch_size} in --accumulate {config.accumulate} parts is {micro} rows at once, which "
            f"{row_parts} devices cannot share evenly"
        )
    return sharding.mesh(devices // parts, config.fsdp, config.tensor, kv_heads=model.num_key_value_heads)
