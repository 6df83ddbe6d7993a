"""The step of an export that stays in float32: plan, factorize and split, measure, and undo what makes it slow."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.execution.result_store import ResultStore
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.results import Delivered
from rsi_deploy.exporting.timing.latency_options import missed_time, needs_table
from rsi_deploy.exporting.timing.model_times import ModelTimes
from rsi_deploy.exporting.timing.shared_factor_choice import stays_joint
from rsi_deploy.exporting.timing.slowdown_rollback import SlowdownRollback, splits_of
from rsi_deploy.exporting.timing.stage_clock import StageClock
from rsi_deploy.io.onnx_file import file_bytes, refuse_growth
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.decide import Planned
from rsi_deploy.report.schema import Undone


@dataclass(frozen=True, kw_only=True)
class FloatStep:
    """Compresses the dense model to a float model, and measures it.

    Attributes:
        calibrator: decides every site and fits the factors.
        times: measures models and sites.
        split: `split_model` with what all models of the export share.
        store: results of an interrupted run; None where the model is too small to store any.
        clock: times the stages.
        config: settings of the export.
        notes: notes for the report.
    """

    calibrator: Calibrator
    times: ModelTimes
    split: Callable[..., SplitModel]
    store: ResultStore | None
    clock: StageClock
    config: ExportConfig
    notes: list[str] = field(default_factory=list)

    def run(self) -> Delivered:
        """Return the compressed model.

        Raises:
            UsageError: data, a plan, filters or a cost table that do not fit the model.
            ModelError: nothing to split, a budget that no plan can meet, or a model that is larger than the user's.
            GateError: the model is broken, or misses its limit.
        """
        calibrator, request, times, dense = self.calibrator, self.calibrator.request, self.times, self.times.dense
        if (plan := request.plan) is not None and plan.has_bits:
            if not any(site.rank for site in plan.sites.values()):
                raise UsageError(
                    f"{request.plan_name} has bits of weights and no rank; add --calib, and no --precision but auto"
                )
            self.notes.append("the plan's bits of weights are left out: add --calib, and no --precision but auto")
        feeds = times.feeds
        if needs_table(request, self.config) and feeds is not None:
            with self.clock.stage("cost table"):
                calibrator.timing = times.of_sites()
        with self.clock.stage("calibrate and plan"):
            planned = calibrator.planned()
        with self.clock.stage("factorize, split, save"), times.job.executor(self.store, self.notes) as executor:
            split = self.split(dense.graph(), planned.planner, fitted=planned.fitted, executor=executor)
        if not calibrator.delivers_dense:
            _refuse_nothing(split)
        self._refuse_growth(split)
        timing, compress = calibrator.timing, self._compressed
        must_be_faster = times.is_measured and not self.config.always_split and not self.config.allow_slower
        if must_be_faster and not self._stays_joint(planned, split):
            compress = partial(compress, joint=False)
            split = compress(planned)
            _refuse_nothing(split)
        predicted = None if timing is None else timing.table.predicted(splits_of(split))
        latency, undone, verdict = None, tuple[Undone, ...](), None
        if feeds is not None and times.is_measured and not (timing is not None and timing.is_foreign):
            measure = partial(self._latency, dense.path, dense.target)
            if must_be_faster:
                rollback = SlowdownRollback(
                    compress=compress,
                    measure=measure,
                    refit=calibrator.again if request.is_fitted else None,
                    dense=dense.path,
                    feeds=feeds,
                    costing=times.costing,
                    table=None if timing is None else timing.table,
                )
                split, latency, undone, verdict = rollback.outcome(planned, split)
                self._refuse_growth(split)
                self.notes.extend(missed_time(request.budget, latency))
            else:
                latency = measure()
        return Delivered(
            split=split, predicted=predicted, latency=latency, undone=undone, verdict=verdict, notes=tuple(self.notes)
        )

    def _compressed(self, planned: Planned, **changed: Any) -> SplitModel:
        """Write the model of a plan."""
        graph, job = self.times.dense.graph, self.times.job
        with self.clock.stage("factorize, split, save"), job.executor(self.store, self.notes) as executor:
            return self.split(graph(), planned.planner, fitted=planned.fitted, executor=executor, **changed)

    def _latency(self, reference: Path, candidate: Path) -> BenchResult:
        with self.clock.stage("latency"):
            return self.times.latency((reference, candidate))

    def _stays_joint(self, planned: Planned, split: SplitModel) -> bool:
        """Return whether the model keeps its shared right factors, with a note on the measurement."""
        dense, apart = self.times.dense, partial(self._compressed, planned, joint=False, keep=())
        is_joint, notes = stays_joint(
            dense.target, dense.path.with_name("apart.onnx"), split, lambda path: apart(path=path), self._latency
        )
        self.notes.extend(notes)
        return is_joint

    def _refuse_growth(self, split: SplitModel) -> None:
        """Refuse a split model that is larger than the user's, unless the user allows it."""
        config, dense = self.config, self.times.dense
        is_allowed = config.allow_larger or config.always_split
        if not is_allowed and (config.requantize or any(site.rank for site in split.sites)):
            refuse_growth(file_bytes(dense.target), dense.size.bytes, dense.source.name)


def _refuse_nothing(split: SplitModel) -> None:
    """Refuse a model without any split."""
    if any(site.rank for site in split.sites):
        return
    names: dict[str, list[str]] = {}
    for site in split.sites:
        names.setdefault(site.reason, []).append(site.name)
    words = [f"{reason} ({', '.join(who[:3])}{', ...' * (len(who) > 3)})" for reason, who in names.items()]
    if any(reason.startswith("overridable") for reason in names):
        words.append("add --assume-constant if nobody feeds those weights")
    listed = "; ".join(words) or "the graph has no weight-bearing node"
    raise ModelError(f"nothing to split: {listed}; rsi-deploy inspect shows every site")
