"""Write the report of an export, and the files of the bundle beside the model."""

import datetime
import shutil
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy import __version__
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.settings.recipe import RECIPE
from rsi_deploy.exporting.calibration_step import Calibrator
from rsi_deploy.exporting.results import Delivered, DenseModel, Verified
from rsi_deploy.exporting.step_settings import StepSettings
from rsi_deploy.exporting.timing.latency_options import timing_notes, timing_record
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.io.manifest import file_hash, write_manifest
from rsi_deploy.io.onnx_file import file_bytes, read_onnx, write_onnx
from rsi_deploy.onnx_models.site_records import with_macs
from rsi_deploy.planning.plan_file import write_plan
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.report.card import model_card
from rsi_deploy.report.pages.report import report_page
from rsi_deploy.report.report_plan import plan_of
from rsi_deploy.report.schema import Report, SourceRecord, Stage
from rsi_deploy.runtime.feeds.probe import feeds_fingerprint
from rsi_deploy.runtime.machine import environment, peak_memory


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export whose steps are done.

    Attributes:
        job: settings of its steps.
        settings: settings that shaped model.onnx.
        dense: the dense model.
        calibrator: the times it planned with, and its notes.
        delivered: the compressed model.
        checked: comparison of both.
        stages: times of the stages.
        notes: further notes for the report.
    """

    job: StepSettings
    settings: ExportSettings
    dense: DenseModel
    calibrator: Calibrator
    delivered: Delivered
    checked: Verified
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    def report(self, costing: Costing, command: str, recipe: str, *, keep_dense: bool) -> Report:
        """Delete what does not belong to the bundle, hash the rest, and return the report."""
        job, dense, delivered, checked = self.job, self.dense, self.delivered, self.checked
        return Report(
            tool=f"rsi-deploy {__version__}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            recipe=recipe,
            source=SourceRecord(model=dense.source.name, hash=dense.weights_hash, notes=tuple(dense.source.notes)),
            settings=self.settings,
            preprocessing=dense.preprocessing,
            dense=dense.size,
            compressed=self._size(),
            sites=tuple(with_macs(delivered.split.sites, delivered.split.nodes, dense.macs, checked.macs)),
            verification=checked.verification,
            calibration=checked.agreement,
            softmax_bound=checked.bound,
            accuracy=checked.accuracy,
            latency=delivered.latency,
            plan=self.calibrator.record,
            precision=delivered.precision,
            timing=timing_record(self.calibrator.timing, delivered, costing),
            probe_shapes={name: array.shape for name, array in dense.feeds.items()},
            probe_given=job.own_feeds is not None,
            probe_fingerprint=None if job.own_feeds is None else feeds_fingerprint(job.own_feeds),
            probe=checked.probe,
            files=_finish(dense, keep_dense=keep_dense),
            stages=self.stages,
            peak_memory=peak_memory(),
            environment=environment(),
            notes=self._notes(),
        )

    def _size(self) -> Size:
        """Size of the compressed model."""
        params, macs = self.delivered.split.params, sum(self.checked.macs.values())
        return Size(bytes=file_bytes(self.dense.target), params=params, macs=macs)

    def _notes(self) -> tuple[str, ...]:
        """All notes, each once."""
        dense, accuracy = self.dense, self.dense.accuracy
        notes = [*dense.source.notes, *dense.notes, *self.delivered.notes, *self.checked.notes, *self.notes]
        notes += [] if accuracy is None else accuracy.notes
        notes += [*self.calibrator.notes, *timing_notes(self.calibrator.timing, self.delivered)]
        return tuple(dict.fromkeys(notes))


def write_files(folder: Path, report: Report, model: Path) -> None:
    """Write the files beside the model: reports, plan.json, recipe.toml, the model card; last, the manifest."""
    document = report.model_dump_json(indent=2) + "\n"
    (folder / "report.json").write_text(document, encoding="utf-8", newline="\n")
    (folder / "report.html").write_text(report_page(report, document), encoding="utf-8")
    write_plan(folder / "plan.json", plan_of(report))
    (folder / RECIPE).write_text(report.recipe, encoding="utf-8", newline="\n")
    (folder / "README.md").write_text(model_card(report, model), encoding="utf-8")
    write_manifest(folder)


def _finish(dense: DenseModel, *, keep_dense: bool) -> dict[str, str]:
    """Delete what does not belong to the bundle, and hash the model files that stay."""
    folder, work = dense.folder, dense.path.parent
    if keep_dense and dense.reference != dense.path:
        write_onnx(read_onnx(dense.reference), folder / dense.path.name)
    elif keep_dense:
        for path in work.glob("dense.onnx*"):
            path.rename(folder / path.name)
    shutil.rmtree(work)
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.onnx*"))}
