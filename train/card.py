"""The card of a run: its settings and the fingerprints of its inputs. Every checkpoint holds the card, and a resumed
run must have the same `identity`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np

from recyc_jax.attention.whole_sequence import Recycle
from recyc_jax.commands.corpus import Corpus
from train.config import Config
from train.optimizer import Optimizer

Card = dict[str, Any]


def make(
    config: Config,
    *,
    weights: str,
    sources: Mapping[str, str],
    corpus: Corpus,
    held: np.ndarray,
    packed: bool,
    rows: int,
    recycle: Recycle | None,
    optimizer: Optimizer,
    dtype: str,
    mesh: Mapping[str, int],
    attention: str,
) -> Card:
    """The card of a run, as a checkpoint returns it: after a round trip through JSON."""
    card = {
        "model": {"weights": weights},
        "data": {
            "tokens": corpus.fingerprint,
            "packed": packed,
            "held_out": hashlib.sha256(np.asarray(held, np.int64).tobytes()).hexdigest()[:16],
            "seed": config.seed,
            "rows": rows,
        },
        "recycle": None if recycle is None else recycle._asdict(),
        "training": {
            "length": config.length,
            "batch_size": config.batch_size,
            **{name: value for name, value in dataclasses.asdict(optimizer).items() if name != "steps"},
            "warmup_steps": config.warmup_steps,
            "z_loss": config.z_loss,
            "dtype": dtype,
        },
        "steps": optimizer.steps,
        "names": {"model": config.model, "data": dict(sources)},
        "mesh": dict(mesh),
        "accumulate": config.accumulate,
        "attention": attention,
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }
    card["config_hash"] = hashlib.sha256(json.dumps(identity(card), sort_keys=True).encode()).hexdigest()[:16]
    return json.loads(json.dumps(card))


def identity(card: Card) -> Card:
    """The parts of a card that a resumed run must share with its checkpoints. The number of steps, names and places of
    model and data, mesh, accumulation, attention implementation and versions may differ."""
    return {name: card.get(name) for name in ("model", "data", "recycle", "training")}


def differences(before: Card, now: Card) -> list[str]:
    """The `identity` settings in which two cards differ, each as `name was X and is Y now`."""
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
