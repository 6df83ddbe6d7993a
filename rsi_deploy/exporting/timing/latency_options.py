"""The part that time has in an export: requests that contradict themselves, and the report's record of it."""

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.exporting.results import Delivered
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.exporting.timing.timed_export import TimedExport
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.report.schema import TimingRecord


def check_time_settings(request: RankRequest, config: ExportConfig) -> None:
    """Refuse settings of time that contradict each other.

    Raises:
        UsageError: says what to type.
    """
    if config.allow_cost_mismatch and config.cost is None:
        raise UsageError(
            "--allow-cost-mismatch says that --cost FILE is of another machine: add --cost, or leave it out"
        )
    if config.cost is not None and not request.is_searched:
        raise UsageError("--cost is planned with: give a budget, such as --keep-latency 60%, and --calib DATA")
    if request.is_in_time and not config.measure and not config.allow_cost_mismatch:
        raise UsageError("--keep-latency, --max-latency and --fastest are measured: leave out --no-bench")


def needs_table(request: RankRequest, config: ExportConfig) -> bool:
    """Return whether a cost table decides anything."""
    is_ruled = request.is_searched and config.measure and not config.allow_slower
    return config.cost is not None or request.is_in_time or is_ruled


def timing_record(timing: TimedExport | None, delivered: Delivered, costing: Costing) -> TimingRecord | None:
    """Return the report's record of time; None where time decided nothing."""
    if timing is None and delivered.verdict is None:
        return None
    table = None if timing is None else timing.table
    return TimingRecord(
        source="the finished model alone" if timing is None else timing.source,
        conditions=costing.conditions if table is None else table.conditions,
        rule="faster" if timing is None or timing.must_be_faster else "none",
        table_seconds=0.0 if timing is None else timing.seconds,
        dense_ns=0 if table is None else table.model.dense_nanoseconds,
        scale=1.0 if table is None else table.model.scale,
        predicted=delivered.predicted,
        checks=() if timing is None else tuple(timing.checks),
        undone=delivered.undone,
        last_word=delivered.verdict or "not spoken: nothing was measured here",
    )


def missed_time(budget: Budget | None, latency: BenchResult) -> list[str]:
    """Return a note where the finished model is shown to exceed its budget of time; else no note.

    Args:
        budget: budget of the export.
        latency: measurement of the dense and the finished model, side by side.
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


def timing_notes(timing: TimedExport | None, delivered: Delivered) -> list[str]:
    """Return the report's notes on time."""
    notes = []
    if timing is not None and timing.is_foreign:
        where = timing.table.conditions
        notes.append(
            f"planned for {where.cpu}, {where.cores} cores, {where.provider} ({timing.source}), and measured nowhere: "
            f"run rsi-deploy bench there"
        )
    if timing is not None:
        notes += [*timing.table.notes, *timing.remarks]
    if delivered.undone and delivered.verdict is not None:
        notes.append(delivered.verdict)
    return notes
