"""What `bench` measures besides the latency of a call, each by a flag: one pydantic model a measurement.

Where a field ends in `_interval` or `_interval_ms` it is the 95 % bootstrap interval over repetitions.
"""

from typing import Literal, Self

from pydantic import BaseModel, model_validator

from rsi_deploy.core.types import Interval

Phase = Literal["import", "load", "run", "done"]


class LatencySection(BaseModel, frozen=True, extra="forbid"):
    """One arm in one measurement; `label` is the arm's."""

    label: str


class ColdStart(LatencySection):
    """From starting a process to the first answer; medians over `repeats` processes, arms interleaved.

    The file is in the page cache. `total_ms` is the sum of the four phases, each measured in the same processes.

    Attributes:
        repeats: processes.
        process_ms: starting Python.
        import_ms: importing numpy and onnxruntime.
        load_ms: making the session.
        first_ms: the first inference.
        total_ms: median of the sums.
        total_interval_ms: its interval.
        verdict: the total against the first arm's, in words.
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
    """Resident memory of a process of its own, bytes.

    Attributes:
        import_bytes: after importing onnxruntime: what every arm pays.
        loaded_bytes: after making the session.
        peak_bytes: the most until then and during the runs; the largest seen where the process was ended.
        limit_bytes: the ceiling, if there was one.
        fits: whether it stayed below; None without a ceiling.
        stopped_in: where it passed the ceiling or failed; `done` otherwise.
        median_ms: of a few calls under the ceiling; None where it did not come to that.
        detail: the failure in words; "" without one.
    """

    import_bytes: int | None
    loaded_bytes: int | None
    peak_bytes: int
    limit_bytes: int | None
    fits: bool | None
    stopped_in: Phase
    median_ms: float | None
    detail: str


class Bursts(LatencySection):
    """Calls that come in bursts after an idle gap: caches are cold and workers asleep when the first one comes.

    Attributes:
        gap_ms: idle time before each burst.
        calls: in a burst.
        bursts: measured.
        first_ms: median of a burst's first call.
        first_interval_ms: its interval.
        rest_ms: median of its other calls.
        rest_interval_ms: its interval.
        speedup: the first arm's `first_ms` over this one's; None for the first arm.
        speedup_interval: its 99 % interval over paired bursts.
        verdict: in words.
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
    """Threads that share one session, each calling it as fast as it answers.

    Attributes:
        streams: threads.
        batch: samples a call.
        windows: measured, the arms' and the numbers of streams interleaved.
        per_second: samples a second, all streams together; median over windows.
        per_second_interval: its interval.
        median_ms: latency of a call.
        percentiles_ms: "p50" ... as far as the calls support them.
    """

    streams: int
    batch: int
    windows: int
    per_second: float
    per_second_interval: Interval
    median_ms: float
    percentiles_ms: dict[str, float]


class Throughput(LatencySection):
    """Samples a second at growing batches, one call after the other; `best` is the batch where most come through.

    Attributes:
        batches: measured, ascending.
        per_second: at each of them; median over windows.
        per_second_intervals: their intervals.
        best: the batch with most.
        ended: why no larger batch was tried.
    """

    batches: tuple[int, ...]
    per_second: tuple[float, ...]
    per_second_intervals: tuple[Interval, ...]
    best: int
    ended: str

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if not len(self.batches) == len(self.per_second) == len(self.per_second_intervals):
            raise ValueError("batches, per_second and per_second_intervals must be as many")
        return self


class SiteTime(BaseModel, frozen=True, extra="forbid"):
    """Time of one split site, ms a call: the nodes that hold its factors, or in a dense arm its one node.

    Attributes:
        site: name of the dense node.
        dense_ms: of the dense node; None in an arm where it is split.
        right_ms: of the first node of the split; joint splits share theirs, it is counted at the first site.
        left_ms: of the second one.
    """

    site: str
    dense_ms: float | None
    right_ms: float | None
    left_ms: float | None

    @property
    def total_ms(self) -> float:
        """Of all its nodes."""
        return sum(part for part in (self.dense_ms, self.right_ms, self.left_ms) if part is not None)


class Profile(LatencySection):
    """Where the time of a call goes, from onnxruntime's profiler; the profiler itself makes calls slower.

    Attributes:
        calls: profiled.
        call_ms: median of a profiled call.
        op_ms: op type after onnxruntime's fusions -> ms a call, most first.
        op_nodes: op type -> nodes.
        sites: split sites in the order of the graph; a site whose nodes were all fused away is left out.
    """

    calls: int
    call_ms: float
    op_ms: dict[str, float]
    op_nodes: dict[str, int]
    sites: tuple[SiteTime, ...]
