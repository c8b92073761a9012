"""The training loop: steps, checkpoints, evaluations, and a clean end on SIGTERM or SIGINT. Which attention a step takes
is built into `state.compiled_step`; recycled attention over a sequence is `recyc_jax/attention/whole_sequence.py`."""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recyc_jax import sharding
from recyc_jax.commands import files, numbers, together
from recyc_jax.loading import export
from train import evaluation, figures, forward, metrics, progress, signals
from train.card import Card
from train.checkpoint import Checkpoints
from train.config import eval_lengths
from train.data import batches
from train.opening import Opened
from train.run import Run
from train.state import abstract_batch, abstract_state, compiled_step
from train.step import TrainState


def train(run: Run, opened: Opened) -> int:
    """Train to the last step and return 0. On SIGTERM or SIGINT, finish the current step, save it and return 143 or
    130. Returns 1 after `max_bad_steps` steps in a row whose loss or gradients are not finite."""
    with signals.listening() as asked:
        loop = _Loop(run, opened.checkpoints, asked, opened.restored)
        try:
            status = loop.train(opened.state)
            opened.checkpoints.wait()
        except Exception as error:
            if not files.no_space(error):
                raise
            together.note("no space left to write", 1)
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            print(
                f"error: no space left in {run.config.out} ({reason}); its checkpoints are kept: make room, and the same "
                "command goes on from the last one",
                file=sys.stderr,
                flush=True,
            )
            status = 1
        finally:
            with contextlib.suppress(Exception):  # it repeats what a save that failed has raised
                opened.checkpoints.close()
            loop.log.close()
    return status


