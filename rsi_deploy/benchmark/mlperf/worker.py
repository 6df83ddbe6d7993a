"""Run one MLPerf LoadGen test of one model, in the process that `loadgen.run_loadgen` starts.

    python -m rsi_deploy.benchmark.mlperf.worker REQUEST.json REPLY.json

LoadGen issues queries, this program answers each with bound calls (`binding`), and LoadGen writes the results to logs
in the request's folder. A sample is one input of the model; a call answers `batch` samples.

    SingleStream, MultiStream   answered in LoadGen's issuing thread, because the next query waits for the answer
    Offline                     answered in the same thread, in batches
    Server                      put in a queue for a worker thread, because the schedule must not wait for answers

Without targets, the Server scenario has half of the rate of consecutive calls, and a latency of ten times the time of a
call and at least 10 ms. This is a light load and not a search for the highest one; the reply names the targets.
"""

import contextlib
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from rsi_deploy.core.errors import ModelError, RsiDeployError
from rsi_deploy.io.arrays import read_npz
from rsi_deploy.runtime.binding import bind
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.feeds.user_feeds import check_feeds
from rsi_deploy.runtime.feeds.values import describe_array
from rsi_deploy.runtime.placement import proven_placement
from rsi_deploy.runtime.sessions import make_session

Scenario = Literal["SingleStream", "MultiStream", "Server", "Offline"]

# Queries below which LoadGen's early stopping finds no estimate: of the 90th percentile, of the 99th, and of the
# 99th with no query over the latency (MLPerf inference rules, early stopping).
MIN_QUERIES: dict[str, int] = {"SingleStream": 64, "MultiStream": 662, "Server": 459, "Offline": 1}
SERVER_SHARE, SERVER_CALLS, SERVER_LEAST_MS = 0.5, 10.0, 10.0
AROUND_S = 1e-4  # largest overhead of Python and the queue per call
FEEDS = "feeds.npz"
STREAMS = 8  # samples of a MultiStream query


class LoadGenRequest(BaseModel, frozen=True, extra="forbid"):
    """The request of a test. Times are in seconds or ms as named; `feeds` are the names of the arrays in `FEEDS`."""

    model: str
    scenario: Scenario
    folder: str
    provider: str
    threads: int | None
    batch: int
    seconds: float
    seed: int
    input_shape: dict[str, tuple[int, ...]] | None
    feeds: tuple[str, ...] | None
    target_qps: float | None
    target_latency_ms: float | None
    allow_fallback: bool


class Reply(BaseModel, frozen=True, extra="forbid"):
    """The part of the result that is not in LoadGen's logs.

    Attributes:
        error: message of an expected error; "" without one.
        error_kind: class of the error in `rsi_deploy.core.errors`.
        call_ms: median time of a call after warm-up, before the test.
        own_p90_ms: 90th percentile of the calls in the test by this tool's clock; None if calls are not queries.
        target_qps: target of Server in queries per second; for Offline the samples per second that sized its query.
        target_latency_ms: latency target of Server.
        batch: samples per call.
        inputs: input name -> dtype and shape.
        provider: first provider of the session.
        provider_nodes: as in `Placement`.
        how: as in `Bound`.
    """

    error: str = ""
    error_kind: str = ""
    call_ms: float = 0.0
    own_p90_ms: float | None = None
    target_qps: float | None = None
    target_latency_ms: float | None = None
    batch: int = 1
    inputs: dict[str, str] = {}
    provider: str = ""
    provider_nodes: dict[str, int] = {}
    how: str = ""


def main(request_file: str, reply_file: str) -> None:
    """Run the request and write the reply, which may be an expected error."""
    request = LoadGenRequest.model_validate_json(Path(request_file).read_text(encoding="utf-8"))
    try:
        reply = run(request)
    except RsiDeployError as error:
        reply = Reply(error=str(error), error_kind=type(error).__name__)
    Path(reply_file).write_text(reply.model_dump_json(), encoding="utf-8")


def run(request: LoadGenRequest) -> Reply:
    """Load the model, warm up, and run LoadGen.

    Raises:
        UsageError, ModelError: as `make_session`, `random_feeds` and `proven_placement` do.
    """
    session = make_session(request.model, request.provider, request.threads, allow_fallback=request.allow_fallback)
    specs = model_inputs(session, request.model)
    if request.feeds is None:
        feeds = random_feeds(specs, request.batch, request.seed, request.input_shape)
    else:
        feeds = dict(zip(request.feeds, read_npz(Path(request.folder) / FEEDS).values(), strict=True))
    check_feeds(specs, feeds, request.model)
    batch = next((len(array) for array in feeds.values() if array.ndim), 1)
    ran = proven_placement(request.model, request.provider, feeds, request.threads, request.allow_fallback)
    bound = bind(session, feeds, request.provider)
    call_s = warm_up(bound.call, min(1.0, request.seconds / 4))
    qps, latency_ms = targets(request, batch, call_s)
    times = take_test(request, bound.call, batch, settings(request, batch, call_s, qps, latency_ms))
    in_order = request.scenario == "SingleStream"
    return Reply(
        call_ms=1e3 * call_s,
        own_p90_ms=float(np.percentile(times, 90)) / 1e6 if in_order and times else None,
        target_qps=qps,
        target_latency_ms=latency_ms,
        batch=batch,
        inputs={name: describe_array(array) for name, array in feeds.items()},
        provider=session.get_providers()[0],
        provider_nodes=ran.provider_nodes,
        how=bound.how,
    )


