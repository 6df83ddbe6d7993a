"""Prometheus metrics of a server. Labels are served names and versions, never text from a client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rsi_deploy.serving.shadow import Shadow

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        version = ("model", "version")
        self._requests = Counter(
            "rsi_requests", "Requests answered, by HTTP status", (*version, "protocol", "status"), registry=registry
        )
        self._seconds = Histogram(
            "rsi_request_seconds", "Time from decoded to answered", version, buckets=_SECONDS, registry=registry
        )
        self._waited = Histogram("rsi_queue_seconds", "Time in the queue", version, buckets=_SECONDS, registry=registry)
        self._rows = Histogram("rsi_batch_rows", "Rows of a batch", version, buckets=_ROWS, registry=registry)
        self._joined = Counter("rsi_batched_requests", "Requests in batches", version, registry=registry)
        self._ran = Counter("rsi_batch_seconds", "Run time of batches", version, registry=registry)
        self._prompt_tokens = Counter("rsi_prompt_tokens", "Tokens of texts that came", version, registry=registry)
        self._tokens = Counter("rsi_generated_tokens", "Tokens generated", version, registry=registry)
        self._first = Histogram(
            "rsi_first_token_seconds",
            "Time from decoded to first token",
            version,
            buckets=_FIRST,
            registry=registry,
        )
        self._reloads = Counter("rsi_reloads", "Replaced bundles, by outcome", ("outcome",), registry=registry)
        self._waiting = Gauge("rsi_waiting_requests", "Requests that wait for a worker", registry=registry)
        self._workers = Gauge("rsi_workers", "Workers that take requests", registry=registry)
        self._restarts = Gauge("rsi_worker_restarts", "Restarts of dead workers", registry=registry)
        self._lost_lines = Gauge("rsi_lost_log_lines", "Access log lines that were dropped", registry=registry)
        self._shadow = {
            "samples": Gauge("rsi_shadow_samples", "Samples compared", ("model",), registry=registry),
            "skipped": Gauge("rsi_shadow_skipped", "Requests not compared", ("model",), registry=registry),
            "agreement": Gauge("rsi_shadow_agreement_percent", "Equal top-1 answers", ("model",), registry=registry),
        }
        self._shadow_ms = Gauge("rsi_shadow_mean_ms", "Mean run time", ("model", "which"), registry=registry)

    def note_request(
        self, model: str, version: str, protocol: str, status: int, *, seconds: float, waited: float | None
    ) -> None:
        """Count one request; `waited` is None if it never reached a worker."""
        self._requests.labels(model, version, protocol, str(status)).inc()
        if waited is not None:
            self._seconds.labels(model, version).observe(seconds)
            self._waited.labels(model, version).observe(waited)

    def note_batch(self, model: str, version: str, *, rows: int, requests: int, seconds: float) -> None:
        """Count one batch."""
        self._rows.labels(model, version).observe(rows)
        self._joined.labels(model, version).inc(requests)
        self._ran.labels(model, version).inc(seconds)

    def note_tokens(self, model: str, version: str, *, prompt: int, generated: int = 0) -> None:
        """Count the tokens of one request."""
        self._prompt_tokens.labels(model, version).inc(prompt)
        self._tokens.labels(model, version).inc(generated)

    def note_first_token(self, model: str, version: str, seconds: float) -> None:
        """Count the time to the first token of one answer."""
        self._first.labels(model, version).observe(seconds)

    def note_reload(self, outcome: str) -> None:
        """Count one reload; the outcome is "done" or "refused"."""
        self._reloads.labels(outcome).inc()

    def note_state(self, waiting: int, workers: int, restarts: int) -> None:
        """Set the current numbers of waiting requests, workers and restarts."""
        self._waiting.set(waiting)
        self._workers.set(workers)
        self._restarts.set(restarts)

    def note_lost_lines(self, count: int) -> None:
        """Set the number of access log lines that were dropped so far."""
        self._lost_lines.set(count)

    def note_shadow(self, model: str, shadow: Shadow) -> None:
        """Set the current comparison with a shadow."""
        summary = shadow.summary()
        for name, gauge in self._shadow.items():
            if summary[name] is not None:
                gauge.labels(model).set(summary[name])
        for which, times in summary["latency"].items():
            self._shadow_ms.labels(model, which).set(times["mean_ms"])

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return bytes(generate_latest(self._registry))
