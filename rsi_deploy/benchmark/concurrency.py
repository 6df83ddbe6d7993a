"""Load other than one call after the other: bursts after idle gaps, streams that share a session, growing batches.

    bursts      idle for a gap, then a few calls; first calls apart from the rest
    streams     N threads on one session, each with inputs and outputs of its own; samples a second in windows
    throughput  batches 1, 2, 4... until two doublings together gain less than 5 %

All arms take turns in shuffled rounds, as in the main loop; intervals come from resampling rounds.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from rsi_deploy.benchmark.sections import Bursts, SessionStreams, Throughput
from rsi_deploy.benchmark.statistics import compare, median_interval, supported_percentiles, verdict
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.benchmark.variants import Arm, Runtime, open_arms
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Feeds, Floats

T = TypeVar("T")

BURST_CALLS = 8
MIN_ROUNDS = 8
WINDOW_SECONDS = 0.25
GAIN = 1.05  # in samples a second, that makes the next larger batch worth a try
MAX_BATCH = 1024
FIRST = "the arm that the others are compared with"


def measure_bursts(
    models: Sequence[Path],
    labels: Sequence[str],
    feeds: Feeds,
    runtime: Runtime,
    *,
    gap: float,
    seconds: float,
    seed: int,
) -> tuple[Bursts, ...]:
    """Calls that come in bursts of 8 after `gap` seconds of idleness, for about `seconds`, at least 8 bursts an arm."""
    arms = open_arms(models, labels, [runtime.session(m) for m in models], feeds, runtime, prove=False)
    for arm in arms:
        arm.warm_up(1.0)

    def burst(arm: Arm) -> Floats:
        time.sleep(gap)
        return time_calls(arm.call, BURST_CALLS) / 1e6

    times: Floats = np.asarray(rounds([partial(burst, arm) for arm in arms], seconds, seed))  # (B, arms, calls)
    first, rest = times[:, :, 0].T, np.median(times[:, :, 1:], axis=2).T
    results = []
    for index, arm in enumerate(arms):
        first_ms, first_ends = median_interval(first[index], seed)
        rest_ms, rest_ends = median_interval(rest[index], seed)
        speedup, ends = compare(first[0], first[index], seed) if index else (None, None)
        results.append(
            Bursts(
                label=arm.label,
                gap_ms=1e3 * gap,
                calls=BURST_CALLS,
                bursts=len(times),
                first_ms=first_ms,
                first_interval_ms=first_ends,
                rest_ms=rest_ms,
                rest_interval_ms=rest_ends,
                speedup=speedup,
                speedup_interval=ends,
                verdict=FIRST if speedup is None or ends is None else verdict(speedup, ends, len(times)),
            )
        )
    return tuple(results)


def measure_streams(
    models: Sequence[Path],
    labels: Sequence[str],
    feeds: Feeds,
    runtime: Runtime,
    *,
    counts: Sequence[int],
    batch: int,
    seconds: float,
    seed: int,
) -> tuple[SessionStreams, ...]:
    """Samples a second and latency with so many threads on one session, for about `seconds` in all."""
    sessions = [runtime.session(model) for model in models]
    open_arms(models, labels, sessions, feeds, runtime, prove=False)  # refuses what cannot be compared
    calls = [[runtime.bound(session, feeds).call for _ in range(max(counts))] for session in sessions]
    jobs = [(arm, count) for arm in range(len(models)) for count in counts]
    window = min(WINDOW_SECONDS, seconds / (len(jobs) * MIN_ROUNDS))
    for bound in calls:
        together(bound, window)  # warm-up, every thread's tensors too
    measured = rounds([partial(together, calls[a][:n], window) for a, n in jobs], seconds, seed)
    results = []
    for index, (arm, count) in enumerate(jobs):
        windows = [entry[index] for entry in measured]
        per_second, ends = median_interval(np.asarray([batch * rate for rate, _ in windows]), seed)
        times = np.concatenate([latencies for _, latencies in windows])
        results.append(
            SessionStreams(
                label=labels[arm],
                streams=count,
                batch=batch,
                windows=len(windows),
                per_second=per_second,
                per_second_interval=ends,
                median_ms=float(np.median(times)),
                percentiles_ms=supported_percentiles(times),
            )
        )
    return tuple(results)


def measure_throughput(
    models: Sequence[Path],
    labels: Sequence[str],
    runtime: Runtime,
    *,
    feeds_of: Callable[[int], Feeds],
    start: int,
    seconds: float,
    seed: int,
) -> tuple[Throughput, ...]:
    """Samples a second at batches `start`, twice that...; an arm leaves when two doublings gain less than 5 %.

    Args:
        models: files.
        labels: one a model.
        runtime: where they run.
        feeds_of: batch -> input name -> array; it raises `UsageError` for a batch that cannot be.
        start: the first batch.
        seconds: for all of it, about: a tenth for each batch.
        seed: of the order of arms.
    """
    sessions = [runtime.session(model) for model in models]
    found: dict[int, list[tuple[int, float, tuple[float, float]]]] = {index: [] for index in range(len(models))}
    ended = dict.fromkeys(found, f"{MAX_BATCH} is the largest that is tried")
    trying, batch = list(found), start
    while trying and batch <= MAX_BATCH:
        try:
            feeds = feeds_of(batch)
            calls = [runtime.bound(sessions[index], feeds).call for index in trying]
        except (UsageError, ModelError) as error:
            if batch > start:
                ended |= dict.fromkeys(trying, f"batch {batch} cannot run: {str(error).splitlines()[0]}")
                break
            raise
        window = min(WINDOW_SECONDS, seconds / (10 * MIN_ROUNDS * len(trying)))
        measured = rounds([partial(together, [c], window) for c in calls], seconds / 10, seed + batch)
        for place, index in enumerate(list(trying)):
            rate, ends = median_interval(np.asarray([batch * entry[place][0] for entry in measured]), seed)
            best = max((row[1] for row in found[index][:-1]), default=0.0)
            found[index].append((batch, rate, ends))
            if best and max(rate, found[index][-2][1]) < GAIN * best:  # twice: one may be noise
                trying.remove(index)
                ended[index] = f"neither batch {batch // 2} nor {batch} gains {100 * (GAIN - 1):.0f} %"
        batch *= 2
    return tuple(_throughput(labels[index], rows, ended[index]) for index, rows in found.items())


def together(calls: Sequence[Callable[[], object]], window: float) -> tuple[float, Floats]:
    """Each call in a thread of its own, over and over until the window is over: calls a second, and their ms.

    The window ends for everybody when its time is over; calls still running then count with the time they took.
    """
    times: list[list[int]] = [[] for _ in calls]
    failures: list[BaseException] = []
    gate = threading.Barrier(len(calls) + 1)

    def stream(call: Callable[[], object], kept: list[int]) -> None:
        clock = time.perf_counter_ns
        gate.wait()
        end = clock() + int(window * 1e9)
        try:
            before = clock()
            while not kept or before < end:
                call()
                after = clock()
                kept.append(after - before)
                before = after
        except Exception as error:  # onnxruntime's; a thread's own would be lost
            failures.append(error)

    threads = [threading.Thread(target=stream, args=pair, daemon=True) for pair in zip(calls, times, strict=True)]
    for thread in threads:
        thread.start()
    gate.wait()
    for thread in threads:
        thread.join()
    if failures:
        raise ModelError(f"a concurrent run failed: {str(failures[0]).strip()}; give fewer --streams") from failures[0]
    rate = sum(len(kept) / (sum(kept) / 1e9) for kept in times)
    return rate, np.concatenate([np.asarray(kept, np.float64) for kept in times]) / 1e6


def rounds(jobs: Sequence[Callable[[], T]], seconds: float, seed: int) -> list[list[T]]:
    """Every job once a round in shuffled order, at least 8 rounds, until the time is over: `[round][job]`."""
    rng = np.random.default_rng([seed, *b"rounds"])
    end = time.monotonic() + seconds
    done: list[list[T]] = []
    while len(done) < MIN_ROUNDS or time.monotonic() < end:
        results: Mapping[int, T] = {int(index): jobs[index]() for index in rng.permutation(len(jobs))}
        done.append([results[index] for index in range(len(jobs))])
    return done


def _throughput(label: str, rows: Sequence[tuple[int, float, tuple[float, float]]], ended: str) -> Throughput:
    batches, rates, ends = zip(*rows, strict=True)
    return Throughput(
        label=label,
        batches=batches,
        per_second=rates,
        per_second_intervals=ends,
        best=batches[int(np.argmax(rates))],
        ended=ended,
    )
