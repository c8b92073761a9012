"""The thread that runs the model: it takes waiting jobs in batches and hands out their answers as they come.

Jobs wait in a queue with a limit. The first one is answered together with others of its kind (`_kind`): prompts of one
bucket of lengths, of which no beginning was read before. A job whose prompt goes on from one that was read is answered
alone, from that state."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recyc_jax.prefilling import prefill
from recyc_jax.prompts import bucket
from recyc_jax.sampling import CountPenalty, Greedy, Sample, chain
from recyc_jax.serve.jobs import TOP, Answer, Job, Token
from recyc_jax.serve.kept_states import KeptStates, bytes_of, row_of
from recyc_jax.streaming import Piece, Stream, stream_after
from recyc_jax.text import policy_of
from recyc_jax.turns import extend, rounded, token_counts

LOG = logging.getLogger(__name__)
STOPPING = "the server is stopping"


class FullError(Exception):
    """As many jobs wait as may."""


class StoppingError(Exception):
    """The engine takes no more jobs."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine holds at a time."""

    max_batch: int = 8
    max_waiting: int = 64
    kept_bytes: int = 2**30


@dataclasses.dataclass
class Watch:
    """Functions that are called with what happens, for metrics."""

    batch: Callable[[int], None] = lambda jobs: None
    tokens: Callable[[int, int, int], None] = lambda read, cached, made: None


class Engine:
    """Answers jobs with one model, in a thread of its own."""

    def __init__(self, lm: Any, policy: str, limits: Limits, watch: Watch | None = None) -> None:
        self._lm, self._policy, self._limits, self._watch = lm, policy, limits, watch or Watch()
        rings = len(lm.config.full_layers) < lm.config.num_hidden_layers
        self.kept = KeptStates(limits.kept_bytes, goes_back=not rings)
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._change, self._is_stopping = threading.Condition(), False
        self._mesh = jax.sharding.get_mesh()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Answer a short prompt, so that the first client does not wait for compilation alone, then begin."""
        job = Job(list(self._lm.tokenizer("Hello")["input_ids"])[:1], 2, temperature=0.0)
        with self._on_mesh():
            self._answer([job])
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return sum(not job.ended.is_set() for job in list(self._waiting))

    @property
    def running(self) -> int:
        """Jobs that are being answered."""
        return sum(not job.ended.is_set() for job in list(self._running))

    @property
    def is_full(self) -> bool:
        """Whether as many jobs wait as may."""
        return self.waiting >= self._limits.max_waiting

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait for their turn. Raises FullError if not all can, and StoppingError after `stop`."""
        with self._change:
            if self._is_stopping:
                raise StoppingError(STOPPING)
            self._waiting = [job for job in self._waiting if not job.ended.is_set()]
            if len(self._waiting) + len(jobs) > self._limits.max_waiting:
                raise FullError(
                    f"{len(self._waiting)} requests wait already, and at most {self._limits.max_waiting} may"
                )
            self._waiting += jobs
            self._change.notify()

    def stop(self, seconds: float) -> None:
        """Take no more jobs, answer those that are there, for so many seconds at most, and end the thread."""
        with self._change:
            self._is_stopping = True
            self._change.notify()
        self._thread.join(seconds)
        for job in [*self._waiting, *self._running]:
            job.fail(STOPPING)
        self._thread.join(5)

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh)

    def _run(self) -> None:
        with self._on_mesh():
            while jobs := self._next():
                began = time.perf_counter()
                self._answer_or_fail(jobs)
                LOG.info("%d answered in %.1f s, %d wait", len(jobs), time.perf_counter() - began, self.waiting)
                self._running = []

    def _next(self) -> list[Job]:
        """The jobs to answer next; none once the engine is stopping and nobody waits."""
        with self._change:
            while True:
                self._waiting = [job for job in self._waiting if not job.ended.is_set()]
                if self._waiting or self._is_stopping:
                    break
                self._change.wait()
            if not self._waiting:
                return []
            first = self._waiting[0]
            if self.kept.shared(first.ids):
                jobs = [first]
            else:
                same = [job for job in self._waiting if _kind(job) == _kind(first) and not self.kept.shared(job.ids)]
                jobs = same[: self._limits.max_batch]
            self._waiting = [job for job in self._waiting if job not in jobs]
            self._running = jobs
            return jobs

    def _answer_or_fail(self, jobs: list[Job]) -> None:
        try:
            had_kept, is_full = len(self.kept) > 0, False
            try:
                self._answer(jobs)
            except jax.errors.JaxRuntimeError as error:
                is_full = "RESOURCE_EXHAUSTED" in str(error) and had_kept and not any(job.made for job in jobs)
                if not is_full:
                    raise
            if is_full:  # here the arrays of the first try are free
                LOG.warning("out of memory: kept states are dropped")
                self.kept.clear()
                self._answer(jobs)
        except Exception as error:
            LOG.exception("%d requests failed", len(jobs))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            for job in jobs:
                job.fail(f"the model failed: {reason[:200]}")

    def _answer(self, jobs: list[Job]) -> None:
        """Answer jobs of one kind, and keep what was read."""
        lm, rows = self._lm, [job.ids for job in jobs]
        room = max(job.max_tokens for job in jobs)
        policy = policy_of(self._policy, max(map(len, rows)) + room)
        # programs are compiled for few numbers of rows: the others hold a token of the first prompt, and are not read
        unread = [0] * (2 ** math.ceil(math.log2(len(rows))) - len(rows))
        padded = [*rows, *(rows[0][:1] for _ in unread)]
        state, shared = self.kept.take(rows[0]) if len(jobs) == 1 else (None, 0)
        if state is None:
            options: dict[str, Any] = dict(policies=(policy,), max_new_tokens=room, allow_beyond_context=True)
            state = prefill(lm.params, lm.config, padded, **options)
            state = rounded(state) if len(jobs) == 1 else state
        else:
            state = extend(lm.params, lm.config, state, [rows[0][shared:]], keep=[shared], max_new_tokens=room)
        jobs[0].cached = shared
        answers = [Answer(job, lm.tokenizer, lm.config.eos_token_ids) for job in jobs]
        stream = stream_after(
            lm.params,
            lm.config,
            state,
            policy=policy,
            sampling=_sampling(jobs, len(padded)),
            key=jax.vmap(jax.random.key)(np.asarray([*(job.seed for job in jobs), *unread], np.uint32)),
            top_log_probabilities=None if jobs[0].top is None else min(TOP, lm.config.vocab_size),
        )
        self._watch.batch(len(jobs))
        for piece in stream:
            for row, answer in enumerate(answers):
                answer.add(_tokens(piece, row, answer.job.top))
            if all(job.ended.is_set() for job in jobs):
                break
        self._keep(stream, answers)
        for job in jobs:
            self._watch.tokens(len(job.ids) - job.cached, job.cached, job.made)

    def _keep(self, stream: Stream, answers: list[Answer]) -> None:
        """Keep each row's state, which may stand some tokens behind the answer's end."""
        state = stream.state
        if state is None or state.logits.is_deleted():
            return
        held, pending = token_counts(state)
        known = held + pending  # [B]: what `extend` can go on from, a token that is not fed yet among it
        size = bytes_of(state) // len(known)
        for row, answer in enumerate(answers):
            tokens = (answer.job.ids + answer.ids)[: int(known[row])]
            is_whole = self.kept.goes_back or len(tokens) == known[row]
            if is_whole and self.kept.has_room(size, len(tokens)):
                self.kept.keep(row_of(state, row), tokens)


