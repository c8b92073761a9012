"""What `/metrics` tells Prometheus."""

from __future__ import annotations

import prometheus_client as prometheus

from recyc_jax.serve.engine import Engine, Watch

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The figures of one server."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter("recyc_jax_requests", "Requests", ["path", "status"], registry=registry)
        self.first = prometheus.Histogram(
            "recyc_jax_first_token_seconds", "Until an answer's first token", buckets=SECONDS, registry=registry
        )
        self.whole = prometheus.Histogram(
            "recyc_jax_request_seconds", "Until an answer's end", buckets=SECONDS, registry=registry
        )
        self._tokens = prometheus.Counter("recyc_jax_tokens", "Tokens", ["kind"], registry=registry)
        self._batches = prometheus.Histogram(
            "recyc_jax_batch_rows", "Requests answered together", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )

    def watch(self) -> Watch:
        """For the engine."""

        def tokens(read: int, cached: int, made: int) -> None:
            for kind, count in (("read", read), ("cached", cached), ("made", made)):
                self._tokens.labels(kind).inc(count)

        return Watch(self._batches.observe, tokens)

    def follow(self, engine: Engine) -> None:
        """Tell how many requests wait and run, and what is kept."""
        gauges = {
            "waiting_requests": lambda: engine.waiting,
            "running_requests": lambda: engine.running,
            "kept_states": lambda: len(engine.kept),
            "kept_bytes": lambda: engine.kept.size,
        }
        for name, value in gauges.items():
            prometheus.Gauge(f"recyc_jax_{name}", name.replace("_", " "), registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return prometheus.generate_latest(self._registry)
