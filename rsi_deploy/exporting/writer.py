"""What is written of an export: its report, and the files of the bundle beside the model."""

import datetime
import shutil
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy import __version__
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.settings.recipe import RECIPE
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.latency_options import timing_notes, timing_record
from rsi_deploy.exporting.profile import Costing
from rsi_deploy.exporting.results import Delivered, Start, Verified, dense_file
from rsi_deploy.exporting.steps import ExportSteps
from rsi_deploy.io.manifest import file_hash, write_manifest
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.onnx_models.split import with_macs
from rsi_deploy.planning.plan_file import write_plan
from rsi_deploy.report.card import model_card
from rsi_deploy.report.pages.report import report_page
from rsi_deploy.report.report_plan import plan_of
from rsi_deploy.report.schema import Report, SourceRecord
from rsi_deploy.runtime.feeds.probe import feeds_fingerprint
from rsi_deploy.runtime.machine import environment, peak_memory


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export whose steps are done.

    Attributes:
        job: with its settings, and the times the steps took.
        start: the dense model.
        calibrator: with the times it planned with, and its notes.
        delivered: the compressed model.
        checked: one held against the other.
    """

    job: ExportSteps
    start: Start
    calibrator: Calibrator
    delivered: Delivered
    checked: Verified

    def report(self, costing: Costing, command: str, recipe: str, *, keep_dense: bool) -> Report:
        """The report; what does not belong into the bundle is dropped with it, for the rest is hashed."""
        job, start, delivered, checked = self.job, self.start, self.delivered, self.checked
        facts, timing, source = start.facts, self.calibrator.timing, start.source
        return Report(
            tool=f"rsi-deploy {__version__}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            recipe=recipe,
            source=SourceRecord(model=source.name, hash=job.source_hash, notes=tuple(source.notes)),
            settings=job.settings,
            preprocessing=start.steps,
            dense=facts.size,
            compressed=self._size(),
            sites=tuple(with_macs(delivered.result.split, facts.macs, checked.macs)),
            verification=checked.verification,
            calibration=checked.certified,
            softmax_bound=checked.bound,
            accuracy=checked.accuracy,
            latency=delivered.latency,
            timing=timing_record(timing, delivered.word, costing, delivered.predicted),
            probe_shapes={name: array.shape for name, array in facts.feeds.items()},
            probe_given=job.given is not None,
            probe_fingerprint=None if job.given is None else feeds_fingerprint(job.given),
            probe=checked.probe,
            files=_finish(start.folder, keep_dense=keep_dense),
            stages=tuple(job.stages),
            peak_memory=peak_memory(),
            environment=environment(),
            notes=self._notes(),
        )

    def _size(self) -> Size:
        """Of the compressed model."""
        params, macs = self.delivered.result.params, sum(self.checked.macs.values())
        return Size(bytes=file_bytes(self.start.path), params=params, macs=macs)

    def _notes(self) -> tuple[str, ...]:
        """What a reader should know, each once."""
        of_time = timing_notes(self.calibrator.timing, self.delivered.word)
        accuracy = self.start.accuracy
        of_data = [] if accuracy is None else accuracy.notes
        found = [*self.start.source.notes, *self.job.notes, *of_data, *self.calibrator.notes, *of_time]
        return tuple(dict.fromkeys(found))


def write_files(folder: Path, report: Report, model: Path) -> None:
    """Write the files beside the model: reports, plan.json, recipe.toml, the model card; last, the manifest."""
    document = report.model_dump_json(indent=2) + "\n"
    (folder / "report.json").write_text(document, encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(report_page(report, document), encoding="utf-8")
    write_plan(folder / "plan.json", plan_of(report))
    (folder / RECIPE).write_text(report.recipe, encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(model_card(report, model), encoding="utf-8")
    write_manifest(folder)


def _finish(folder: Path, *, keep_dense: bool) -> dict[str, str]:
    """Drop what does not belong into the bundle and hash what stays."""
    work = dense_file(folder).parent
    if keep_dense:
        for path in work.glob("dense.onnx*"):
            path.rename(folder / path.name)
    shutil.rmtree(work)
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.onnx*"))}
