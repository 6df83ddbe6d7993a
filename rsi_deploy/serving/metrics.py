"""What is counted, in Prometheus' words. Labels are names and versions that are served, never what a client made up."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rsi_deploy.serving.shadow import Shadow

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        version = ("model", "version")
        self._requests = Counter(
            "rsi_requests", "Requests answered, by HTTP status", (*version, "protocol", "status"), registry=registry
        )
        self._seconds = Histogram(
            "rsi_request_seconds", "From decoded to answered", version, buckets=_SECONDS, registry=registry
        )
        self._waited = Histogram("rsi_queue_seconds", "In the queue", version, buckets=_SECONDS, registry=registry)
        self._rows = Histogram("rsi_batch_rows", "Rows of a batch", version, buckets=_ROWS, registry=registry)
        self._joined = Counter("rsi_batched_requests", "Requests in those batches", version, registry=registry)
        self._ran = Counter("rsi_batch_seconds", "Time of those batches", version, registry=registry)
        self._reloads = Counter("rsi_reloads", "Replaced bundles, by outcome", ("outcome",), registry=registry)
        self._waiting = Gauge("rsi_waiting_requests", "Requests that wait for a worker", registry=registry)
        self._workers = Gauge("rsi_workers", "Workers that take requests", registry=registry)
        self._restarts = Gauge("rsi_worker_restarts", "Workers that died and were started again", registry=registry)
        self._lost_lines = Gauge("rsi_lost_log_lines", "Access log lines that nobody read", registry=registry)
        self._shadow = {
            "samples": Gauge("rsi_shadow_samples", "Samples compared", ("model",), registry=registry),
            "skipped": Gauge("rsi_shadow_skipped", "Requests not compared", ("model",), registry=registry),
            "agreement": Gauge("rsi_shadow_agreement_percent", "Equal top-1 answers", ("model",), registry=registry),
        }
        self._shadow_ms = Gauge("rsi_shadow_mean_ms", "Mean run time", ("model", "which"), registry=registry)

    def note_request(
        self, model: str, version: str, protocol: str, status: int, *, seconds: float, waited: float | None
    ) -> None:
        """One request; `waited` is None where it never came to a worker."""
        self._requests.labels(model, version, protocol, str(status)).inc()
        if waited is not None:
            self._seconds.labels(model, version).observe(seconds)
            self._waited.labels(model, version).observe(waited)

    def note_batch(self, model: str, version: str, *, rows: int, requests: int, seconds: float) -> None:
        """One batch."""
        self._rows.labels(model, version).observe(rows)
        self._joined.labels(model, version).inc(requests)
        self._ran.labels(model, version).inc(seconds)

    def note_reload(self, outcome: str) -> None:
        """One bundle that changed on disk: "done" or "refused"."""
        self._reloads.labels(outcome).inc()

    def note_state(self, waiting: int, workers: int, restarts: int) -> None:
        """What is so at this moment."""
        self._waiting.set(waiting)
        self._workers.set(workers)
        self._restarts.set(restarts)

    def note_lost_lines(self, count: int) -> None:
        """Access log lines that were dropped so far."""
        self._lost_lines.set(count)

    def note_shadow(self, model: str, shadow: Shadow) -> None:
        """The comparison of a shadow as it stands."""
        told = shadow.told()
        for name, gauge in self._shadow.items():
            if told[name] is not None:
                gauge.labels(model).set(told[name])
        for which, times in told["latency"].items():
            self._shadow_ms.labels(model, which).set(times["mean_ms"])

    def text(self) -> bytes:
        """All of it in the text format."""
        return bytes(generate_latest(self._registry))
