"""The run of one export: each step takes what the steps before it have found.

start --> timing --> calibrator --> delivered --> checked --> report and files
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.output_agreement import output_agreement
from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.data.dataset import for_inputs
from rsi_deploy.data.feeding import errors_for_option
from rsi_deploy.data.model_pictures import preset_note
from rsi_deploy.data.sources import Dataset
from rsi_deploy.execution import result_store as resuming
from rsi_deploy.execution.result_store import ResultStore
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.calibration_step import CalibratedModel, Calibrator
from rsi_deploy.exporting.disk_space import check_room, told_room
from rsi_deploy.exporting.inputs import Origin
from rsi_deploy.exporting.latency_options import Timed, missed_time
from rsi_deploy.exporting.profile import Costing
from rsi_deploy.exporting.results import Delivered, Start, Verified, dense_file
from rsi_deploy.exporting.shared_factor_choice import JointOrApart
from rsi_deploy.exporting.slowdown_rollback import LastWord, splits_of
from rsi_deploy.exporting.steps import Compressed, ExportSteps
from rsi_deploy.exporting.timed_export import TimedExport, timed_export
from rsi_deploy.exporting.writer import Exported, write_files
from rsi_deploy.io.bundle import finished_results_folder
from rsi_deploy.io.manifest import file_hash, fingerprint
from rsi_deploy.io.onnx_file import file_bytes, refuse_growth
from rsi_deploy.planning.decide import Planned, refuse_uncounted
from rsi_deploy.planning.planner import Filters
from rsi_deploy.report.schema import Report
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.shape_trace import uncounted_nodes


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """One export, with all that was asked of it.

    Attributes:
        job: its steps, with the settings they share.
        origin: where the model is from.
        timed: the part that time has, with what decides the ranks.
        costing: how tables are made; the models are timed with its threads.
        filters: which sites are let through.
        dataset: labelled evaluation data, as they are before the model's inputs are known; None without.
        bench_batch: samples a run while measuring.
        bench_seconds: for the measurement.
        max_output_error: gate on the approximation error; None only reports it.
        keep_dense: keep the dense model in the bundle.
        allow_larger: deliver a compressed model that is larger than the dense one, too.
        command: for the report.
        recipe: the request, as recipe.toml holds it.
        kept: what earlier exports of the same model, data and settings have found; None without.
    """

    job: ExportSteps
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
    command: str
    recipe: str
    kept: SweepCache | None

    def made_in(self, folder: Path) -> Report:
        """Make the bundle in `folder`, which is there and empty; its report.

        Raises:
            UsageError: a request that does not fit the model or the data.
            ModelError: the model cannot be handled.
            GateError: a verification gate failed.
            OSError: a full disk.
        """
        with told_room(folder):
            start = self._start(folder)
            facts = start.facts
            refuse_uncounted(self.timed.request.budget, facts.size, uncounted_nodes(facts.uncounted))
            if start.facts.outputs is not None:
                check_room(folder)
            self.job.finished = self._finished(start)
            calibrator = self._calibrator(start, self._timing(start))
            with _named(start.source.name, start.dense):
                delivered = self._delivered(start, calibrator)
            checked = self._checked(start, delivered, calibrator)
            if self.job.finished is not None and (note := self.job.finished.note()):
                self.job.notes.append(note)
            exported = Exported(job=self.job, start=start, calibrator=calibrator, delivered=delivered, checked=checked)
            report = exported.report(self.costing, self.command, self.recipe, keep_dense=self.keep_dense)
            write_files(folder, report, start.path)
            return report

    def _start(self, folder: Path) -> Start:
        """The dense model, written, held against its source and traced."""
        job, kept = self.job, self.kept
        with job.stage("load"):
            source = self.origin.load()
        steps = self.origin.steps(source)
        dense = dense_file(folder)
        dense.parent.mkdir()
        known, size = (kept.accuracy(), kept.size()) if kept else (None, None)
        with _named(source.name, dense):
            exporter = job.export_dense(source, dense, steps, self.origin.opset)
            with errors_for_option("--data"):
                dataset = None if self.dataset is None else for_inputs(self.dataset, model_inputs(dense))
            facts, accuracy = job.dense_facts(source, dense, dataset, steps, known, size)
        if kept is not None:
            kept.keep_accuracy(accuracy)
        fed = job.timing_feeds(dense, facts, self.bench_batch) if facts.outputs is not None else None
        return Start(
            source=source,
            folder=folder,
            steps=steps,
            exporter=exporter,
            facts=facts,
            dataset=dataset,
            accuracy=accuracy,
            fed=fed,
        )

    def _of_pictures(self, start: Start, are_pictures: bool) -> list[str]:
        """What the model's own preprocessing does to the size of the data, where they are pictures."""
        return preset_note(start.steps, self.origin.preprocessing, start.source.name) if are_pictures else []

    def _finished(self, start: Start) -> ResultStore | None:
        """What an earlier run of this export has finished; None where the model is too small to keep anything."""
        if start.facts.size.bytes < resuming.LARGE:
            return None
        job, calib = self.job, self.timed.request.calib
        told: list[object] = []
        if calib is not None:
            shapes = {name: array.shape for name, array in start.facts.feeds.items()}  # what MACs are counted on
            told = [fingerprint(calib), job.settings.model_dump_json(), job.provider, shapes]
        key = resuming.key_of(f"{job.source_hash} {file_hash(start.dense)}", job.device, *told)
        return ResultStore(folder=finished_results_folder(start.folder), key=key)

    def _timing(self, start: Start) -> TimedExport | None:
        """The times to plan with; None where they decide nothing, or the model cannot be run."""
        if not self.timed.needs_table or start.fed is None:
            return None
        with self.job.stage("cost table"):
            return timed_export(
                start.dense,
                start.fed,
                self.costing,
                cost=self.timed.cost,
                foreign=self.timed.foreign,
                must_be_faster=not self.timed.smaller_is_enough,
                name=start.source.name,
                command=self.command,
            )

    def _calibrator(self, start: Start, timing: TimedExport | None) -> Calibrator:
        """What decides every site and fits the factors."""
        job, request, facts = self.job, self.timed.request, start.facts
        return Calibrator(
            request=request,
            dense=CalibratedModel(
                path=start.dense,
                size=facts.size,
                macs={node: count - facts.attention_macs.get(node, 0) for node, count in facts.macs.items()},
                feeds=facts.feeds,
                batch=facts.batch,
                accuracy=start.accuracy,
            ),
            planner=request.planner(self.filters, always_split=job.settings.always_split),
            filters=self.filters,
            solver=job.solver,
            steps=start.steps,
            evaluation=start.dataset,
            write=lambda made, candidate: job.write(start.dense, candidate, made),
            provider=job.provider,
            seed=job.solver.seed,
            progress=job.progress,
            timing=timing,
            kept=self.kept,
            finished=job.finished if job.finished is not None and fingerprint(request.calib) else None,
        )

    def _delivered(self, start: Start, calibrator: Calibrator) -> Delivered:
        """The compressed model, written, and measured where that is asked for; its splits may be undone then."""
        job, timing = self.job, calibrator.timing
        with job.stage("calibrate and plan"):
            made = calibrator.planned()
        compress = partial(job.compress, start.dense, start.path, with_head=start.dataset is not None)
        result = compress(made, may_be_dense=timing is not None and timing.delivers_dense)
        self._refuse_growth(start, result)
        if self._must_be_faster and start.fed is not None and not self._stays_joint(start, made, result):
            compress = partial(compress, joint=False)
            result = compress(made)
        predicted = None if timing is None else timing.table.predicted(splits_of(result))
        if start.fed is None or not self.timed.measure or (timing is not None and timing.is_foreign):
            return Delivered(result=result, predicted=predicted)
        if not self._must_be_faster:
            return Delivered(result=result, predicted=predicted, latency=self._latency(start))
        word = LastWord(
            compress=partial(compress, may_be_dense=True),
            measure=partial(self._latency, start),
            refit=calibrator.again if self.timed.request.is_fitted else None,
            dense=start.dense,
            feeds=start.fed,
            costing=self.costing,
            table=None if timing is None else timing.table,
        )
        _, result, latency = word.spoken(made, result)
        self._refuse_growth(start, result)
        job.notes += missed_time(self.timed.request.budget, latency)
        return Delivered(result=result, predicted=predicted, latency=latency, word=word)

    def _refuse_growth(self, start: Start, result: Compressed) -> None:
        """Refuse a split model that is larger than the user's, unless that was asked for."""
        is_asked_for = self.allow_larger or self.job.settings.always_split
        if not is_asked_for and any(site.rank for site in result.split.sites):
            refuse_growth(file_bytes(start.path), start.facts.size.bytes, start.source.name)

    @property
    def _must_be_faster(self) -> bool:
        """Whether times measured here decide what is delivered."""
        return self.timed.measure and not self.job.settings.always_split and not self.timed.smaller_is_enough

    def _stays_joint(self, start: Start, made: Planned, result: Compressed) -> bool:
        """Whether what shares a right factor is not measured faster with one each."""

        def compress(path: Path) -> Compressed:
            return self.job.compress(start.dense, path, made, with_head=False, joint=False)

        def measure(first: Path, second: Path) -> BenchResult:
            return self.job.latency(
                first, second, start.facts, self.bench_batch, self.bench_seconds, self.costing.threads
            )

        choice = JointOrApart(compress=compress, measure=measure, apart=start.dense.with_name("apart.onnx"))
        stays = choice.is_joint(start.path, result)
        self.job.notes += [choice.words] if choice.words else []
        return stays

    def _latency(self, start: Start) -> BenchResult:
        """Dense and compressed side by side."""
        return self.job.latency(
            start.dense, start.path, start.facts, self.bench_batch, self.bench_seconds, self.costing.threads
        )

    def _checked(self, start: Start, delivered: Delivered, calibrator: Calibrator) -> Verified:
        """The delivered model held against the dense one: outputs, accuracy, calibration data, MACs."""
        job, dense, path, result = self.job, start.dense, start.path, delivered.result
        verification, probe = job.verify(dense, path, result, start.facts, start.exporter, self.max_output_error)
        job.notes += self._of_pictures(start, start.dataset is not None and start.dataset.kind == "images")
        accuracy, bound = job.accuracy(dense, path, result, start.dataset, start.steps, start.accuracy)
        record, kept = None, self.kept
        if self.timed.request.calib is not None and start.facts.outputs is not None:
            with job.stage("certificate"):
                known = None if kept is None else kept.answers
                data = calibrator.data()
                record, answers = output_agreement(dense, path, data, job.provider, known)
                job.notes += self._of_pictures(start, data.are_pictures) + data.notes()
                if kept is not None:
                    kept.answers = answers
        return Verified(
            verification=verification,
            probe=probe,
            accuracy=accuracy,
            bound=bound,
            certified=record,
            macs=job.macs(path, start.facts),
        )


@contextmanager
def _named(name: str, dense: Path) -> Iterator[None]:
    """What is wrong with the dense model's file is said of the model that the user named."""
    try:
        yield
    except RsiDeployError as error:
        words = re.sub(rf"(?<![\w/]){dense.name}(?=:| takes)", lambda _: name, str(error).replace(str(dense), name))
        if words == str(error):
            raise
        raise type(error)(words) from error
