"""From flags to a run that is ready to begin: all input is looked at before weights are loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import recyc_jax as rj
from eval import backend, command, documents
from recyc_jax import pretrained, sharding
from recyc_jax.attention import training_api
from recyc_jax.attention.training import Recycle
from train import data, evaluate, program, step
from train.checkpoint import Card, Checkpoints, shapes_of

if TYPE_CHECKING:
    from train.continued_pretrain import Config


class Plan(NamedTuple):
    """What a run needs; no array is on a device yet."""

    config: Config
    folder: Path  # of the model
    model: rj.LlamaConfig
    mesh: Mesh
    rows: Any  # data.Windows or data.Packed
    held_out: evaluate.HeldOut | None
    recycle: Recycle | None  # None: ordinary training
    optimizer: step.Optimizer
    attention: str  # the implementation of causal attention
    compute_dtype: Any
    card: Card  # what made the run; every checkpoint carries it


# --- checks ----------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Raise ValueError, naming the flag, for what can be told from flags alone."""
    command.check_counts(
        length=config.length,
        stride=config.stride,
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        save_every=config.save_every,
        keep=config.keep,
        max_bad_steps=config.max_bad_steps,
        fsdp=config.fsdp,
        tensor=config.tensor,
        dense_prefix=config.dense_prefix,
        eval_sequences=config.eval_sequences,
        eval_batch_size=config.eval_batch_size,
        log_every=config.log_every,
    )
    for name, value in (
        ("warmup-steps", config.warmup_steps),
        ("eval-every", config.eval_every),
        ("steps", config.steps),
    ):
        if value < 0:
            raise ValueError(f"--{name} {value} must not be negative")
    for name, number in (
        ("learning-rate", config.learning_rate),
        ("weight-decay", config.weight_decay),
        ("clip", config.clip),
        ("z-loss", config.z_loss),
        ("epochs", config.epochs),
    ):
        if not 0 <= number < float("inf"):
            raise ValueError(f"--{name} {number} must be a number of at least 0")
    if config.steps and config.epochs != 1:
        raise ValueError(f"--epochs {config.epochs} needs --steps 0: --steps {config.steps} says how many to take")
    if config.optimizer == "adafactor" and config.weight_decay:
        raise ValueError(f"--weight-decay {config.weight_decay} goes with --optimizer adamw alone")
    if not 0 <= config.held_out < 1:
        raise ValueError(f"--held-out {config.held_out} must lie in 0..1")
    if config.length < 2:
        raise ValueError(f"--length {config.length} must be at least 2: a row's first token predicts the second")
    recycle_of(config)
    if config.held_out:
        lengths = eval_lengths(config)
        command.check_policies(config.eval_policies, lengths)
        if not config.eval_new_tokens or min(config.eval_new_tokens) < 1:
            raise ValueError("--eval-new-tokens must be one number of at least 1, or several")
        if max(config.eval_new_tokens) >= min(lengths):
            raise ValueError(
                f"--eval-new-tokens {max(config.eval_new_tokens)} leaves no context of --eval-lengths {min(lengths)}"
            )
    if config.batch_size % config.accumulate:
        raise ValueError(f"--accumulate {config.accumulate} does not divide --batch-size {config.batch_size}")
    given = [value is not None for value in (config.coordinator, config.processes, config.process_id)]
    if any(given) and not all(given):
        raise ValueError("--coordinator, --processes and --process-id belong together")
    for flag, library in ((config.tensorboard, "tensorboardX"), (config.wandb is not None, "wandb")):
        if flag and not _installed(library):
            raise ValueError(f"--{library.lower().rstrip('x')} needs the package {library}: pip install {library}")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        probe = config.out / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {config.out}: {error.strerror}") from None


def _installed(library: str) -> bool:
    try:
        metadata.version(library)
    except metadata.PackageNotFoundError:
        return False
    return True


def eval_lengths(config: Config) -> list[int]:
    """The longest first."""
    return sorted(set(config.eval_lengths or (config.length,)), reverse=True)