def warm_up(call: Callable[[], object], seconds: float) -> float:
    """Call at least 5 times and for `seconds`; return the median time of the last half of the calls in seconds."""
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 5 or time.monotonic() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times[len(times) // 2 :]))


def targets(request: LoadGenRequest, batch: int, call_s: float) -> tuple[float | None, float | None]:
    """Return the targets of the scenario: queries per second and latency in ms, or None."""
    if request.scenario == "Offline":
        return request.target_qps or batch / call_s, None
    if request.scenario != "Server":
        return None, None
    default_ms = max(SERVER_LEAST_MS, SERVER_CALLS * 1e3 * call_s)
    return request.target_qps or SERVER_SHARE / (call_s + AROUND_S), request.target_latency_ms or default_ms


def settings(request: LoadGenRequest, batch: int, call_s: float, qps: float | None, latency_ms: float | None) -> Any:
    """Return LoadGen's `TestSettings`: run until duration and queries suffice, for at most four times `seconds`."""
    import mlperf_loadgen

    made = mlperf_loadgen.TestSettings()
    made.scenario = getattr(mlperf_loadgen.TestScenario, request.scenario)
    made.mode = mlperf_loadgen.TestMode.PerformanceOnly
    made.min_duration_ms = math.ceil(1e3 * request.seconds)
    made.max_duration_ms = math.ceil(4e3 * request.seconds)
    made.min_query_count = MIN_QUERIES[request.scenario]
    made.multi_stream_samples_per_query = STREAMS
    # LoadGen creates its queries beforehand from the expected latency. Half of a call's time gives enough of them.
    made.single_stream_expected_latency_ns = math.ceil(0.5e9 * call_s)
    made.multi_stream_expected_latency_ns = math.ceil(0.5e9 * call_s * STREAMS / batch)
    made.sample_index_rng_seed = made.schedule_rng_seed = made.qsl_rng_seed = request.seed
    if qps is not None:
        made.server_target_qps = made.offline_expected_qps = qps
    if latency_ms is not None:
        made.server_target_latency_ns = math.ceil(1e6 * latency_ms)
    return made


def take_test(request: LoadGenRequest, call: Callable[[], object], batch: int, test_settings: Any) -> list[int]:
    """Run LoadGen with logs in the request's folder, and return the time of each call in ns."""
    import mlperf_loadgen

    times: list[int] = []
    failures: list[Exception] = []

    def answer(samples: Sequence[Any]) -> None:
        """Complete every query even after a failure, because LoadGen would wait for it forever."""
        for start in range(0, len(samples), batch):
            with contextlib.suppress(Exception) if failures else _noting(failures):
                before = time.perf_counter_ns()
                call()
                times.append(time.perf_counter_ns() - before)
            done = [mlperf_loadgen.QuerySampleResponse(sample.id, 0, 0) for sample in samples[start : start + batch]]
            mlperf_loadgen.QuerySamplesComplete(done)

    waiting: queue.SimpleQueue[Sequence[Any] | None] = queue.SimpleQueue()

    def work() -> None:
        while (samples := waiting.get()) is not None:
            answer(samples)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    issue = waiting.put if request.scenario == "Server" else answer
    sut = mlperf_loadgen.ConstructSUT(issue, lambda: None)
    library = mlperf_loadgen.ConstructQSL(1, 1, lambda _: None, lambda _: None)
    logs = mlperf_loadgen.LogSettings()
    output = mlperf_loadgen.LogOutputSettings()
    output.outdir = request.folder
    output.copy_summary_to_stdout = False
    logs.log_output = output
    logs.enable_trace = False
    try:
        mlperf_loadgen.StartTestWithLogSettings(sut, library, test_settings, logs)
    finally:
        waiting.put(None)
        worker.join()
        mlperf_loadgen.DestroyQSL(library)
        mlperf_loadgen.DestroySUT(sut)
    if failures:
        raise ModelError(
            f"{request.model}: a call failed during the test: {str(failures[0]).strip()}"
            f"; check that bench without --loadgen runs it"
        ) from failures[0]
    return times


@contextlib.contextmanager
def _noting(failures: list[Exception]) -> Any:
    try:
        yield
    except Exception as error:  # raising through LoadGen's threads would end the process without a message
        failures.append(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
