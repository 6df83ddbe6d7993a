"""The part that time has in an export: what is refused beforehand, and what the report says of it afterwards."""

from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.core.errors import UsageError
from rsi_deploy.costing.cost_cache import conditions_here
from rsi_deploy.exporting.profile import Costing
from rsi_deploy.exporting.slowdown_rollback import LastWord
from rsi_deploy.exporting.timed_export import TimedExport
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.report.schema import TimingRecord


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Which part time has in an export, refused before any work where that contradicts itself.

    Attributes:
        request: what decides the ranks.
        cost: a table's file.
        foreign: take one of another machine.
        smaller_is_enough: no split must be faster.
        measure: whether times are measured here.

    Raises:
        UsageError: says what to type.
    """

    request: RankRequest
    cost: str | Path | None
    foreign: bool
    smaller_is_enough: bool
    measure: bool

    def __post_init__(self) -> None:
        if self.foreign and self.cost is None:
            raise UsageError(
                "--allow-cost-mismatch says that --cost FILE is of another machine: add --cost, or leave it out"
            )
        if self.cost is not None and not self.request.is_searched:
            raise UsageError("--cost is planned with: give a budget, such as --keep-latency 60%, and --calib DATA")
        if self.is_in_time and not self.measure and not self.foreign:
            raise UsageError("--keep-latency and --max-latency are measured: leave out --no-bench")

    @property
    def is_in_time(self) -> bool:
        """Whether the budget is a time."""
        return self.request.budget is not None and self.request.budget.cost == "nanoseconds"

    @property
    def needs_table(self) -> bool:
        """Whether a table decides anything."""
        ruled = self.request.is_searched and self.measure and not self.smaller_is_enough
        return self.cost is not None or self.is_in_time or ruled


def timing_record(
    timing: TimedExport | None, word: LastWord | None, costing: Costing, predicted: float | None
) -> TimingRecord | None:
    """What the report says of time; None where it decided nothing."""
    if timing is None and word is None:
        return None
    table = None if timing is None else timing.table
    return TimingRecord(
        source="the finished model alone" if timing is None else timing.source,
        conditions=conditions_here(costing.provider, costing.threads) if table is None else table.conditions,
        rule="faster" if timing is None or timing.must_be_faster else "none",
        table_seconds=0.0 if timing is None else timing.seconds,
        dense_ns=0 if table is None else table.model.dense_nanoseconds,
        scale=1.0 if table is None else table.model.scale,
        predicted=predicted,
        checks=() if timing is None else tuple(timing.checks),
        undone=() if word is None else tuple(word.undone),
        last_word="not spoken: nothing was measured here" if word is None else word.words,
    )


def missed_time(budget: Budget | None, latency: BenchResult) -> list[str]:
    """That the finished model was shown to take longer than its budget of time, where it was.

    Args:
        budget: what was asked for.
        latency: of the dense and the finished model, side by side.
    """
    dense, finished = latency.arms
    if budget is None or budget.cost != "nanoseconds" or finished.speedup_interval is None:
        return []
    allowed = budget.total(round(1e6 * dense.median_ms)) / (1e6 * dense.median_ms)
    if 1 / finished.speedup_interval[1] <= allowed:
        return []
    return [
        f"{budget} is MISSED: the finished model takes {finished.median_ms:.4g} ms of the dense one's "
        f"{dense.median_ms:.4g} ms, where {100 * allowed:.1f} % were allowed, though its plan was measured to keep "
        f"that: the machine is not what it was; export again, or aim lower"
    ]


def timing_notes(timing: TimedExport | None, word: LastWord | None) -> list[str]:
    """What a reader must know of time, in words."""
    notes = []
    if timing is not None and timing.is_foreign:
        where = timing.table.conditions
        notes.append(
            f"planned for {where.cpu}, {where.cores} cores, {where.provider} ({timing.source}), and measured nowhere: "
            f"run rsi-deploy bench there"
        )
    if timing is not None:
        notes += [*timing.table.notes, *timing.remarks]
    if word is not None and word.undone:
        notes.append(word.words)
    return notes