def recycle_of(config: Config) -> Recycle | None:
    """The form that `--recycle` names; None for ordinary training. Raises ValueError for rows that it does not fit."""
    if config.recycle == "off":
        return None
    budget = config.budget
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"--budget {budget}: a fraction must lie in 0..1; a count has no point")
        budget = max(1, int(budget * config.length))
    # the policy's own checks of its numbers
    policy = rj.RecycledAttention(budget, rj.FixedStride(config.stride), config.pool, config.lookahead, config.evict)
    selection = policy.budget, policy.pool, config.lookahead
    if config.recycle == "strided":
        if config.dense_prefix >= config.length:
            raise ValueError(f"--dense-prefix {config.dense_prefix} leaves nothing of --length {config.length}")
        return Recycle(config.dense_prefix, config.stride, *selection, evict=config.evict)
    if config.evict or config.dense_prefix != 1:
        raise ValueError("--evict and --dense-prefix belong to --recycle strided; the paper's form has neither")
    if config.stride >= config.length:
        raise ValueError(f"--stride {config.stride} leaves no context of --length {config.length}")
    return Recycle(config.length - config.stride, config.stride + 1, *selection)


def connect(config: Config) -> None:
    """Settle the backend, and join the run's other processes. Raises ValueError for hardware that isn't there."""
    if config.cluster or config.coordinator is not None:
        if config.backend == "cpu":
            jax.config.update("jax_platforms", "cpu")
        try:
            jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the run's processes did not find each other: {str(error).splitlines()[0]}") from None
    backend.select(config.backend, several_hosts=True)


# --- making ----------------------------------------------------------------------------------------------------------