class _Loop:
    def __init__(self, run: Run, checkpoints: Checkpoints, asked: signals.Asked, restored: Card | None) -> None:
        self.run, self.checkpoints, self.asked = run, checkpoints, asked
        self.first = jax.process_index() == 0  # the process that writes and prints
        config = run.config
        self.log = metrics.Metrics(
            config.out, config.tensorboard and self.first, config.wandb if self.first else None, run.card
        )
        self.batch = abstract_batch(run)
        self.batches = batches(run.rows, config.batch_size, config.seed)
        if restored is not None:
            self.batches.set_state(restored["position"])
        begun = 0 if restored is None else restored["step"]
        if self.first:
            self.log.resume(-1 if restored is None else begun)
        kind = run.mesh.devices.flat[0].device_kind
        self.peak = metrics.peak_flops(kind)
        for line in run.data:
            self.say(line)
        self.say(
            f"{'begins' if restored is None else f'goes on from step {begun}'}, to step {run.optimizer.steps}; "
            f"attention: {run.attention}"
        )
        self.saved_at = time.monotonic()

    def say(self, line: str) -> None:
        if self.first:
            print(line, flush=True)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def train(self, state: TrainState) -> int:
        run, config, steps = self.run, self.run.config, self.run.optimizer.steps
        taken = int(state.step)
        try:
            self.evaluate(state, taken, last=taken == steps)
            program = None
            with progress.shown(taken, steps, config.log_every, self.first) as show:
                while taken < steps:
                    self.asked.look()  # raises signals.Stop after a signal
                    if program is None:
                        began = time.monotonic()
                        program = compiled_step(run, abstract_state(run))
                        self.say(f"compiled the step in {time.monotonic() - began:.0f} s")
                    state, row = self.step(program, state)
                    taken = row["step"]
                    self.record([row])
                    show(row)
                    if int(state.skipped_in_row) >= config.max_bad_steps:
                        return self.give_up(taken)
                    if taken == steps or self.is_save_due(taken):
                        self.save(state, taken)
                    due = config.eval_every and taken % config.eval_every == 0
                    if due or taken == steps:
                        self.evaluate(state, taken, last=taken == steps)
        except signals.Stop:
            saved = self.save(state, taken)
            self.checkpoints.wait()
            number = self.asked.number or signal.SIGTERM
            done = f"saved step {taken}; the same command resumes from there" if saved else "nothing new to save"
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
        state, measured = program(state, placed)
        measured = jax.device_get(measured)
        seconds = time.monotonic() - began
        tokens = self.run.config.batch_size * self.run.config.length
        row = {
            "kind": "train",
            "step": int(state.step),
            "loss": numbers.finite(float(measured["loss"])),
            "grad_norm": numbers.finite(float(measured["grad_norm"])),
            # counted in updates: a skipped update does not advance the schedule
            "learning_rate": float(self.run.optimizer.rate()(int(state.step) - 1 - int(state.skipped))),
            "skipped": int(state.skipped),
            "tokens": int(measured["tokens"]),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
        }
        if self.peak is not None:
            flops = metrics.model_flops(self.run.model, self.run.config.length, tokens)
            row["mfu"] = round(flops / seconds / (self.peak * self.run.mesh.size), 4)
        if not bool(measured["finite"]):
            self.say(f"WARNING: step {row['step']}: loss or gradients are not finite; the update is left out")
        return state, row

    def is_save_due(self, taken: int) -> bool:
        """Whether --save-every or --save-minutes asks for a checkpoint of this step; all processes agree."""
        config = self.run.config
        if config.save_every and taken % config.save_every == 0:
            return True
        if not config.save_minutes:
            return False
        late = time.monotonic() - self.saved_at >= 60 * config.save_minutes
        if jax.process_count() > 1:  # the processes' clocks differ
            from jax.experimental import multihost_utils

            late = bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))
        return late

    def save(self, state: TrainState, taken: int) -> bool:
        """Start saving this step; returns whether it is, or soon will be, on disk."""
        if taken == 0:  # before the first step there is nothing new to save
            return False
        card = self.run.card | {"step": taken, "position": self.batches.get_state()}
        saved = self.checkpoints.save(taken, state, card)
        self.saved_at = time.monotonic()
        if not saved:
            self.say(f"WARNING: step {taken} is not saved: its state holds numbers that are not finite")
        return saved

    def give_up(self, taken: int) -> int:
        if self.first:
            print(
                f"error: {self.run.config.max_bad_steps} steps in a row, up to step {taken}, had a loss or gradients that "
                f"are not finite; nothing of them was kept. The checkpoints before are in {self.run.config.out}; a lower "
                "--learning-rate, with another --out or --force, may help",
                file=sys.stderr,
            )
        return 1

    def record(self, rows: list[dict[str, Any]]) -> None:
        if self.first:
            self.log.add(rows)

    # --- evaluation and the end --------------------------------------------------------------------------------------

    def evaluate(self, state: TrainState, taken: int, last: bool) -> None:
        """Measure held-out perplexity if an evaluation is due at this step and was not recorded before."""
        run, config = self.run, self.run.config
        due = taken == 0 or last or (config.eval_every and taken % config.eval_every == 0)
        wanted = list(itertools.product(eval_lengths(config), config.eval_new_tokens))
        recorded = {
            (row["length"], row["new_tokens"], row["policy"])
            for row in self.log.rows
            if row["kind"] == "evaluation" and row["step"] == taken
        }
        done = np.asarray([recorded >= {(*measure, policy) for policy in config.eval_policies} for measure in wanted])
        if jax.process_count() > 1:  # only the first process has read the log, and all must agree
            from jax.experimental import multihost_utils

            done = np.asarray(multihost_utils.broadcast_one_to_all(done))
        if run.held_out is None or not due or done.all():
            return
        self.say(f"evaluates step {taken}: {len(run.held_out.tokens)} windows")
        params = jax.jit(
            lambda tree: forward.unstack_layers(jax.tree.map(lambda x: x.astype(run.compute_dtype), tree))
        )(state.params)
        for (length, new_tokens), measured in zip(wanted, done, strict=True):
            if measured:
                continue
            with jax.set_mesh(run.mesh):
                rows = evaluation.evaluate(
                    params,
                    run.model,
                    run.held_out.ends(length),
                    config.eval_policies,
                    new_tokens,
                    config.eval_batch_size,
                    self.asked.look,
                )
            self.record([{"kind": "evaluation", "step": taken, **row} for row in rows])
            for row in rows:
                error = "" if row["nll_stderr"] is None else f" ± {row['nll_stderr']:.4f}"
                loss = f"{numbers.shown(row['nll'], 4)}{error} nats a token"
                where = f"{row['domain']}, last {new_tokens} of {length}"
                self.say(f"  {row['policy']}, {where}: perplexity {numbers.shown(row['perplexity'], 3)}, {loss}")

    def finish(self, state: TrainState) -> None:
        """Write the trained model in Hugging Face layout, and the plot."""
        config = self.run.config
        if config.export:
            params = forward.unstack_layers(jax.tree.map(sharding.fetched, state.params))
            if self.first:
                export.save_pretrained(
                    config.out / "model", params, self.run.model, self.run.folder, jnp.dtype(config.export_dtype)
                )
        if self.first:
            figures.plot(config.out / "loss.png", self.log.rows)
            where = f"{config.out}/model" if config.export else f"{config.out}/checkpoints"
            self.say(f"{where} holds the result; metrics.jsonl and loss.png beside it tell how it came about")
