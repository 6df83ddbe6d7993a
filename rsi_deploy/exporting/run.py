"""The run of one export: each step takes the records of the steps before it, and returns its own.

dense model --> cost table --> calibrate and plan --> factorize and split --> measure --> verify --> report and files
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rsi_deploy import __version__
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.core.progress import step
from rsi_deploy.core.settings.recipe import recipe_text
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.data.sources import Dataset
from rsi_deploy.data.text_data import data_fingerprint
from rsi_deploy.execution import result_store
from rsi_deploy.execution.executor import LocalExecutor
from rsi_deploy.execution.result_store import ResultStore, key_of
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.check_step import verified
from rsi_deploy.exporting.dense_step import dense_model
from rsi_deploy.exporting.disk_space import check_space, states_space
from rsi_deploy.exporting.float_step import FloatStep
from rsi_deploy.exporting.inputs import Origin
from rsi_deploy.exporting.lowered.maker import PointMaker
from rsi_deploy.exporting.lowered.step import PrecisionStep
from rsi_deploy.exporting.model_checks import check_target, refuse_quantized, target_notes
from rsi_deploy.exporting.request_defaults import default_settings, with_default_quality
from rsi_deploy.exporting.results import Delivered, DenseModel, dense_file
from rsi_deploy.exporting.step_settings import StepSettings
from rsi_deploy.exporting.timing.model_times import ModelTimes
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.exporting.timing.stage_clock import StageClock
from rsi_deploy.exporting.writer import Exported, write_files
from rsi_deploy.io.bundle import atomic_folder, finished_results_folder
from rsi_deploy.io.folders.beside import copy_beside
from rsi_deploy.io.manifest import file_hash
from rsi_deploy.io.onnx_checks.broken_models import explaining_broken_model
from rsi_deploy.onnx_models.split import SplitModel, split_model
from rsi_deploy.planning.decide import Planned, refuse_uncounted
from rsi_deploy.planning.planner import Filters
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.precision.targets import target_named
from rsi_deploy.report.outlook import Outlook
from rsi_deploy.report.schema import Report
from rsi_deploy.runtime.shape_trace import uncounted_nodes


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """One export with its settings.

    Attributes:
        job: settings that its steps share.
        origin: where the model comes from.
        request: what decides the ranks.
        costing: how cost tables are made; the models are timed with its threads.
        filters: sites that may be split.
        dataset: labelled evaluation data; None without.
        max_output_error: gate on the error of the outputs: squared and relative to their variance on the check part, or
            without calibration data the relative L2 error on the probe inputs; None only reports it.
        command: command line or call, for the report.
        config: settings of the export.
        recipe: the request, as recipe.toml holds it.
        kept: what earlier exports of the same model, data and settings have found; None without.
    """

    job: StepSettings
    origin: Origin
    request: RankRequest
    costing: Costing
    filters: Filters
    dataset: Dataset | None
    max_output_error: float | None
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
        clock = StageClock()
        with self._folder(output, force=force) as folder:
            dense = self._dense(folder, clock)
            refuse_quantized(dense, self.config)
            with _names(dense.source.name, dense.path):
                check_target(self.config.target, dense.path, dense.source.name)
            run = self._with_defaults(dense)
            refuse_uncounted(run.request.budget, dense.size, uncounted_nodes(dense.uncounted))
            if dense.outputs is not None:
                check_space(folder)
            store = run._result_store(dense)
            calibrator = run._calibrator(dense, store)
            with _names(dense.source.name, dense.path):
                # Data that do not fit are refused before the cost table is measured.
                data = None if run.request.calib is None else calibrator.data
                delivered = run._step(dense, calibrator, clock, store).run()
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
        check_target(self.config.target, dense.target, dense.source.name)
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
        beside = [] if dense.source.folder is None else copy_beside(dense.source.folder, folder)
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
                *target_notes(self.config.target, self.job.provider),
                *beside,
            ),
        )
        report = exported.report(self.costing, self.command, self.recipe, keep_dense=self.config.keep_dense)
        write_files(folder, report, dense.target)
        return report

    @contextmanager
    def _folder(self, output: Path, *, force: bool) -> Iterator[Path]:
        """A folder that becomes `output`; errors explain an invalid model and a full disk."""
        config = self.config
        inputs = (self.origin.model, config.weights, config.checkpoint, config.data, config.calib, config.calib_check)
        with (
            explaining_broken_model(self.origin.model),
            atomic_folder(output, force=force, inputs=(*inputs, config.feeds, config.plan, config.cost)) as folder,
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
        """Return this export with the settings that follow from the dense model."""
        request = with_default_quality(self.request, dense, self.job.provider)
        changed: dict[str, Any] = default_settings(request, self.config, dense)
        if not changed:
            return self
        config = ExportConfig.of(self.config, **changed)
        job = replace(self.job, settings=self.job.settings.model_copy(update={"budget": request.decided_by}))
        recipe = recipe_text("export", self.origin.model, config)
        return replace(self, request=request, job=job, config=config, recipe=recipe)

    def _settings(self, dense: DenseModel) -> ExportSettings:
        return self.job.settings.model_copy(update={"opset": dense.opset})

    def _result_store(self, dense: DenseModel) -> ResultStore | None:
        """Results of an interrupted run of this export; None where the model is too small to store any."""
        if dense.size.bytes < result_store.LARGE:
            return None
        job, calib = self.job, self.request.calib
        more: list[object] = []
        if calib is not None:
            shapes = {name: array.shape for name, array in dense.feeds.items()}  # what MACs are counted on
            request = self.request
            parts = [request.check_size, str(request.quality), request.calib_check is not None]
            parts += [] if self.config.precision in (None, "float32") else [self.config.precision]
            more = [data_fingerprint(calib), *parts, self._settings(dense).model_dump_json(), job.provider, shapes]
        key = key_of(f"{dense.weights_hash} {file_hash(dense.path)}", job.device, *more)
        return ResultStore(folder=finished_results_folder(dense.folder), key=key)

    def _calibrator(self, dense: DenseModel, store: ResultStore | None) -> Calibrator:
        """What decides every site and fits the factors."""
        job, request, split = self.job, self.request, self._split(dense)

        def write(planned: Planned, path: Path) -> SplitModel:
            again = partial(split, path=path, keep=(), progress=None)
            return again(dense.graph(), planned.planner, fitted=planned.fitted, executor=LocalExecutor())

        return Calibrator(
            request=replace(request, pivoted=self.config.precision in (None, "float32")),
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
            finished=store if store is not None and data_fingerprint(request.calib) else None,
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

    def _step(
        self, dense: DenseModel, calibrator: Calibrator, clock: StageClock, store: ResultStore | None
    ) -> FloatStep | PrecisionStep:
        """The step that compresses the dense model: to a float model, or to the best of several precisions."""
        config = self.config
        times = ModelTimes(dense=dense, job=self.job, config=config, costing=self.costing, command=self.command)
        if config.precision in (None, "float32"):
            split = self._split(dense)
            return FloatStep(calibrator=calibrator, times=times, split=split, store=store, clock=clock, config=config)
        maker = PointMaker(
            calibrator=calibrator, times=times, precision=config.precision, target=target_named(config.target)
        )
        return PrecisionStep(maker=maker, clock=clock, config=config)


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
