"""The document of `bench`, which `bench --json` writes and `--compare` and the page read.

    BenchDocument       one run of the command
      arms              one VariantFile per model
      cells             one BenchResult per configuration (batch, shapes, threads, precision...)
        arms            one VariantResult per model
      cold_start, ...   the requested separate measurements

`export` embeds one BenchResult in its report.
"""

import datetime
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, Field

from rsi_deploy.benchmark.mlperf.loadgen import LoadGenResult
from rsi_deploy.benchmark.sections import Bursts, ColdStart, Generation, Memory, Profile, SessionStreams, Throughput
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Interval
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.io.documents import read_document
from rsi_deploy.runtime.machine import Environment

SCHEMA_VERSION: Literal[1] = 1

Stopped = Literal["precise", "time", "interrupted"]
Precision = Literal["stored", "float16"]
Phase = Literal["call", "first token", "next token"]


class VariantResult(BaseModel, frozen=True, extra="forbid"):
    """The times of one model in one configuration.

    Attributes:
        label: label of the model.
        model: path of the file.
        n: number of timed calls in all blocks.
        blocks: number of blocks.
        median_ms: median over the blocks of the median of each block.
        median_interval_ms: its 95 % bootstrap interval.
        percentiles_ms: "p50", "p90", "p99", "p99.9" of all timed calls, if at least ten calls lie beyond them.
        quantiles_ms: the 0 %, 1 % ... 100 % quantiles of all timed calls.
        warmup_calls: number of untimed calls before the first block.
        warm: whether the times had settled by then.
        provider_nodes: provider -> number of nodes that it executed, from a profiled run.
        memcpy_nodes: number of copies between device and host among those nodes.
        speedup: median of the first model over this median; None for the first model.
        speedup_interval: its 99 % interval over paired blocks.
        verdict: comparison with the first model in words.
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
        """The 90th percentile; None below 100 calls."""
        return self.percentiles_ms.get("p90")

    @property
    def p99_ms(self) -> float | None:
        """The 99th percentile; None below 1,000 calls."""
        return self.percentiles_ms.get("p99")


class BenchResult(BaseModel, frozen=True, extra="forbid"):
    """The times of models that were measured side by side on equal inputs, in one configuration.

    Attributes:
        arms: results of the models in order; the others are compared with the first.
        provider: full name of the execution provider.
        provider_options: session options and options of the provider.
        threads: threads inside one operator; None for onnxruntime's default.
        pinned: cores that the process and onnxruntime's threads were pinned to; () for none.
        batch: requested batch; `inputs` has the shapes that were used.
        inputs: input name -> dtype and shape.
        precision: `stored` (the files unchanged) or `float16` (converted for this measurement).
        seed: random seed for inputs, block order and bootstrap.
        seconds: duration of the blocks without warm-up.
        stopped: `precise` (every interval within `asked_precision`), `time` (out of time) or `interrupted`.
        asked_precision: requested relative half width of the intervals.
        reached_precision: relative half width of the widest interval; None with too few blocks.
        partial: whether the measurement was interrupted or has too few blocks for a verdict.
        phase: what is timed: a `call` of the model; or of a generation, the `first token` with its prompt, or each
            `next token`.
        onnxruntime: version of onnxruntime.
        method: description of the measurement.
        notes: notes for users.
    """

    arms: Annotated[tuple[VariantResult, ...], Field(min_length=1)]
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
    phase: Phase = "call"
    onnxruntime: str
    method: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the configuration, such as "batch 8, 2 threads"."""
        parts = [f"batch {self.batch}" if self.phase == "call" else self.phase]
        if self.threads is not None:
            parts.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        if self.precision != "stored":
            parts.append(self.precision)
        return ", ".join(parts)


class VariantFile(BaseModel, frozen=True, extra="forbid"):
    """The file of one model.

    Attributes:
        label: label of the model.
        model: path of the file.
        format: `onnx`, or `ort` for onnxruntime's own format.
        file_bytes: bytes of the file and its external weights.
        sha256: sha256 of the file and its external files in the order of their names.
    """

    label: str
    model: str
    format: Literal["onnx", "ort"]
    file_bytes: int
    sha256: str


class BenchDocument(BaseModel, frozen=True, extra="forbid"):
    """One run of `bench`.

    Attributes:
        schema_version: version of the file format.
        tool: name and version of the program.
        created: time of creation, UTC, ISO 8601.
        command: command line, quoted for a shell; "" from Python.
        environment: the machine before the measurement.
        load_after: load averages after the measurement.
        arms: files of the models, in the order of every cell's arms.
        cells: results by configuration.
        cold_start: cold starts by model; () if not requested, as for the following fields.
        memory: memory by model.
        generation: speed of generating text by model.
        bursts: bursts by model.
        streams: streams by model and number of streams.
        throughput: throughput by model.
        profile: profiles by model.
        loadgen: label -> results by scenario.
        accuracy: label -> accuracy on the evaluation data.
        notes: notes on the whole run; cells have their own.
        partial: whether the run or one of its cells was interrupted.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: str
    created: datetime.datetime
    command: str
    environment: Environment
    load_after: tuple[float, float, float] | None
    arms: tuple[VariantFile, ...]
    cells: Annotated[tuple[BenchResult, ...], Field(min_length=1)]
    cold_start: tuple[ColdStart, ...] = ()
    memory: tuple[Memory, ...] = ()
    generation: tuple[Generation, ...] = ()
    bursts: tuple[Bursts, ...] = ()
    streams: tuple[SessionStreams, ...] = ()
    throughput: tuple[Throughput, ...] = ()
    profile: tuple[Profile, ...] = ()
    loadgen: dict[str, tuple[LoadGenResult, ...]] = {}
    accuracy: dict[str, AccuracyResult] = {}
    notes: tuple[str, ...] = ()
    partial: bool = False


def read_bench(path: str | Path) -> BenchDocument:
    """Read a document that `bench --json` wrote.

    Raises:
        UsageError: there is no such file.
        ModelError: this version cannot read the document; the message gives the first reason.
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
