"""Times of turns: `python -m eval.turns`.

A document of random tokens is read once. Then questions about it are asked, each from the document's bookmark, and the same
answer is decoded in one go and as a stream. Weights are random, which does not change what is read; no row ends early.
All programs are compiled by a first pass that is not timed."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from recyc_jax.commands import command_line, files
from recyc_jax.commands.backends import Backend

if TYPE_CHECKING:
    from recyc_jax import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """Time a document, questions about it, and streams."""

    model: str = "smollm2-135m"
    """A model shape by name, or a folder with a config.json, as in `eval.speed`."""
    batch: int = 1
    length: int = 2048
    """Tokens of the document."""
    question: int = 100
    """Tokens of a question."""
    answer: int = 64
    """Tokens of an answer."""
    questions: int = 20
    stream: int = 256
    """Tokens of the answer that is also streamed."""
    policies: tuple[str, ...] = ("lookahead:budget=512,stride=50",)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    backend: Backend = "auto"
    seed: int = 0
    allow_beyond_context: bool = False
    out: Path = Path("results/turns")


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m eval.turns", args=args)
    return command_line.run(_prepare, config, "the rows so far are kept")


def _prepare(config: Config) -> Callable[[], None]:
    counts = ("batch", "length", "question", "answer", "questions", "stream")
    command_line.check_counts(**{name: getattr(config, name) for name in counts})
    total = config.length + config.question + max(config.answer, config.stream)
    command_line.check_policies(config.policies, [total])
    from recyc_jax import shapes

    shape = shapes.named_shape(config.model)
    command_line.check_context([total], shape.max_position_embeddings, config.allow_beyond_context)
    from recyc_jax.commands import backends

    backends.select(config.backend)
    files.writable_folder("--out", config.out)
    return lambda: _measure(config, shape)


def _measure(config: Config, shape: LlamaConfig) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import recyc_jax as rj
    from recyc_jax.commands import json_lines, measuring

    dtype = jnp.dtype(command_line.dtype_name(config.dtype))
    made = jax.eval_shape(lambda: rj.init_params(shape, jax.random.key(0), dtype))
    params, random = measuring.random_like(made, config.seed, 0.02), np.random.default_rng(config.seed)
    rows, beyond = config.batch, dict[str, Any](allow_beyond_context=config.allow_beyond_context)

    def tokens(count: int) -> Any:
        return random.integers(0, shape.vocab_size, (rows, count), dtype=np.int32)

    def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
        began = time.perf_counter()
        result = jax.block_until_ready(run())
        return result, time.perf_counter() - began

    def times(policy: rj.Policy) -> dict[str, Any]:
        options: dict[str, Any] = dict(policy=policy, eos_ids=())
        document, room = tokens(config.length), config.question + max(config.answer, config.stream) + 1

        def read() -> Any:
            return rj.prefill(params, shape, document, policies=policy, max_new_tokens=room, **beyond)

        def ask(state: Any, count: int) -> Any:
            return rj.extend(params, shape, state, tokens(config.question), max_new_tokens=count, **beyond)

        def begin(state: Any) -> Any:
            stream = rj.stream_after(params, shape, ask(state, config.answer), **options)
            next(stream)
            return stream

        def answered(state: Any) -> Any:
            state = ask(state, config.answer)
            return rj.decode(params, shape, state, **options)[1]

        def streamed(state: Any) -> Any:
            stream = rj.stream_after(params, shape, state, **options)
            made = sum(piece.tokens.shape[1] for piece in stream)
            assert made == config.stream
            assert stream.state is not None
            return rj.rewind(stream.state)

        state = read()
        for _ in range(2):  # the second time the cache has grown already
            mark = rj.bookmark(state)
            state = rj.rewind(answered(state), to=mark)
            stream = begin(state)
            for _ in stream:
                pass
            state = rj.rewind(stream.state, to=mark)
            state = ask(state, config.stream)
            _, state = rj.decode(params, shape, state, **options)
            state = rj.rewind(streamed(state), to=mark)
        del state, stream
        state, prefill_s = seconds(read)
        mark, first = rj.bookmark(state), []
        state = rj.rewind(answered(state), to=mark)  # the cache grows
        for _ in range(5):
            stream, took = seconds(lambda state=state: begin(state))
            first.append(took)
            for _ in stream:
                pass
            state = rj.rewind(stream.state, to=mark)
        del stream

        def all_questions(state: Any) -> Any:
            for _ in range(config.questions):
                state = rj.rewind(answered(state), to=mark)
            return state

        state, questions_s = seconds(lambda: all_questions(state))
        state = ask(state, config.stream)
        whole, pieces = [], []
        for _ in range(5):
            (_, state), took = seconds(lambda state=state: rj.decode(params, shape, state, **options))
            whole.append(took)
            state, took = seconds(lambda state=state: streamed(state))
            pieces.append(took)
        whole_s, pieces_s = map(statistics.median, (whole, pieces))
        own_s = config.questions * whole_s * (config.answer - 1) / (config.stream - 1)
        return {
            "prefill_s": round(prefill_s, 3),
            "first_token_s": round(statistics.median(first), 4),
            "questions_s": round(questions_s, 3),
            "own_tokens_s": round(own_s, 3),
            "ratio": round((prefill_s + questions_s) / (prefill_s + own_s), 4),
            "ms_a_token": round(1000 * whole_s / (config.stream - 1), 4),
            "ms_a_streamed_token": round(1000 * pieces_s / (config.stream - 1), 4),
            "stream_loss": round(pieces_s / whole_s - 1, 4),
            "peak_gib": round((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30, 2),
        }

    facts = {"model": config.model, "device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": str(dtype)}
    names = ("batch", "length", "question", "answer", "questions", "stream")
    with json_lines.appending(config.out / "turns.jsonl") as add:
        for text in config.policies:
            command_line.heed_interrupt()
            total = config.length + config.question + config.answer
            row = times(rj.parse_policy(text, total))
            print(f"{text}: " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            add({"policy": text, **{name: getattr(config, name) for name in names}, **facts, **row})
    print(f"{config.out / 'turns.jsonl'} holds the results")


if __name__ == "__main__":
    sys.exit(main())
