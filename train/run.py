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
from recyc_jax.loading import identity, pretrained
from train import card, data, evaluation
from train.card import Card
from train.config import Config, eval_lengths, recycle_of
from train.optimizer import Optimizer


class Run(NamedTuple):
    """What a run needs, before any array is on a device."""

    config: Config
    folder: Path  # the model's folder
    model: LlamaConfig
    mesh: Mesh
    rows: Any  # data.Windows or data.Packed
    held_out: evaluation.HeldOut | None
    recycle: Recycle | None  # None: ordinary training
    optimizer: Optimizer
    attention: str  # the implementation of causal and recycled attention, by name (`training_implementations.py`)
    compute_dtype: Any
    card: Card  # settings and fingerprints; part of every checkpoint


def connect(config: Config) -> None:
    """Connect to the run's other processes, and select the backend. Raises ValueError if the processes do not find each
    other or the hardware is missing."""
    if config.cluster or config.coordinator is not None:
        if config.backend == "cpu":
            jax.config.update("jax_platforms", "cpu")
        try:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the run's processes did not find each other: {str(error).splitlines()[0]}") from None
    backends.select(config.backend, several_hosts=True)


def make(config: Config) -> Run:
    """The run that the flags describe. Raises ValueError that names the setting that does not fit."""
    folder = pretrained.resolve(config.model)
    model = pretrained.read_config(folder)
    longest = eval_lengths(config)[0]
    lengths = [config.length, longest] if config.held_out else [config.length]
    command_line.check_context(lengths, model.max_position_embeddings, config.allow_beyond_context)
    mesh = _mesh(config, model)
    tokenizer = pretrained.load_tokenizer(folder)
    domains = [documents.load(spec, flag="--data") for spec in command_line.split("--data", config.data)]
    corpus = data.tokenize(domains, tokenizer, config.out / "tokens")
    if corpus.tokens.size and int(corpus.tokens.max()) >= model.vocab_size:
        raise ValueError(f"{folder}: its tokenizer makes ids beyond the model's vocabulary of {model.vocab_size}")
    kept, held = data.hold_out(corpus, config.held_out, longest, config.seed)
    packed = config.recycle == "off" and config.pack
    rows = (
        data.Packed(corpus, kept, config.length, config.seed) if packed else data.Windows(corpus, kept, config.length)
    )
    if len(rows) < config.batch_size:
        most = max((int(corpus.lengths[number]) for number in kept), default=0)
        raise ValueError(
            f"--data {config.data}: {len(rows)} rows of --length {config.length} are fewer than --batch-size "
            f"{config.batch_size} (the longest document to train on has {most} tokens)"
        )
    steps = config.steps or max(1, int(config.epochs * len(rows)) // config.batch_size)
    held_out = None
    if held:
        held_out = evaluation.windows(corpus, held, longest, config.eval_sequences, config.seed)
    optimizer = Optimizer(
        config.learning_rate,
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
        mesh=mesh.shape,
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
    )


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
    return sharding.mesh(devices // parts, config.fsdp, config.tensor)