def _kind(job: Job) -> tuple[Any, ...]:
    """Jobs of one kind are answered in one batch, by one program."""
    return bucket(len(job.ids)), job.temperature == 0, bool(job.presence or job.frequency), job.top is None


def _sampling(jobs: list[Job], rows: int) -> Any:
    """How the next tokens of the rows are chosen, those behind the jobs' like the first one's."""

    def by_row(name: str) -> jax.Array:
        numbers = [getattr(job, name) for job in jobs]
        return jnp.asarray(numbers + numbers[:1] * (rows - len(jobs)), jnp.float32)

    sampler: Any = Greedy()
    if jobs[0].temperature != 0:
        sampler = Sample(by_row("temperature"), top_p=by_row("top_p"))
    if any(job.presence or job.frequency for job in jobs):
        return chain(CountPenalty(by_row("presence"), by_row("frequency")), sampler)
    return sampler


def _tokens(piece: Piece, row: int, top: int | None) -> list[Token]:
    ids = piece.tokens[row, : piece.lengths[row]].tolist()
    if top is None or piece.log_probabilities is None:
        return list(map(Token, ids))
    assert piece.top_tokens is not None
    assert piece.top_log_probabilities is not None
    tokens = []
    for place, token in enumerate(ids):
        best = piece.top_tokens[row, place, :top].tolist(), piece.top_log_probabilities[row, place, :top].tolist()
        tokens.append(Token(token, float(piece.log_probabilities[row, place]), tuple(zip(*best, strict=True))))
    return tokens
