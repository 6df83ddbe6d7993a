"""The document of a sweep, and the delivery of one of its points.

DIR/sweep.json     the settings and every point: size, MACs, time, accuracy
DIR/report.html    a page of the same results
DIR/point-NN/      the bundle of a point
"""

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.types import Interval
from rsi_deploy.io.bundle import atomic_folder
from rsi_deploy.io.manifest import check_inner_name, file_hash
from rsi_deploy.report.json_files import read_json
from rsi_deploy.report.schema import Report, read_report
from rsi_deploy.runtime.machine import Environment

By = Literal["macs", "params", "latency", "size"]


class SweepPoint(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A point of a sweep: the model at one size. Or a rival: the dense model as onnxruntime's own tools quantize it.

    Attributes:
        number: number of the point, from 1; 0 for a rival.
        share: requested share of the dense model; for a rival that of its bytes.
        folder: folder of its bundle; "" for a rival, and if no plan reaches the share.
        precision: name of the model among those that were compared; "" if ranks alone were planned.
        problem: reason why there is no bundle, or "".
        size: size of the model.
        latency_ms: median time of a call, if it was measured.
        speedup: speedup over the dense model in the same run.
        speedup_interval: its 99 % interval.
        top1: top-1 accuracy on the evaluation data in percent, or None.
        agreement: equal top-1 answers on the check part in percent; None if outputs are not class scores.
        cosine: mean cosine of the outputs on the check part; None if they are not embeddings.
        output_error: relative squared distance of the outputs on the check part.
        in_sample: the first of these three that is not None, on samples of the fit part.
        is_broken: whether the outputs are broken, as `OutputQuality.is_broken` says.
        splits: number of split sites.
        seconds: wall time of the point.
    """

    number: int
    share: float
    folder: Annotated[str, pydantic.AfterValidator(lambda name: name and check_inner_name(name))] = ""
    precision: str = ""
    problem: str = ""
    size: Size | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None
    top1: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    output_error: float | None = None
    in_sample: float | None = None
    is_broken: bool = False
    splits: int = 0
    seconds: float = 0.0

    @property
    def quality(self) -> float | None:
        """Top-1, else agreement, else cosine, else the negative output error; more is better."""
        for value in (self.top1, self.agreement, self.cosine):
            if value is not None:
                return value
        return None if self.output_error is None else -self.output_error


class Sweep(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The document of a sweep.

    Attributes:
        schema_version: version of this schema.
        tool: name and version of the tool.
        created: time of the sweep: UTC, ISO 8601.
        command: command of the sweep.
        recipe: the request as recipe.toml holds it; `rsi-deploy sweep --recipe` makes the sweep again.
        model: model as the user typed it.
        source_hash: hash of the dense model file.
        settings: all other settings as one text; a sweep continues only with the same settings.
        by: quantity of which the shares are.
        shares: requested shares, one for each point.
        dense: size of the dense model.
        dense_top1: top-1 accuracy of the dense model on the evaluation data in percent.
        points: finished points, in order.
        rivals: the dense model in each of onnxruntime's own precisions, if the points have a precision.
        side_by_side: whether all times were measured in one run; else each point was measured when it was made.
        environment: machine and versions.
        notes: notes that the reports of all points have.
    """

    schema_version: Literal[1] = 1
    tool: str
    created: str
    command: str
    recipe: str = ""
    model: str
    source_hash: str
    settings: str
    by: By
    shares: Annotated[tuple[float, ...], pydantic.Field(min_length=1)]
    dense: Size | None = None
    dense_top1: float | None = None
    points: tuple[SweepPoint, ...] = ()
    rivals: tuple[SweepPoint, ...] = ()
    side_by_side: bool = False
    environment: Environment
    notes: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Return whether every point was tried."""
        return len(self.points) == len(self.shares)

    @property
    def shown(self) -> list[SweepPoint]:
        """The points, and the rivals that no point delivers: each model once."""
        delivered = {point.precision for point in self.points}
        return [*self.points, *(rival for rival in self.rivals if rival.precision not in delivered)]

    @property
    def comparable(self) -> list[SweepPoint]:
        """Points and rivals whose qualities measure the same: with evaluation data, those that have a top-1."""
        return [point for point in self.shown if self.dense_top1 is None or point.top1 is not None]

    def is_rival(self, point: SweepPoint) -> bool:
        """Return whether a point is a rival, or delivers one."""
        return point.precision in {rival.precision for rival in self.rivals}

    def front(self, cost: Literal["time", "bytes", "macs"]) -> list[SweepPoint]:
        """Return the points, rivals included, that no other beats in quality and cost, cheapest first."""
        found = [(price, p) for p in self.comparable if (price := _price(p, cost)) is not None]
        front, best = [], float("-inf")
        for _, point in sorted(found, key=lambda pair: (pair[0], -(pair[1].quality or 0.0), pair[1].number)):
            if (quality := point.quality or 0.0) > best:
                front.append(point)
                best = quality
        return front


def point_of(number: int, share: float, folder: str, report: Report, seconds: float) -> SweepPoint:
    """Return the point of a sweep for a bundle."""
    quality = None if report.calibration is None else report.calibration.quality
    return SweepPoint(
        number=number,
        share=share,
        folder=folder,
        precision="" if report.precision is None else report.precision.delivered.name,
        size=report.compressed,
        **({} if report.latency is None else times_of(report.latency.arms[1])),
        top1=None if report.accuracy is None else report.accuracy.compressed.top1,
        **_qualities(quality),
        in_sample=None if report.calibration is None else report.calibration.in_sample.value,
        splits=len(report.split_sites),
        seconds=seconds,
    )


def rivals_of(report: Report) -> tuple[SweepPoint, ...]:
    """Return the rivals that a bundle's model was compared with."""
    found = () if report.precision is None else report.precision.points[1:]  # the first one is the dense model
    return tuple(
        SweepPoint(
            number=0,
            share=rival.bytes / report.dense.bytes,
            precision=rival.name,
            size=report.dense.model_copy(update={"bytes": rival.bytes}),
            speedup=rival.speedup,
            speedup_interval=rival.speedup_interval,
            **_qualities(rival.quality),
        )
        for rival in found
        if rival.is_rival and rival.bytes is not None
    )


def times_of(arm: VariantResult) -> dict[str, Any]:
    """Return the times of a point that was measured beside the dense model, as fields of `SweepPoint`."""
    return {"latency_ms": arm.median_ms, "speedup": arm.speedup, "speedup_interval": arm.speedup_interval}


def _qualities(quality: OutputQuality | None) -> dict[str, Any]:
    if quality is None:
        return {}
    names = ("agreement", "cosine", "output_error", "is_broken")
    return {name: getattr(quality, name) for name in names}


def read_sweep(folder: str | Path) -> Sweep:
    """Return the document of the sweep in `folder`.

    Raises:
        UsageError: `folder` is no sweep.
        ModelError: this version cannot read the document.
    """
    path = Path(folder) / "sweep.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} is no sweep: it has no sweep.json; make one with rsi-deploy sweep MODEL -o {folder}"
        )
    return read_json(path, Sweep, "sweep of schema version 1")