def make(config: Config) -> Plan:
    """Model, mesh and data of a run. Raises ValueError naming what does not fit."""
    folder = pretrained.resolve(config.model)
    model = pretrained.read_config(folder)
    longest = eval_lengths(config)[0]
    lengths = [config.length, longest] if config.held_out else [config.length]
    command.check_context(lengths, model.max_position_embeddings, config.allow_beyond_context)
    mesh = _mesh(config, model)
    tokenizer = pretrained.load_tokenizer(folder)
    domains = [_domain(spec) for spec in command.split("--data", config.data)]
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
        held_out = evaluate.windows(corpus, held, longest, config.eval_sequences, config.seed)
    optimizer = step.Optimizer(
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
    recycle, dtype = recycle_of(config), command.dtype_name(config.dtype)
    attention = training_api.choose("--attention", config.attention, recycle is not None, dtype, model.head_dim, packed)
    card = {
        "model": {"name": config.model, "weights": _weights_fingerprint(folder)},
        "data": {
            "sources": {domain.name: domain.source for domain in domains},
            "tokens": corpus.fingerprint,
            "packed": packed,
            "held_out": [corpus.names[number] for number in held],
            "seed": config.seed,
            "rows": len(rows),
        },
        "recycle": None if recycle is None else recycle._asdict(),
        "training": {
            "length": config.length,
            "batch_size": config.batch_size,
            **dataclasses.asdict(optimizer),
            "z_loss": config.z_loss,
            "dtype": dtype,
        },
        "mesh": dict(mesh.shape),
        "accumulate": config.accumulate,
        "attention": attention,
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }
    card["config_hash"] = hashlib.sha256(json.dumps(identity(card), sort_keys=True).encode()).hexdigest()[:16]
    return Plan(
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
        card=json.loads(json.dumps(card)),  # as it comes back from a checkpoint
    )


def _domain(spec: str) -> documents.Domain:
    try:
        return documents.load(spec)
    except ValueError as error:
        raise ValueError(str(error).replace("--domains", "--data")) from None


def identity(card: Card) -> Card:
    """What a resumed run must have in common with its checkpoints: all but where it runs."""
    return {name: card.get(name) for name in ("model", "data", "recycle", "training")}


def differences(before: Card, now: Card) -> list[str]:
    """The settings in which two cards differ, as `name was X and is Y now`."""
    found = []
    for part, settings in identity(now).items():
        old = before.get(part)
        if not isinstance(settings, dict) or not isinstance(old, dict):
            if old != settings:
                found.append(f"{part} was {old!r} and is {settings!r} now")
            continue
        for name in settings | old:
            if old.get(name) != settings.get(name):
                found.append(f"{part}'s {name} was {old.get(name)!r} and is {settings.get(name)!r} now")
    return found


def _mesh(config: Config, model: rj.LlamaConfig) -> Mesh:
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


def _weights_fingerprint(folder: Path) -> str:
    """Of config and weight files: their sizes and beginnings (a safetensors file's header, and the first tensor)."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + opened.read(1 << 20))
    return digest.hexdigest()[:16]


# --- beginning ---------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> int:
    """Print what a run would be. Compiles the step; allocates nothing."""
    state = program.abstract_state(plan)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    memory = program.compiled_step(plan, state).memory_analysis()
    config, mesh = plan.config, plan.mesh
    per_step = config.batch_size * config.length
    device = mesh.devices.flat[0]
    lines = {
        "mesh": " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
        + f" on {mesh.size} x {device.device_kind}",
        "parameters": f"{count:,}",
        "recycle": "off" if plan.recycle is None else f"{config.recycle}, {plan.recycle}",
        "attention": plan.attention,
        "rows": f"{len(plan.rows):,} of {config.length} tokens" + (", packed" if plan.card["data"]["packed"] else ""),
        "held out": "nothing"
        if plan.held_out is None
        else f"{len(plan.held_out.tokens)} windows of {' and '.join(map(str, eval_lengths(config)))} tokens",
        "steps": f"{plan.optimizer.steps:,}, {per_step:,} tokens each",
    }
    if memory is not None:
        gib = 1 << 30
        lines["memory a device"] = (
            f"{memory.argument_size_in_bytes / gib:.2f} GiB state and batch, {memory.temp_size_in_bytes / gib:.2f} GiB "
            "while a step is worked on"
        )
    for name, value in lines.items():
        print(f"{name}: {value}")
    return 0


def open_run(plan: Plan) -> Callable[[], int]:
    """Claim the folder, and load the latest checkpoint or the weights; the loop is returned."""
    from train import loop

    config = plan.config
    _claim(config.out)
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
    try:
        restored = None
        if checkpoints.steps():
            like = program.abstract_state(plan)
            before = checkpoints.latest_card()
            if before is not None:
                _check_same(config, before, plan.card, like)
                if before.get("attention", plan.attention) != plan.attention and jax.process_index() == 0:
                    print(
                        f"attention was {before['attention']} and is {plan.attention} now: not the same bits",
                        flush=True,
                    )
            restored = checkpoints.restore(like)
        state = program.load_state(plan) if restored is None else restored.state
    except BaseException:
        checkpoints.close()
        raise
    return lambda: loop.run(plan, checkpoints, state, None if restored is None else restored.card)


def _claim(out: Path) -> None:
    """Lock the folder until the process ends; process 0 does it, and all learn whether it could."""
    import fcntl

    taken = False
    if jax.process_index() == 0:
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # never closed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            taken = True
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        taken = bool(multihost_utils.broadcast_one_to_all(np.asarray(taken)))
    if taken:
        raise ValueError(f"--out {out}: another run is writing there")


def _check_same(config: Config, before: Card, now: Card, like: Any) -> None:
    """Raise ValueError where checkpoints of the card `before` are not this run's, or (even forced) not of its shapes."""
    if not config.force and (found := differences(before, now)):
        raise ValueError(
            f"--out {config.out} holds a run of another configuration: {found[0]}; choose another --out, or go on all "
            "the same with --force"
        )
    saved, here = (
        {name: entry.rpartition(":")[0] for name, entry in prints.items()}
        for prints in (before["fingerprints"], shapes_of(like))
    )
    for name in here | saved:
        if here.get(name) != saved.get(name):
            raise ValueError(
                f"--out {config.out} holds checkpoints of another shape: {name} was {saved.get(name)} and is "
                f"{here.get(name)} now; choose another --out"
            )
