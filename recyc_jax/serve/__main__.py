"""`python -m recyc_jax.serve`: an OpenAI-compatible endpoint for one model."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal

import tyro

from recyc_jax.commands import command_line
from recyc_jax.commands.backends import Backend

KEY = "RECYC_JAX_API_KEY"
GRACE = 30.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class Config:
    """Serve one model over HTTP as OpenAI's interface does: /v1/chat/completions, /v1/completions, /v1/models, /health and
    /metrics. For one machine and a few users: requests of one kind are answered in batches, one batch at a time. An API
    key is taken from the environment variable RECYC_JAX_API_KEY."""

    model: str = "smollm2-135m"
    """Hub id, folder in Hugging Face layout, .gguf file, or smollm2-135m."""
    policy: str = "lookahead:budget=1024,stride=50"
    """The policy of all answers."""
    host: str = "127.0.0.1"
    """The address to listen on; this machine alone by default."""
    port: int = 8000
    name: str | None = None
    """The model's name in requests; --model by default."""
    max_length: int | None = None
    """Tokens of a prompt and its answer; the model's context by default."""
    max_new_tokens: int = 512
    """Tokens of a chat's answer that asks for no number."""
    max_batch: int = 8
    """Requests answered together at most."""
    max_waiting: int = 64
    """Requests that wait at most; further ones get status 429."""
    time_limit: float = 600.0
    """Seconds for a request, waiting included."""
    max_body: int = 8388608
    """Bytes of a request at most."""
    kept_gib: float = 1.0
    """Memory for prompts that have been read, for requests that go on from them; 0 keeps none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on accelerators, float32 on CPU."""
    backend: Backend = "auto"


def main(args: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = tyro.cli(Config, prog="python -m recyc_jax.serve", args=args)
    return command_line.run(_prepare, config, "the server has stopped")


def _prepare(config: Config) -> Callable[[], None]:
    """Check the flags and load the model; returns a function that serves."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install 'recyc-jax[serve]'") from None
    counts = {name: getattr(config, name) for name in ("max_new_tokens", "max_batch", "max_waiting", "max_body")}
    command_line.check_counts(**counts)
    command_line.check_policies([config.policy], [2**20])
    if not 0 <= config.port < 2**16:
        raise ValueError(f"--port {config.port} must lie in 0..65535")
    if not config.time_limit > 0:
        raise ValueError(f"--time-limit {config.time_limit} must be above 0")
    if not config.kept_gib >= 0:
        raise ValueError(f"--kept-gib {config.kept_gib} must be at least 0")
    key = os.environ.get(KEY) or None
    if config.host not in LOOPBACK and key is None:
        print(f"warning: --host {config.host} lets others in, and {KEY} is not set: anyone may ask", file=sys.stderr)
    from recyc_jax.commands import backends, programs

    backends.select(config.backend)
    import jax.numpy as jnp

    import recyc_jax as rj

    programs.keep()
    lm = rj.load_pretrained(config.model, jnp.dtype(command_line.dtype_name(config.dtype)))
    context = lm.config.max_position_embeddings
    if config.max_length is not None and not 2 <= config.max_length <= context:
        raise ValueError(f"--max-length {config.max_length} must lie in 2..{context}, the model's context")
    listening = _listening(config.host, config.port)
    return lambda: _serve(config, lm, key, listening)


def _listening(host: str, port: int) -> Any:
    """A socket that listens there. Raises ValueError where that is not possible."""
    import socket

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        hint = "another server may listen there: pass --port" if "in use" in str(error) else "pass --host and --port"
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}; {hint}") from None


def _serve(config: Config, lm: Any, key: str | None, listening: Any) -> None:
    """Serve until a signal ends it; then answer what was asked, for half a minute at most."""
    import uvicorn

    from recyc_jax.serve.app import App, Rules
    from recyc_jax.serve.asked import Reader
    from recyc_jax.serve.engine import Engine, Limits
    from recyc_jax.serve.metrics import Metrics

    metrics = Metrics()
    limits = Limits(config.max_batch, config.max_waiting, int(config.kept_gib * 2**30))
    engine = Engine(lm, config.policy, limits, metrics.watch())
    print("compiling ...", file=sys.stderr, flush=True)
    engine.start()
    most = config.max_length or lm.config.max_position_embeddings
    name = config.name or config.model
    reader = Reader(lm.tokenizer, name, lm.config.vocab_size, most, config.max_new_tokens)
    hosts = LOOPBACK if config.host in LOOPBACK and key is None else None
    rules = Rules(key, config.max_body, config.max_waiting, config.time_limit, hosts)
    app = App(engine, reader, lm.tokenizer, metrics, rules).routes()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=int(GRACE),
            timeout_keep_alive=75,
            h11_max_incomplete_event_size=65536,
        )
    )
    host, port = listening.getsockname()[:2]
    print(f"{name} under {config.policy}: http://{host}:{port}/v1", file=sys.stderr, flush=True)

    def stop(*_: Any) -> None:
        server.should_exit = True

    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # before uvicorn has handlers of its own, and when it raises it again
        signal.signal(number, stop)
    server.run([listening])
    engine.stop(GRACE if not server.force_exit else 0.0)
    print("stopped", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