def deliver(folder: str | Path, number: int, output: str | Path, *, force: bool = False) -> Report:
    """Copy the bundle of a point of a sweep to `output`.

    Raises:
        UsageError: the point does not exist or has no model, or `output` exists.
        ModelError: the files of the point are not those of its report.
    """
    document = read_sweep(folder)
    known = {point.number: point for point in document.points}
    if number not in known:
        numbers = ", ".join(map(str, known)) or "none yet"
        raise UsageError(f"--point {number}: the sweep in {folder} has points {numbers}; choose one of them")
    if known[number].problem:
        raise UsageError(f"--point {number}: there is no such model: {known[number].problem}; choose another point")
    source = Path(folder) / known[number].folder
    report = read_report(source)
    for name, digest in report.files.items():
        if not (source / name).is_file() or file_hash(source / name) != digest:
            raise ModelError(f"{source / name} does not have the hash in its report; run the sweep again")
    if links := [path for path in source.rglob("*") if path.is_symlink()]:
        raise ModelError(f"{links[0]} is a link, which no sweep writes; run the sweep again, or copy the file itself")
    with atomic_folder(Path(output), force=force, inputs=(source,)) as target:
        shutil.copytree(source, target, dirs_exist_ok=True)
    return report


def _price(point: SweepPoint, cost: Literal["time", "bytes", "macs"]) -> float | None:
    if point.size is None or point.quality is None:
        return None
    if cost == "time":
        return None if point.speedup is None else 1 / point.speedup
    return float(point.size.bytes if cost == "bytes" else point.size.macs)
