"""The separate measurements of `bench`, one pydantic model each.

A field whose name ends in `_interval` or `_interval_ms` is a 95 % bootstrap interval over repetitions.
"""

from typing import Literal, Self

from pydantic import BaseModel, model_validator

from rsi_deploy.core.types import Interval

Phase = Literal["import", "load", "run", "done"]


class LatencySection(BaseModel, frozen=True, extra="forbid"):
    """One model in one measurement; `label` is that of the model."""

    label: str


class ColdStart(LatencySection):
    """The times from the start of a process to the first output: medians over processes, with models interleaved.

    The file is in the page cache. The sum of the four phases is computed for each process.

    Attributes:
        repeats: number of processes.
        process_ms: time to start Python.
        import_ms: time to import numpy and onnxruntime.
        load_ms: time to create the session.
        first_ms: time of the first inference.
        total_ms: median of the sums.
        total_interval_ms: its interval.
        verdict: comparison of the total with that of the first model, in words.
    """

    repeats: int
    process_ms: float
    import_ms: float
    load_ms: float
    first_ms: float
    total_ms: float
    total_interval_ms: Interval
    verdict: str


class Memory(LatencySection):
    """The resident memory of a separate process, in bytes.

    Attributes:
        import_bytes: memory after importing onnxruntime, the same for every model.
        loaded_bytes: memory after creating the session.
        peak_bytes: peak memory until the end of the runs, or until the process was killed.
        limit_bytes: memory limit, or None.
        fits: whether the process stayed below the limit; None without a limit.
        stopped_in: phase in which it exceeded the limit or failed; `done` otherwise.
        median_ms: median time of a few calls below the limit; None if there were none.
        detail: description of the failure; "" without one.
    """

    import_bytes: int | None
    loaded_bytes: int | None
    peak_bytes: int
    limit_bytes: int | None
    fits: bool | None
    stopped_in: Phase
    median_ms: float | None
    detail: str


class Generation(LatencySection):
    """The speed of a model that generates text; the ratios to the first model are in the cells of these phases.

    Attributes:
        prompt_tokens: tokens of the prompt.
        generated_tokens: tokens of one generation, the first one among them.
        first_token_ms: time of the prompt and the first token.
        first_token_interval_ms: its interval.
        prefill_per_second: tokens of the prompt a second, within that time.
        prefill_per_second_interval: its interval.
        decode_per_second: tokens a second after the first.
        decode_per_second_interval: its interval.
    """

    prompt_tokens: int
    generated_tokens: int
    first_token_ms: float
    first_token_interval_ms: Interval
    prefill_per_second: float
    prefill_per_second_interval: Interval
    decode_per_second: float
    decode_per_second_interval: Interval


class Bursts(LatencySection):
    """The times of calls in bursts after an idle gap, when caches are cold and workers asleep.

    Attributes:
        gap_ms: idle time before each burst.
        calls: number of calls in a burst.
        bursts: number of bursts.
        first_ms: median time of the first call of a burst.
        first_interval_ms: its interval.
        rest_ms: median time of the other calls.
        rest_interval_ms: its interval.
        speedup: `first_ms` of the first model over this one; None for the first model.
        speedup_interval: its 99 % interval over paired bursts.
        verdict: comparison in words.
    """

    gap_ms: float
    calls: int
    bursts: int
    first_ms: float
    first_interval_ms: Interval
    rest_ms: float
    rest_interval_ms: Interval
    speedup: float | None
    speedup_interval: Interval | None
    verdict: str


class SessionStreams(LatencySection):
    """The throughput and latency of threads that share one session and call it continuously.

    Attributes:
        streams: number of threads.
        batch: samples per call.
        windows: number of time windows; models and numbers of streams are interleaved.
        per_second: samples per second of all streams, median over windows.
        per_second_interval: its interval.
        median_ms: median latency of a call.
        percentiles_ms: percentiles of the latency with enough calls, "p50" etc.
    """

    streams: int
    batch: int
    windows: int
    per_second: float
    per_second_interval: Interval
    median_ms: float
    percentiles_ms: dict[str, float]


class Throughput(LatencySection):
    """The throughput of consecutive calls with growing batches.

    Attributes:
        batches: measured batch sizes, ascending.
        per_second: samples per second at each batch, median over windows.
        per_second_intervals: their intervals.
        best: batch with the highest throughput.
        ended: reason why no larger batch was measured.
    """

    batches: tuple[int, ...]
    per_second: tuple[float, ...]
    per_second_intervals: tuple[Interval, ...]
    best: int
    ended: str

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if not len(self.batches) == len(self.per_second) == len(self.per_second_intervals):
            raise ValueError("batches, per_second and per_second_intervals must have equal lengths")
        return self


class SiteTime(BaseModel, frozen=True, extra="forbid"):
    """The time of one split site in ms per call.

    Attributes:
        site: name of the dense node.
        dense_ms: time of the dense node; None in a model where it is split.
        right_ms: time of the first node of the split. A shared one is counted at its first site.
        left_ms: time of the second node of the split.
    """

    site: str
    dense_ms: float | None
    right_ms: float | None
    left_ms: float | None

    @property
    def total_ms(self) -> float:
        """The time of all nodes of the site."""
        return sum(part for part in (self.dense_ms, self.right_ms, self.left_ms) if part is not None)


class Profile(LatencySection):
    """The time of a call by operator and site, from onnxruntime's profiler, which slows calls down.

    Attributes:
        calls: number of profiled calls.
        call_ms: median time of a profiled call.
        op_ms: op type after onnxruntime's fusions -> ms per call, in descending order.
        op_nodes: op type -> number of nodes.
        sites: split sites in the order of the graph, without sites whose nodes were all fused.
    """

    calls: int
    call_ms: float
    op_ms: dict[str, float]
    op_nodes: dict[str, int]
    sites: tuple[SiteTime, ...]
