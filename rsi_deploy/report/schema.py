"""report.json as a versioned schema: settings, decisions and results of an export.

`rsi-deploy schema` prints the JSON schema. `read_report` reads a report.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.costing.cost_table import Conditions, PlanCheck
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.evaluation.softmax_bound import SoftmaxBound
from rsi_deploy.io.manifest import check_inner_name
from rsi_deploy.planning.record import PlanRecord
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.precision.record import PrecisionRecord
from rsi_deploy.report.json_files import read_json
from rsi_deploy.runtime.feeds.values import as_numbers
from rsi_deploy.runtime.machine import Environment
from rsi_deploy.runtime.parity import OutputComparison

SCHEMA_VERSION = 1


class _Record(pydantic.BaseModel, frozen=True, extra="forbid"):
    pass


class SourceRecord(_Record):
    """The source of the dense model; `hash` is the sha256 of the names, types, shapes and bytes of its weights."""

    model: str
    hash: str
    notes: tuple[str, ...] = ()


class Verification(_Record):
    """The errors of the three steps (see `rsi_deploy.runtime.parity`); exporter is None for an ONNX file that keeps its
    opset.
    """

    exporter: OutputComparison | None
    surgery: OutputComparison | None
    approximation: OutputComparison | None


class Accuracy(_Record):
    """Accuracy of the dense and of the compressed model on the same evaluation data."""

    dense: AccuracyResult
    compressed: AccuracyResult


class ProbeOutput(_Record):
    """A fingerprint of one output of the compressed model on the probe inputs."""

    name: str
    shape: tuple[int, ...]
    norm: float
    first: tuple[float, ...]

    @classmethod
    def of(cls, name: str, array: npt.NDArray[Any]) -> "ProbeOutput":
        """Return the norm and the first values of an output; non-finite values count as 0, as JSON has no NaN."""
        flat = as_numbers(array).ravel()
        flat = np.where(np.isfinite(flat), flat, 0.0)
        return cls(
            name=name, shape=array.shape, norm=float(np.linalg.norm(flat)), first=tuple(float(x) for x in flat[:8])
        )


class Stage(_Record):
    """A step of the export and its wall time."""

    name: str
    seconds: float


class Undone(_Record):
    """A split that was undone because the finished model was not shown to be faster.

    Attributes:
        site: name of the site.
        form: form of the split.
        rank: rank of the split.
        saving_ns: time that the split saves alone, in ns; None if unknown.
    """

    site: str
    form: str
    rank: int
    saving_ns: int | None


class TimingRecord(_Record):
    """The decisions that depend on measured times.

    Attributes:
        source: source of the times: "measured here", "--cost FILE", or "the finished model alone".
        conditions: conditions under which they were measured.
        rule: "faster": a site is split only if its split was measured to be faster; "none": smaller was enough.
        table_seconds: seconds to get the cost table, from the cache or by measuring; 0 without a table.
        dense_ns: time of a call of the dense model by the table, in ns; 0 without a table.
        scale: saving of the whole model divided by the sum of the savings of its sites.
        predicted: share of the dense model's time that the table predicts for the plan; None without a table.
        checks: plans that were measured as whole models while planning.
        undone: splits that were undone after the finished model was measured.
        last_word: what was decided after the finished model was measured, in words.
    """

    source: str
    conditions: Conditions
    rule: Literal["faster", "none"]
    table_seconds: float
    dense_ns: int
    scale: float
    predicted: float | None
    checks: tuple[PlanCheck, ...]
    undone: tuple[Undone, ...]
    last_word: str


class Report(_Record):
    """The report of an export.

    Attributes:
        schema_version: version of this schema.
        tool: name and version of the tool.
        created: time of the export: UTC, ISO 8601.
        command: the command line, or the Python call.
        recipe: the request as in recipe.toml; `rsi-deploy export --recipe` makes the bundle again from it.
        source: source of the dense model.
        settings: settings that determine the result.
        preprocessing: steps from 8-bit pictures to inputs, if known.
        dense: size of the dense model.
        compressed: size of the compressed model.
        sites: every weight, split or dense, with reason and errors.
        verification: the relative errors of the outputs in each step.
        calibration: change of the outputs on the calibration data; None without such data.
        softmax_bound: bound on changed answers, for a factorized classifier head with evaluation data.
        accuracy: accuracy on the evaluation data; None without such data.
        latency: latency of the dense and the compressed model, in this order; None with --no-bench.
        plan: what planning has foreseen and tried; None where a rank or a plan decides.
        precision: the choice of a precision, with what else was compared; None with --precision float32.
        timing: decisions that depend on measured times; None without any (--no-bench, --always-split).
        probe_shapes: shapes of the probe inputs, which are made from the seed (`rsi_deploy.runtime.feeds.probe`).
        probe_given: whether the user gave the probe inputs (--feeds), so that they cannot be made again.
        probe_fingerprint: fingerprint of such inputs (`rsi_deploy.runtime.feeds.probe.feeds_fingerprint`), or None.
        probe: outputs for the probe inputs, which `verify` computes again.
        files: name -> sha256 of the bundle's model files.
        stages: wall time of each step.
        peak_memory: largest resident memory of the process, in bytes.
        environment: machine and versions.
        notes: what a reader must know.
    """

    schema_version: Literal[1] = 1
    tool: str
    created: str
    command: str
    recipe: str = ""
    source: SourceRecord
    settings: ExportSettings
    preprocessing: Preprocessing | None
    dense: Size
    compressed: Size
    sites: tuple[SiteRecord, ...]
    verification: Verification
    calibration: CalibrationRecord | None
    softmax_bound: SoftmaxBound | None
    accuracy: Accuracy | None
    latency: BenchResult | None
    plan: PlanRecord | None = None
    precision: PrecisionRecord | None = None
    timing: TimingRecord | None = None
    probe_shapes: dict[str, tuple[int, ...]]
    probe_given: bool
    probe_fingerprint: str | None = None
    probe: tuple[ProbeOutput, ...]
    files: dict[Annotated[str, pydantic.AfterValidator(check_inner_name)], str]
    stages: tuple[Stage, ...]
    peak_memory: int
    environment: Environment
    notes: tuple[str, ...]

    @pydantic.model_validator(mode="after")
    def _two_arms(self) -> Self:
        if self.latency is not None and len(self.latency.arms) != 2:
            raise ValueError(f"latency must have the arms dense and compressed, but has {len(self.latency.arms)}")
        return self

    @property
    def split_sites(self) -> tuple[SiteRecord, ...]:
        """Sites that were split."""
        return tuple(site for site in self.sites if site.decision == "split")

    @property
    def bits(self) -> dict[str, int]:
        """Name of a site -> bits in which its weight is stored, where a choice of precision decided."""
        return {} if self.precision is None else self.precision.bits


def read_report(folder: str | Path) -> Report:
    """Return the report of the bundle in `folder`.

    Raises:
        UsageError: `folder` is no bundle.
        ModelError: this version cannot read the report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no bundle: it has no report.json; type the folder that export wrote")
    return read_json(path, Report, f"report of schema version {SCHEMA_VERSION}")
