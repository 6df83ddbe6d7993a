"""report.json: what was asked, decided, measured and found, as a versioned schema.

`rsi-deploy schema` prints the JSON schema; `Report.model_validate_json` reads a report back.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.costing.cost_table import Conditions, PlanCheck
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.evaluation.softmax_bound import SoftmaxBound
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.manifest import check_inner_name
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.runtime.feeds.values import as_numbers
from rsi_deploy.runtime.machine import Environment
from rsi_deploy.runtime.parity import OutputComparison

SCHEMA_VERSION = 1


class _Record(pydantic.BaseModel, frozen=True, extra="forbid"):
    pass


class SourceRecord(_Record):
    """Where the dense model came from; `hash` is the sha256 of its weights' names, types, shapes and bytes."""

    model: str
    hash: str
    notes: tuple[str, ...] = ()


class Verification(_Record):
    """The three errors kept apart (see `rsi_deploy.runtime.parity`); exporter is None for an ONNX file in its
    own opset.
    """

    exporter: OutputComparison | None
    surgery: OutputComparison | None
    approximation: OutputComparison | None


class Accuracy(_Record):
    """Dense and compressed on the same evaluation data."""

    dense: AccuracyResult
    compressed: AccuracyResult


class ProbeOutput(_Record):
    """Fingerprint of one output of the compressed model on the seeded probe inputs."""

    name: str
    shape: tuple[int, ...]
    norm: float
    first: tuple[float, ...]

    @classmethod
    def of(cls, name: str, array: npt.NDArray[Any]) -> "ProbeOutput":
        """The norm and the first values of an output array; what is not finite counts as 0, as JSON has no NaN."""
        flat = as_numbers(array).ravel()
        flat = np.where(np.isfinite(flat), flat, 0.0)
        return cls(
            name=name, shape=array.shape, norm=float(np.linalg.norm(flat)), first=tuple(float(x) for x in flat[:8])
        )


class Stage(_Record):
    """One step of the work and its wall time."""

    name: str
    seconds: float


class Undone(_Record):
    """A split that was made and taken back, for the finished model was not shown to be faster; what it saved alone."""

    site: str
    form: str
    rank: int
    saving_ns: int | None


class TimingRecord(_Record):
    """What time decided.

    Attributes:
        source: where the times are from: "measured here", "--cost FILE", or "the finished model alone".
        conditions: that they hold for.
        rule: "faster": a site is split only where its split was measured faster; "none": for smaller was enough.
        table_seconds: to get the table, from the cache or by measuring; 0 without one.
        dense_ns: a call of the whole dense model, by the table; 0 without one.
        scale: by what the saving of the model is that of its sites.
        predicted: share of the dense model's time that the table foretells of the plan; None without one.
        checks: plans that were measured as whole models while planning.
        undone: splits taken back at the last word.
        last_word: what the finished model's measurement has led to, in words.
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
    """The whole report.

    Attributes:
        schema_version: of this layout.
        tool: name and version.
        created: UTC, ISO 8601.
        command: the command line, or the Python call.
        recipe: the request as recipe.toml holds it; `rsi-deploy export --recipe` makes the bundle again.
        source: the dense model.
        settings: what shapes the result.
        preprocessing: from 8-bit pictures to inputs, where known.
        dense, compressed: sizes.
        sites: every weight, split or dense, with reasons and errors.
        verification: the three gates.
        calibration: with calibration data: how far the outputs moved on them.
        softmax_bound: for a factorized classifier head with evaluation data.
        accuracy: with evaluation data.
        latency: unless --no-bench; the first arm is the dense model.
        timing: what time decided; None where it decided nothing (--no-bench, --always-split).
        probe_shapes: shapes of the probe inputs (`rsi_deploy.runtime.feeds.probe`, with the seed).
        probe_given: the user gave the probe inputs, so that they cannot be made again.
        probe_fingerprint: of those (`rsi_deploy.runtime.feeds.probe.feeds_fingerprint`); None where they were made.
        probe: outputs on them, which `verify` computes again.
        files: sha256 of the bundle's model files.
        stages: wall time of each step, s.
        peak_memory: largest resident set of the process, bytes.
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
        """The sites that were split."""
        return tuple(site for site in self.sites if site.decision == "split")


def read_report(folder: str | Path) -> Report:
    """The report of the bundle in `folder`.

    Raises:
        UsageError: no bundle there.
        ModelError: a report that this version cannot read, and the first reason.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no bundle: it has no report.json; name the folder that export wrote")
    try:
        return Report.model_validate_json(read_document(path))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(
            f"{path} is not a report of schema version {SCHEMA_VERSION}: {where}: {first['msg']}; export again"
        ) from error
