"""What `bench` measured, as a typed document: the file that `bench --json` writes, `--compare` and the page read.

    BenchDocument       one run of the command: machine, arms, and
      cells             one BenchResult a configuration (batch, shapes, threads, precision...)
        arms            one ArmResult a model
      cold_start, ...   the separate measurements, where they were asked for

`export` embeds one BenchResult in its report.
"""

import datetime
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, Field

from rsi_deploy.benchmark.loadgen import LoadGenResult
from rsi_deploy.benchmark.sections import Bursts, ColdStart, Memory, Profile, SessionStreams, Throughput
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Interval
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.io.documents import read_document
from rsi_deploy.runtime.machine import Environment

SCHEMA_VERSION: Literal[1] = 1

Stopped = Literal["precise", "time", "interrupted"]
Precision = Literal["stored", "float16"]


class ArmResult(BaseModel, frozen=True, extra="forbid"):
    """One model's times in one configuration.

    Attributes:
        label: what the arm is called.
        model: the file.
        n: timed calls, in `blocks` visits.
        blocks: visits.
        median_ms: median over the blocks of each block's median.
        median_interval_ms: its 95 % bootstrap interval.
        percentiles_ms: "p50", "p90", "p99", "p99.9" of all timed calls, those with at least ten calls beyond them.
        quantiles_ms: the 0 %, 1 % ... 100 % quantiles of all timed calls.
        warmup_calls: untimed calls before the first block.
        warm: whether the time had settled after them.
        provider_nodes: provider -> nodes that it executed, from a profiled run.
        memcpy_nodes: copies between device and host among those.
        speedup: the first arm's median over this one's; None for the first arm.
        speedup_interval: its 99 % interval over paired blocks.
        verdict: the comparison with the first arm in words.
    """

    label: str
    model: str
    n: int
    blocks: int
    median_ms: pydantic.PositiveFloat
    median_interval_ms: Interval
    percentiles_ms: dict[str, float]
    quantiles_ms: tuple[float, ...]
    warmup_calls: int
    warm: bool
    provider_nodes: dict[str, int]
    memcpy_nodes: int
    speedup: pydantic.PositiveFloat | None
    speedup_interval: Interval | None
    verdict: str

    @property
    def p90_ms(self) -> float | None:
        """None below 100 calls."""
        return self.percentiles_ms.get("p90")

    @property
    def p99_ms(self) -> float | None:
        """None below 1,000 calls."""
        return self.percentiles_ms.get("p99")


class BenchResult(BaseModel, frozen=True, extra="forbid"):
    """Arms measured side by side on equal inputs: one configuration.

    Attributes:
        arms: in the order they were given; the first is what the others are compared with.
        provider: full name.
        provider_options: in force: session options and the provider's own.
        threads: inside one operator; None is onnxruntime's default.
        pinned: cores that the process and onnxruntime's threads were bound to; () where they were not.
        batch: as asked; `inputs` says what was fed.
        inputs: input name -> dtype and shape.
        precision: `stored` (the files as they are) or `float16` (converted for this measurement).
        seed: of inputs, block order and bootstrap.
        seconds: the blocks took so long, warm-up apart.
        stopped: `precise` (every interval within `asked_precision`), `time` (budget spent) or `interrupted`.
        asked_precision: relative half width of the intervals at which measuring ends.
        reached_precision: of the widest one; None with too few blocks to tell.
        partial: interrupted, or too few blocks for a verdict.
        onnxruntime: version.
        method: how the times were taken.
        notes: what a reader must know before trusting them.
    """

    arms: Annotated[tuple[ArmResult, ...], Field(min_length=1)]
    provider: str
    provider_options: dict[str, str] = {}
    threads: int | None
    pinned: tuple[int, ...] = ()
    batch: pydantic.PositiveInt
    inputs: dict[str, str]
    precision: Precision = "stored"
    seed: int
    seconds: float
    stopped: Stopped
    asked_precision: float = 0.02
    reached_precision: float | None = None
    partial: bool
    onnxruntime: str
    method: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The configuration in a few words, such as "batch 8, 2 threads"."""
        parts = [f"batch {self.batch}"]
        if self.threads is not None:
            parts.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        if self.precision != "stored":
            parts.append(self.precision)
        return ", ".join(parts)


class ArmFile(BaseModel, frozen=True, extra="forbid"):
    """One arm as it lies on disk.

    Attributes:
        label: what the arm is called.
        model: the file.
        format: `onnx`, or `ort`: onnxruntime's own format.
        file_bytes: of the file and its external weights.
        sha256: of the file's bytes, then of the external files' in the order of their names.
    """

    label: str
    model: str
    format: Literal["onnx", "ort"]
    file_bytes: int
    sha256: str


class BenchDocument(BaseModel, frozen=True, extra="forbid"):
    """One run of `bench`.

    Attributes:
        schema_version: of this document.
        tool: name and version.
        created: when, UTC, ISO 8601.
        command: that made it, quoted for a shell; "" from Python.
        environment: the machine before the measurement.
        load_after: load averages after it.
        arms: the files, in the order of every cell's arms.
        cells: one a configuration.
        cold_start: one an arm; () where it was not asked for, as in all that follow.
        memory: one an arm.
        bursts: one an arm.
        streams: one an arm and number of streams.
        throughput: one an arm.
        profile: one an arm.
        loadgen: label -> one a scenario.
        accuracy: label -> accuracy on the evaluation data.
        notes: of the whole run; those of a cell are its own.
        partial: interrupted, or a cell is.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: str
    created: datetime.datetime
    command: str
    environment: Environment
    load_after: tuple[float, float, float] | None
    arms: tuple[ArmFile, ...]
    cells: Annotated[tuple[BenchResult, ...], Field(min_length=1)]
    cold_start: tuple[ColdStart, ...] = ()
    memory: tuple[Memory, ...] = ()
    bursts: tuple[Bursts, ...] = ()
    streams: tuple[SessionStreams, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    profile: tuple[Profile, ...] = ()
    loadgen: dict[str, tuple[LoadGenResult, ...]] = {}
    accuracy: dict[str, AccuracyResult] = {}
    notes: tuple[str, ...] = ()
    partial: bool = False


def read_bench(path: str | Path) -> BenchDocument:
    """A document that `bench --json` wrote.

    Raises:
        UsageError: no such file.
        ModelError: a document that this version cannot read, and the first reason.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"no such file: {path}; expected a result of rsi-deploy bench --json")
    try:
        return BenchDocument.model_validate_json(read_document(path))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(
            f"{path} is no bench result of schema version {SCHEMA_VERSION}: {where}: {first['msg']}"
            f"; measure it again with rsi-deploy bench --json"
        ) from error
