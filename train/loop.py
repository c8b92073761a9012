"""The training loop: steps, checkpoints, evaluations, and a good end whenever it is told to end."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recyc_jax import export
from train import evaluate, forward, metrics
from train.checkpoint import Card, Checkpoints
from train.data import batches
from train.plan import Plan, eval_lengths
from train.program import abstract_batch, abstract_state, compiled_step
from train.step import TrainState


class _Stop(Exception):  # noqa: N818 - no error
    """The process was asked to end."""


class _Asked:
    """Remembers the first signal that asks the process to end."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        self.number = self.number or number

    def look(self) -> None:
        """Raise _Stop where any of the run's processes was asked: all call this at the same places, and stop together."""
        number = self.number  # a signal that comes while processes speak is for the next look
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            number = int(np.max(multihost_utils.process_allgather(np.asarray(number or 0)))) or None
        if number is not None:
            self.number = number
            raise _Stop


@contextlib.contextmanager
def _listening() -> Iterator[_Asked]:
    asked = _Asked()
    before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(plan: Plan, checkpoints: Checkpoints, state: TrainState, restored: Card | None) -> int:
    """Train to the end, or until SIGTERM or SIGINT, which end the step, save and return 143 or 130; 1 where too many
    steps in a row were not finite."""
    with _listening() as asked:
        loop = _Loop(plan, checkpoints, asked, restored)
        try:
            status = loop.train(state)
        finally:
            checkpoints.wait()
            checkpoints.close()
            loop.log.close()
    return status


