"""Measure other loads than consecutive calls: bursts after idle gaps, streams that share a session, growing batches.

    bursts      an idle gap, then a few calls; first calls are reported separately
    streams     N threads on one session, each with its own inputs and outputs; samples per second in time windows
    throughput  batches 1, 2, 4... until two doublings together gain less than 5 %

All models take turns in shuffled rounds, as in the main loop. Intervals come from resampling rounds.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from rsi_deploy.benchmark.sections import Bursts, SessionStreams, Throughput
from rsi_deploy.benchmark.statistics import FIRST, Floats, compare, median_interval, supported_percentiles, verdict
from rsi_deploy.benchmark.timing import time_calls
from rsi_deploy.benchmark.variants import Feeds, Runtime, Variant, open_variants
from rsi_deploy.core.errors import ModelError, UsageError

T = TypeVar("T")

BURST_CALLS = 8
MIN_ROUNDS = 8
WINDOW_SECONDS = 0.25
GAIN = 1.05  # gain in samples per second that makes a larger batch worth measuring
MAX_BATCH = 1024


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
    """Measure bursts of 8 calls after `gap` idle seconds, for about `seconds` and at least 8 bursts per model."""
    variants = open_variants(models, labels, [runtime.session(m) for m in models], feeds, runtime, prove=False)
    for variant in variants:
        variant.warm_up(1.0)

    def burst(variant: Variant) -> Floats:
        time.sleep(gap)
        return time_calls(variant.call, BURST_CALLS) / 1e6

    times: Floats = np.asarray(
        rounds([partial(burst, variant) for variant in variants], seconds, seed)
    )  # (B, variants, calls)
    first, rest = times[:, :, 0].T, np.median(times[:, :, 1:], axis=2).T
    results = []
    for index, variant in enumerate(variants):
        first_ms, first_ends = median_interval(first[index], seed)
        rest_ms, rest_ends = median_interval(rest[index], seed)
        speedup, ends = compare(first[0], first[index], seed) if index else (None, None)
        results.append(
            Bursts(
                label=variant.label,
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
    """Measure throughput and latency with `counts` threads on one session, for about `seconds` in total."""
    sessions = [runtime.session(model) for model in models]
    open_variants(models, labels, sessions, feeds, runtime, prove=False)  # raises if they cannot be compared
    calls = [[runtime.bound(session, feeds).call for _ in range(max(counts))] for session in sessions]
    jobs = [(variant, count) for variant in range(len(models)) for count in counts]
    window = min(WINDOW_SECONDS, seconds / (len(jobs) * MIN_ROUNDS))
    for bound in calls:
        together(bound, window)  # warm-up, every thread's tensors too
    measured = rounds([partial(together, calls[a][:n], window) for a, n in jobs], seconds, seed)
    results = []
    for index, (variant, count) in enumerate(jobs):
        windows = [entry[index] for entry in measured]
        per_second, ends = median_interval(np.asarray([batch * rate for rate, _ in windows]), seed)
        times = np.concatenate([latencies for _, latencies in windows])
        results.append(
            SessionStreams(
                label=labels[variant],
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
    """Measure the throughput at growing batches. A model stops when two doublings gain less than 5 %.

    Args:
        models: files of the models.
        labels: one label per model.
        runtime: provider and threads.
        feeds_of: function from a batch to input name -> array; it raises `UsageError` for an impossible batch.
        start: first batch.
        seconds: approximate total time; each batch gets a tenth.
        seed: random seed for the order of models.
    """
    sessions = [runtime.session(model) for model in models]
    found: dict[int, list[tuple[int, float, tuple[float, float]]]] = {index: [] for index in range(len(models))}
    ended = dict.fromkeys(found, f"{MAX_BATCH} is the largest batch to measure")
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
            if best and max(rate, found[index][-2][1]) < GAIN * best:  # two doublings, as one may be noise
                trying.remove(index)
                ended[index] = f"neither batch {batch // 2} nor {batch} gains {100 * (GAIN - 1):.0f} %"
        batch *= 2
    return tuple(_throughput(labels[index], rows, ended[index]) for index, rows in found.items())


def together(calls: Sequence[Callable[[], object]], window: float) -> tuple[float, Floats]:
    """Repeat each call in its own thread for `window` seconds; return calls per second and the time of each call in ms.

    Calls that still run at the end of the window count with their full time.
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
        except Exception as error:  # an exception in a thread would be lost
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
    """Run every job once per round in shuffled order, for `seconds` and at least 8 rounds; return `[round][job]`."""
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
