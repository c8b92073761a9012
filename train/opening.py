"""The start of a run: lock its folder, and load the latest checkpoint or the model's weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from recyc_jax.commands import hosts, locks
from train import card
from train import state as state_of
from train.card import Card
from train.checkpoint import Checkpoints, shapes_of
from train.config import Config
from train.run import Run
from train.step import TrainState


class Opened(NamedTuple):
    """A run whose folder is locked and whose state is loaded."""

    checkpoints: Checkpoints
    state: TrainState
    restored: Card | None  # the card of the checkpoint that the state comes from; None for a new run


def open_run(run: Run) -> Opened:
    """Lock the run's folder, and load the latest checkpoint, or the model's weights if there is none. Raises ValueError
    if another run is writing to the folder, or if its checkpoints belong to another run."""
    config = run.config
    hosts.from_first(lambda: locks.claim(config.out / ".lock", config.out))
    checkpoints = Checkpoints(config.out / "checkpoints", config.keep)
    try:
        restored = None
        if checkpoints.steps():
            if checkpoints.steps()[-1] > run.optimizer.steps:
                raise ValueError(
                    f"--steps {run.optimizer.steps}: the run in --out {config.out} has taken {checkpoints.steps()[-1]}; "
                    "name at least as many, or choose another --out"
                )
            like = state_of.abstract_state(run)
            before = checkpoints.latest_card()
            if before is not None:
                _check_same(config, before, run.card, like)
                _tell_changes(before, run)
            restored = checkpoints.restore(like)
        state = state_of.load_state(run) if restored is None else restored.state
    except BaseException:
        checkpoints.close()
        raise
    return Opened(checkpoints, state, None if restored is None else restored.card)


def _tell_changes(before: Card, run: Run) -> None:
    """Print what differs from the checkpoints' run and is allowed to."""
    lines = []
    if before.get("attention", run.attention) != run.attention:
        lines.append(f"attention was {before['attention']} and is {run.attention} now: not the same bits")
    steps = before.get("steps", run.optimizer.steps)
    if steps != run.optimizer.steps:
        lines.append(
            f"--steps was {steps} and is {run.optimizer.steps} now: the learning rate goes on as a run of "
            f"{run.optimizer.steps} steps has it, and the steps before had that of {steps}"
        )
    if run.config.force:
        lines += [f"WARNING: --force: {difference}" for difference in card.differences(before, run.card)]
    if jax.process_index() == 0:
        for line in lines:
            print(line, flush=True)


def _check_same(config: Config, before: Card, now: Card, like: Any) -> None:
    """Raise ValueError if checkpoints with the card `before` belong to another run (unless forced), or if their leaves
    differ from `like` in dtype or shape (even if forced)."""
    if not config.force and (found := card.differences(before, now)):
        raise ValueError(
            f"--out {config.out} holds a run of another configuration: {found[0]}; choose another --out, or "
            "resume all the same with --force"
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