class _Loop:
    def __init__(self, plan: Plan, checkpoints: Checkpoints, asked: _Asked, restored: Card | None) -> None:
        self.plan, self.checkpoints, self.asked = plan, checkpoints, asked
        self.first = jax.process_index() == 0  # the process that writes and prints
        config = plan.config
        self.log = metrics.Metrics(
            config.out, config.tensorboard and self.first, config.wandb if self.first else None, plan.card
        )
        self.batch = abstract_batch(plan)
        self.batches = batches(plan.rows, config.batch_size, config.seed)
        if restored is not None:
            self.batches.set_state(restored["position"])
        begun = 0 if restored is None else restored["step"]
        if self.first:
            self.log.resume(-1 if restored is None else begun)
        kind = plan.mesh.devices.flat[0].device_kind
        self.peak = metrics.peak_flops(kind)
        self.say(
            f"{'begins' if restored is None else f'goes on from step {begun}'}, to step {plan.optimizer.steps}; "
            f"attention: {plan.attention}"
        )

    def say(self, line: str) -> None:
        if self.first:
            print(line, flush=True)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def train(self, state: TrainState) -> int:
        plan, config, steps = self.plan, self.plan.config, self.plan.optimizer.steps
        taken = int(state.step)
        try:
            self.evaluate(state, taken, last=taken == steps)
            program = None
            with self.progress(taken, steps) as show:
                while taken < steps:
                    self.asked.look()
                    if program is None:
                        began = time.monotonic()
                        program = compiled_step(plan, abstract_state(plan))
                        self.say(f"compiled the step in {time.monotonic() - began:.0f} s")
                    state, row = self.step(program, state)
                    taken = row["step"]
                    self.record([row])
                    show(row)
                    if int(state.skipped_in_row) >= config.max_bad_steps:
                        return self.give_up(taken)
                    if taken % config.save_every == 0 or taken == steps:
                        self.save(state, taken)
                    due = config.eval_every and taken % config.eval_every == 0
                    if due or taken == steps:
                        self.evaluate(state, taken, last=taken == steps)
        except _Stop:
            saved = self.save(state, taken)
            self.checkpoints.wait()
            number = self.asked.number or signal.SIGTERM
            done = f"saved step {taken}; the same command goes on from there" if saved else "nothing new to save"
            self.say(f"{signal.Signals(number).name}: {done}")
            return 128 + number
        self.finish(state)
        return 0

    def step(self, program: Any, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        began = time.monotonic()
        batch = next(self.batches)
        placed = {
            name: jax.make_array_from_callback(like.shape, like.sharding, lambda index, name=name: batch[name][index])
            for name, like in self.batch.items()
        }
        state, numbers = program(state, placed)
        numbers = jax.device_get(numbers)
        seconds = time.monotonic() - began
        tokens = self.plan.config.batch_size * self.plan.config.length
        row = {
            "kind": "train",
            "step": int(state.step),
            "loss": _number(numbers["loss"]),
            "grad_norm": _number(numbers["grad_norm"]),
            # of the update that was made: one that is left out does not move the schedule on
            "learning_rate": float(self.plan.optimizer.rate()(int(state.step) - 1 - int(state.skipped))),
            "skipped": int(state.skipped),
            "tokens": int(numbers["tokens"]),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if self.peak is not None:
            flops = metrics.model_flops(self.plan.model, self.plan.config.length, tokens)
            row["mfu"] = round(flops / seconds / (self.peak * self.plan.mesh.size), 4)
        if not bool(numbers["finite"]):
            self.say(f"WARNING: step {row['step']}: loss or gradients are not finite; the update is left out")
        return state, row

    def save(self, state: TrainState, taken: int) -> bool:
        """Whether this step is, or soon will be, on disk."""
        if taken == 0:  # the weights as they were: nothing to keep
            return False
        card = self.plan.card | {"step": taken, "position": self.batches.get_state()}
        saved = self.checkpoints.save(taken, state, card)
        if not saved:
            self.say(f"WARNING: step {taken} is not saved: its state holds numbers that are not finite")
        return saved

    def give_up(self, taken: int) -> int:
        if self.first:
            print(
                f"error: {self.plan.config.max_bad_steps} steps in a row, up to step {taken}, had a loss or gradients that "
                f"are not finite; nothing of them was kept. The checkpoints before are in {self.plan.config.out}; a lower "
                "--learning-rate, with another --out or --force, may help",
                file=sys.stderr,
            )
        return 1

    def record(self, rows: list[dict[str, Any]]) -> None:
        if self.first:
            self.log.add(rows)

    # --- evaluation and the end --------------------------------------------------------------------------------------

    def evaluate(self, state: TrainState, taken: int, last: bool) -> None:
        """Held-out perplexity at this step, once: before the first step, where it is due, and after the last one."""
        plan, config = self.plan, self.plan.config
        due = taken == 0 or last or (config.eval_every and taken % config.eval_every == 0)
        measures = list(itertools.product(eval_lengths(config), config.eval_new_tokens))
        there = {
            (row["length"], row["new_tokens"], row["policy"])
            for row in self.log.rows
            if row["kind"] == "evaluation" and row["step"] == taken
        }
        known = np.asarray([there >= {(*measure, policy) for policy in config.eval_policies} for measure in measures])
        if jax.process_count() > 1:  # the first process knows; all must do the same
            from jax.experimental import multihost_utils

            known = np.asarray(multihost_utils.broadcast_one_to_all(known))
        if plan.held_out is None or not due or known.all():
            return
        self.say(f"evaluates step {taken}: {len(plan.held_out.tokens)} windows")
        params = jax.jit(
            lambda tree: forward.unstack_layers(jax.tree.map(lambda x: x.astype(plan.compute_dtype), tree))
        )(state.params)
        for (length, new_tokens), measured in zip(measures, known, strict=True):
            if measured:
                continue
            rows = evaluate.evaluate(
                params,
                plan.model,
                plan.mesh,
                plan.held_out.ends(length),
                config.eval_policies,
                new_tokens,
                config.eval_batch_size,
                self.asked.look,
            )
            self.record([{"kind": "evaluation", "step": taken, **row} for row in rows])
            for row in rows:
                error = "" if row["nll_stderr"] is None else f" ± {row['nll_stderr']:.4f}"
                loss = f"{row['nll']:.4f}{error} nats a token"
                where = f"{row['domain']}, last {new_tokens} of {length}"
                self.say(f"  {row['policy']}, {where}: perplexity {row['perplexity']:.3f}, {loss}")

    def finish(self, state: TrainState) -> None:
        """The result in Hugging Face layout, and the plot."""
        config = self.plan.config
        if config.export:
            params = forward.unstack_layers(jax.tree.map(_on_host, state.params))
            if self.first:
                export.save_pretrained(
                    config.out / "model", params, self.plan.model, self.plan.folder, jnp.dtype(config.export_dtype)
                )
        if self.first:
            metrics.plot(config.out / "loss.png", self.log.rows)
            where = f"{config.out}/model" if config.export else f"{config.out}/checkpoints"
            self.say(f"{where} holds the result; metrics.jsonl and loss.png beside it tell how it came about")

    @contextlib.contextmanager
    def progress(self, taken: int, steps: int) -> Iterator[Any]:
        """Shows a step's numbers: a bar on a terminal, else a line now and then."""
        from rich.console import Console

        from eval import command

        def described(row: dict[str, Any]) -> str:
            loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
            mfu = f", MFU {100 * row['mfu']:.1f}%" if "mfu" in row else ""
            return f"loss {loss}, {row['tokens_per_second']:,.0f} tokens/s{mfu}"

        if not self.first:
            yield lambda row: None
        elif Console().is_terminal:
            with command.progress() as bar:
                task = bar.add_task("training", total=steps, completed=taken)
                yield lambda row: bar.update(task, completed=row["step"], description=described(row))
        else:
            began = time.monotonic()

            def line(row: dict[str, Any]) -> None:
                if row["step"] % self.plan.config.log_every == 0 or row["step"] == steps:
                    rate = (time.monotonic() - began) / (row["step"] - taken)
                    self.say(f"step {row['step']}/{steps}: {described(row)}, {rate * (steps - row['step']):.0f} s left")

            yield line


def _number(value: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if math.isfinite(value) else None


def _on_host(leaf: jax.Array) -> np.ndarray:
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
