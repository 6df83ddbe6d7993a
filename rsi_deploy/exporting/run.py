"""The run of one export: each step takes the records of the steps before it, and returns its own.

dense model --> cost table --> calibrate and plan --> factorize and split --> measure --> verify --> report and files
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rsi_deploy import __version__
from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.core.errors import ModelError, RsiDeployError, UsageError
from rsi_deploy.core.progress import step
from rsi_deploy.core.settings.recipe import recipe_text
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.core.types import Array
from rsi_deploy.costing.cost_table import read_cost_table
from rsi_deploy.data.sources import Dataset
from rsi_deploy.execution import result_store
from rsi_deploy.execution.executor import LocalExecutor
from rsi_deploy.execution.result_store import ResultStore, key_of
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.calibrated.data_checks import fitting_measure
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.check_step import verified
from rsi_deploy.exporting.dense_step import dense_model
from rsi_deploy.exporting.disk_space import check_space, states_space
from rsi_deploy.exporting.inputs import Origin
from rsi_deploy.exporting.lowered.maker import PointMaker
from rsi_deploy.exporting.lowered.step import PrecisionStep
from rsi_deploy.exporting.results import Delivered, DenseModel, dense_file
from rsi_deploy.exporting.stage_clock import StageClock
from rsi_deploy.exporting.step_settings import StepSettings
from rsi_deploy.exporting.timing.latency_options import Timed, missed_time
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.exporting.timing.shared_factor_choice import stays_joint
from rsi_deploy.exporting.timing.slowdown_rollback import SlowdownRollback, splits_of
from rsi_deploy.exporting.timing.timed_export import TimedExport, timed_export
from rsi_deploy.exporting.writer import Exported, write_files
from rsi_deploy.io.bundle import atomic_folder, finished_results_folder
from rsi_deploy.io.manifest import file_hash, fingerprint
from rsi_deploy.io.onnx_checks.broken_models import explaining_broken_model
from rsi_deploy.io.onnx_file import file_bytes, refuse_growth
from rsi_deploy.io.onnx_reader import read_graph
from rsi_deploy.onnx_models.split import SplitModel, split_model
from rsi_deploy.planning.decide import Planned, refuse_uncounted
from rsi_deploy.planning.planner import Filters
from rsi_deploy.planning.quality import KINDS, QualityBudget
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.precision.schemes import Scheme
from rsi_deploy.precision.targets import target_named
from rsi_deploy.report.outlook import Outlook
from rsi_deploy.report.schema import Report
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name
from rsi_deploy.runtime.shape_trace import uncounted_nodes

LOWERED_SECONDS = 30.0
"""Most time for the cost table of a scheme, of which an export in low precision may need two."""


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """One export with its settings.

    Attributes:
        job: settings that its steps share.
        origin: where the model comes from.
        timed: what decides the ranks, and the part that time has in it.
        costing: how cost tables are made; the models are timed with its threads.
        filters: sites that may be split.
        dataset: labelled evaluation data; None without.
        bench_batch: samples of a timed run.
        bench_seconds: seconds for the measurement.
        max_output_error: gate on the error of the outputs: squared and relative to their variance on the check part, or
            without calibration data the relative L2 error on the probe inputs; None only reports it.
        keep_dense: keep the dense model in the bundle.
        allow_larger: deliver a compressed model that is larger than the dense one, too.
        inputs: files that the export reads, which the bundle must not replace.
        command: command line or call, for the report.
        config: settings of the export.
        recipe: the request, as recipe.toml holds it.
        kept: what earlier exports of the same model, data and settings have found; None without.
    """

    job: StepSettings
    origin: Origin
    timed: Timed
    costing: Costing
    filters: Filters
    dataset: Dataset | None
    bench_batch: int
    bench_seconds: float
    max_output_error: float | None
    keep_dense: bool
    allow_larger: bool
    inputs: tuple[object, ...]
    command: str
    config: ExportConfig
    recipe: str
    kept: SweepCache | None

    def write_bundle(self, output: Path, *, force: bool) -> Report:
        """Write the bundle `output`, whole or not at all, and return its report.

        Args:
            output: the bundle's folder.
            force: replace a bundle that is there.

        Raises:
            UsageError: `output` exists, or a request that does not fit the model or the data.
            ModelError: the model cannot be handled.
            GateError: a verification gate failed.
            OSError: the disk is full.
        """
        clock, notes = StageClock(), list[str]()
        with self._folder(output, force=force) as folder:
            dense = self._dense(folder, clock)
            self._refuse_quantized(dense)
            with _names(dense.source.name, dense.path):
                self._check_target(dense.path, dense)
            run = self._with_defaults(dense)
            request = run.timed.request
            refuse_uncounted(request.budget, dense.size, uncounted_nodes(dense.uncounted))
            if dense.outputs is not None:
                check_space(folder)
            store = run._result_store(dense)
            calibrator = run._calibrator(dense, store)
            compress = run._lowered if run.config.precision not in (None, "float32") else run._in_float
            with _names(dense.source.name, dense.path):
                # Data that do not fit are refused before the cost table is measured.
                data = None if request.calib is None else calibrator.data
                delivered = compress(dense, calibrator, clock, store, notes)
            return run._written(folder, dense, calibrator, delivered, data, store, clock)

    def outlook(self) -> Outlook:
        """Return what unseen data keep of the model; nothing is written.

        Raises:
            UsageError: a request that does not fit the model or the data.
            ModelError: the model cannot be handled.
        """
        with explaining_broken_model(self.origin.model), tempfile.TemporaryDirectory(prefix="rsi-inspect-") as name:
            dense = self._dense(Path(name), StageClock())
            with _names(dense.source.name, dense.path), step("see what unseen data keep"):
                return self._calibrator(dense, None).outlook()

    def _written(
        self,
        folder: Path,
        dense: DenseModel,
        calibrator: Calibrator,
        delivered: Delivered,
        data: CalibrationData | None,
        store: ResultStore | None,
        clock: StageClock,
    ) -> Report:
        """Compare the compressed model with the dense one, and write the files of the bundle."""
        self._check_target(dense.target, dense)
        checked = verified(
            dense,
            delivered.split,
            clock,
            provider=self.job.provider,
            max_output_error=self.max_output_error,
            preset=self.origin.preprocessing,
            data=data,
            outputs=calibrator.outputs,
        )
        if self.kept is not None:
            self.kept.outputs = calibrator.outputs
        exported = Exported(
            job=self.job,
            settings=self._settings(dense),
            dense=dense,
            calibrator=calibrator,
            delivered=delivered,
            checked=checked,
            stages=tuple(clock.stages),
            notes=(
                *calibrator.missed(checked.agreement),
                *([] if store is None else filter(None, [store.note()])),
                *self._target_notes(),
            ),
        )
        report = exported.report(self.costing, self.command, self.recipe, keep_dense=self.keep_dense)
        write_files(folder, report, dense.target)
        return report

    @contextmanager
    def _folder(self, output: Path, *, force: bool) -> Iterator[Path]:
        """A folder that becomes `output`; errors explain an invalid model and a full disk."""
        with (
            explaining_broken_model(self.origin.model),
            atomic_folder(output, force=force, inputs=(self.origin.model, *self.inputs)) as folder,
            states_space(folder),
        ):
            yield folder

    def _dense(self, folder: Path, clock: StageClock) -> DenseModel:
        """The dense model, written, compared with its source and traced."""
        with clock.stage("load"):
            source = self.origin.load()
        kept = self.kept
        size, accuracy = (kept.size(), kept.accuracy()) if kept else (None, None)
        with _names(source.name, dense_file(folder)):
            dense = dense_model(self.job, self.origin, source, folder, clock, self.dataset, size, accuracy)
        if kept is not None:
            kept.keep_accuracy(dense.accuracy)
        return dense

    def _with_defaults(self, dense: DenseModel) -> "ExportRun":
        """Return this export with the limit on quality that fits the model's outputs, where no size is set.

        The precision is `auto` where a quality or a size in bytes decides.

        Raises:
            UsageError: data that do not fit the model.
            ModelError: the model cannot be run on this machine.
        """
        request, changed = self.timed.request, dict[str, Any]()
        if request.needs_quality:
            if dense.outputs is None:
                raise ModelError(
                    "the model cannot be run on this machine, so nothing can be planned on --calib; add --rank"
                )
            measure = fitting_measure(request, dense, self.job.provider)
            quality = QualityBudget.default(measure)
            request = replace(request, quality=quality, is_default=True)
            with step(f"no size is set: {quality}, the default for {KINDS[measure]}"):
                changed[quality.setting] = quality.text(quality.limit)
        if self.config.precision is None and self._may_plan_bits(request, dense):
            changed["precision"] = "auto"
        if not changed:
            return self
        config = ExportConfig.of(self.config, **changed)
        job = replace(self.job, settings=self.job.settings.model_copy(update={"budget": request.decided_by}))
        recipe = recipe_text("export", self.origin.model, config)
        return replace(self, timed=replace(self.timed, request=request), job=job, config=config, recipe=recipe)

    def _may_plan_bits(self, request: RankRequest, dense: DenseModel) -> bool:
        """Return whether a quality or a size in bytes decides, and no other setting needs a float model."""
        of_bytes = request.budget is not None and request.budget.cost == "bytes"
        of_bytes |= request.plan is not None and request.plan.has_bits
        can_run = dense.outputs is not None and not dense.quantized
        settings_of_float = self.config.ray is not None or self.timed.cost is not None or not request.is_fitted
        return can_run and (of_bytes or request.quality is not None) and not settings_of_float

    def _refuse_quantized(self, dense: DenseModel) -> None:
        """Refuse a quantized model without any float weight, or together with a precision.

        Raises:
            UsageError: a precision for a model that has one.
            ModelError: no weight of the model is float.
        """
        count, name = len(dense.quantized), dense.source.name
        if not count:
            return
        found = f"{name} is quantized already: {count} of its products use weights of few bits"
        if self.config.precision not in (None, "float32"):
            raise UsageError(
                f"{found}, but --precision {self.config.precision} plans for float weights",
                hint="type --precision float32" if self.config.requantize else "add --requantize, or leave it out",
            )
        if not dense.sites:
            raise ModelError(f"{found}, and no float weight can be split", hint="type export --requantize")

    def _check_target(self, path: Path, dense: DenseModel) -> None:
        """Refuse a model that `--target` does not run."""
        if self.config.target is not None:
            target, model = target_named(self.config.target), read_graph(path)
            target.check_shapes(model, dense.source.name)
            target.check_model(model)

    def _target_notes(self) -> list[str]:
        if self.config.target is None:
            return []
        target, provider = self.config.target, short_name(parse_provider(self.job.provider).name)
        other = f"; outputs and times are those of {provider}" if provider != target else ""
        return [f"--target {target}: the model has no operator that this provider is known to refuse{other}"]

    def _feeds(self, dense: DenseModel) -> dict[str, Array] | None:
        """Inputs to time with; None where the model cannot be run."""
        return None if dense.outputs is None else self.job.timing_feeds(dense, self.bench_batch)

    def _settings(self, dense: DenseModel) -> ExportSettings:
        return self.job.settings.model_copy(update={"opset": dense.opset})

    def _result_store(self, dense: DenseModel) -> ResultStore | None:
        """Results of an interrupted run of this export; None where the model is too small to store any."""
        if dense.size.bytes < result_store.LARGE:
            return None
        job, calib = self.job, self.timed.request.calib
        more: list[object] = []
        if calib is not None:
            shapes = {name: array.shape for name, array in dense.feeds.items()}  # what MACs are counted on
            request = self.timed.request
            parts = [request.check_size, str(request.quality), request.calib_check is not None]
            parts += [] if self.config.precision in (None, "float32") else [self.config.precision]
            more = [fingerprint(calib), *parts, self._settings(dense).model_dump_json(), job.provider, shapes]
        key = key_of(f"{dense.weights_hash} {file_hash(dense.path)}", job.device, *more)
        return ResultStore(folder=finished_results_folder(dense.folder), key=key)

    def _timing(self, dense: DenseModel, feeds: dict[str, Array] | None, clock: StageClock) -> TimedExport | None:
        """The times to plan with; None where they decide nothing, or the model cannot be run."""
        if not self.timed.needs_table or feeds is None:
            return None
        with clock.stage("cost table"):
            return self._timed_export(dense, feeds, self.costing, self.timed.cost)

    def _timing_in(self, scheme: Scheme, dense: DenseModel) -> TimedExport:
        """The times to plan with in a scheme, of `--cost` if it has them.

        Raises:
            ModelError: the model cannot be run on this machine.
        """
        feeds, cost = self._feeds(dense), self.timed.cost
        if feeds is None:
            raise ModelError("the model cannot be run on this machine, so that nothing is timed")
        costing = replace(self.costing, scheme=scheme, seconds=min(self.costing.seconds, LOWERED_SECONDS))
        if cost is not None and read_cost_table(cost).conditions.scheme != scheme.name:
            cost = None
        with step(f"cost table of {scheme.name}"):
            return self._timed_export(dense, feeds, costing, cost)

    def _timed_export(
        self, dense: DenseModel, feeds: dict[str, Array], costing: Costing, cost: str | Path | None
    ) -> TimedExport:
        return timed_export(
            dense.path,
            feeds,
            costing,
            cost=cost,
            foreign=self.timed.foreign,
            must_be_faster=not self.timed.allow_slower,
            name=dense.source.name,
            command=self.command,
        )

    def _calibrator(self, dense: DenseModel, store: ResultStore | None) -> Calibrator:
        """What decides every site and fits the factors."""
        job, request, split = self.job, self.timed.request, self._split(dense)

        def write(planned: Planned, path: Path) -> SplitModel:
            again = partial(split, path=path, keep=(), progress=None)
            return again(dense.graph(), planned.planner, fitted=planned.fitted, executor=LocalExecutor())

        return Calibrator(
            request=request,
            dense=dense,
            planner=request.planner(self.filters, always_split=job.settings.always_split),
            filters=self.filters,
            solver=job.solver,
            write=write,
            provider=job.provider,
            progress=job.progress,
            kept=self.kept,
            outputs={} if self.kept is None else dict(self.kept.outputs),
            inputs={} if self.kept is None else self.kept.inputs,
            finished=store if store is not None and fingerprint(request.calib) else None,
        )

    def _split(self, dense: DenseModel) -> "partial[SplitModel]":
        """`split_model` with all that every compressed model of this export has in common."""
        job = self.job
        return partial(
            split_model,
            solver=job.solver,
            path=dense.target,
            metadata={
                "rsi_deploy.version": __version__,
                "rsi_deploy.settings": self._settings(dense).model_dump_json(),
                "rsi_deploy.source_hash": dense.weights_hash,
            },
            joint=job.settings.joint,
            progress=job.progress,
            keep=() if dense.head is None else (dense.head.weight,),
            device=job.device,
        )

    def _in_float(
        self,
        dense: DenseModel,
        calibrator: Calibrator,
        clock: StageClock,
        store: ResultStore | None,
        notes: list[str],
    ) -> Delivered:
        """Compress the dense model to a float model, and measure it."""
        if (plan := self.timed.request.plan) is not None and plan.has_bits:
            notes.append(
                "the plan's bits of weights are left out: they need --calib, and another --precision than float32"
            )
        feeds = self._feeds(dense)
        calibrator.timing = self._timing(dense, feeds, clock)
        with clock.stage("calibrate and plan"):
            planned = calibrator.planned()
        split = self._split(dense)
        with clock.stage("factorize, split, save"), self.job.executor(store, notes) as executor:
            result = split(dense.graph(), planned.planner, fitted=planned.fitted, executor=executor)
        if not calibrator.delivers_dense:
            _refuse_nothing(result)

        def compress(planned: Planned, **changed: Any) -> SplitModel:
            with clock.stage("factorize, split, save"), self.job.executor(store, notes) as executor:
                again = partial(split, **changed)
                return again(dense.graph(), planned.planner, fitted=planned.fitted, executor=executor)

        return self._delivered(dense, calibrator, planned, result, compress, feeds, clock, notes)

    def _lowered(
        self,
        dense: DenseModel,
        calibrator: Calibrator,
        clock: StageClock,
        store: ResultStore | None,
        notes: list[str],
    ) -> Delivered:
        """Make models of several precisions, choose one, and move it to its place."""

        def measure(paths: Sequence[Path]) -> BenchResult:
            seconds = max(self.bench_seconds, len(paths))
            return self.job.latency(dense, paths, self.bench_batch, seconds, self.costing.threads)

        precision = PrecisionStep(
            precision=self.config.precision or "float32",
            maker=PointMaker(
                dense=dense,
                calibrator=calibrator,
                write=calibrator.write,
                measure=measure if self.timed.measure and dense.outputs is not None else None,
                provider=self.job.provider,
                usual_bits=4 if self.config.precision == "int4" else 8,
                target=target_named(self.config.target),
                kept=self.kept,
            ),
            times=partial(self._timing_in, dense=dense),
            allow_slower=self.timed.allow_slower,
            allow_larger=self.allow_larger,
        )
        with clock.stage("plan and compare precisions"):
            point, record, latency = precision.run()
        return Delivered(
            split=point.split or precision.unsplit(),
            predicted=None,
            latency=latency,
            precision=record,
            notes=(*notes, *precision.notes),
        )

    def _delivered(
        self,
        dense: DenseModel,
        calibrator: Calibrator,
        planned: Planned,
        split: SplitModel,
        compress: Callable[..., SplitModel],
        feeds: dict[str, Array] | None,
        clock: StageClock,
        notes: list[str],
    ) -> Delivered:
        """Measure the compressed model if requested, and undo what makes it slow."""
        timing, timed = calibrator.timing, self.timed
        must_be_faster = timed.measure and not self.job.settings.always_split and not timed.allow_slower

        def measure(reference: Path, candidate: Path) -> BenchResult:
            with clock.stage("latency"):
                return self.job.latency(
                    dense, (reference, candidate), self.bench_batch, self.bench_seconds, self.costing.threads
                )

        self._refuse_growth(dense, split)
        if must_be_faster and feeds is not None:
            apart = partial(compress, planned, joint=False)
            is_joint, words = stays_joint(
                dense.target, dense.path.with_name("apart.onnx"), split, lambda path: apart(path=path, keep=()), measure
            )
            notes += words
            if not is_joint:
                compress = partial(compress, joint=False)
                split = compress(planned)
                _refuse_nothing(split)
        predicted = None if timing is None else timing.table.predicted(splits_of(split))
        if feeds is None or not timed.measure or (timing is not None and timing.is_foreign):
            return Delivered(split=split, predicted=predicted, notes=tuple(notes))
        if not must_be_faster:
            latency = measure(dense.path, dense.target)
            return Delivered(split=split, predicted=predicted, latency=latency, notes=tuple(notes))
        rollback = SlowdownRollback(
            compress=compress,
            measure=partial(measure, dense.path, dense.target),
            refit=calibrator.again if timed.request.is_fitted else None,
            dense=dense.path,
            feeds=feeds,
            costing=self.costing,
            table=None if timing is None else timing.table,
        )
        split, latency, undone, verdict = rollback.outcome(planned, split)
        self._refuse_growth(dense, split)
        notes += missed_time(timed.request.budget, latency)
        return Delivered(
            split=split, predicted=predicted, latency=latency, undone=undone, verdict=verdict, notes=tuple(notes)
        )

    def _refuse_growth(self, dense: DenseModel, split: SplitModel) -> None:
        """Refuse a split model that is larger than the user's, unless the user allows it."""
        is_allowed = self.allow_larger or self.job.settings.always_split
        if not is_allowed and (self.config.requantize or any(site.rank for site in split.sites)):
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


@contextmanager
def _names(name: str, dense: Path) -> Iterator[None]:
    """Name the user's model in errors about the dense model's file."""
    try:
        yield
    except RsiDeployError as error:
        words = re.sub(rf"(?<![\w/]){dense.name}(?=:| takes)", lambda _: name, str(error).replace(str(dense), name))
        if words == str(error):
            raise
        raise type(error)(words) from error
