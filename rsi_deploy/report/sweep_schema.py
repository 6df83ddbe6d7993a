"""The document of a sweep, and one of its points delivered.

DIR/sweep.json     what was asked, and every point: size, MACs, time, accuracy
DIR/report.html    the same to look at
DIR/point-NN/      the bundle of a point, whole
"""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import pydantic

from rsi_deploy.benchmark.statistics import Interval
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.io.bundle import atomic_folder
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.manifest import check_inner_name, file_hash
from rsi_deploy.report.schema import Report, read_report
from rsi_deploy.runtime.machine import Environment

By = Literal["macs", "params", "latency"]


class SweepPoint(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One point.

    Attributes:
        number: from 1.
        share: of the dense model, that was asked for.
        folder: of its bundle; "" where no plan reaches the share.
        problem: why there is no bundle; "" where there is one.
        size: of the model.
        latency_ms: a call's median, where it was measured.
        speedup: over the dense model beside it.
        speedup_interval: 99 %.
        top1: on the evaluation data, percent; None without.
        agreement: equal top-1 answers on the calibration data, percent; None where outputs are no class scores.
        output_error: squared distance of the outputs on the calibration data, relative.
        splits: sites that are split.
        seconds: that it took.
    """

    number: int
    share: float
    folder: Annotated[str, pydantic.AfterValidator(lambda name: name and check_inner_name(name))] = ""
    problem: str = ""
    size: Size | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None
    top1: float | None = None
    agreement: float | None = None
    output_error: float | None = None
    splits: int = 0
    seconds: float = 0.0

    @property
    def quality(self) -> float | None:
        """What a front is of, more is better: top-1, else agreement, else the output error with its sign turned."""
        if self.top1 is not None:
            return self.top1
        if self.agreement is not None:
            return self.agreement
        return None if self.output_error is None else -self.output_error


class Sweep(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A sweep.

    Attributes:
        schema_version: of this document.
        tool: name and version.
        created: UTC, ISO 8601.
        command: command line that made it.
        recipe: the request as recipe.toml holds it; `rsi-deploy sweep --recipe` makes the sweep again.
        model: as typed.
        source_hash: of the dense model file.
        settings: what points depend on besides their share, in one text; a sweep resumes only with the same.
        by: what the shares are of.
        shares: of all the points.
        dense: size of the dense model.
        dense_top1: on the evaluation data, percent.
        points: those that are done, in order.
        side_by_side: whether their times are of one run; else each is of its own, when it was made.
        environment: machine and versions.
        notes: those that all points' reports have.
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
    side_by_side: bool = False
    environment: Environment
    notes: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether every point was tried."""
        return len(self.points) == len(self.shares)

    def front(self, cost: Literal["time", "bytes", "macs"]) -> list[int]:
        """Numbers of the points that no other beats in quality and cost, from the cheapest on."""
        found = [(price, -(p.quality or 0.0), p.number) for p in self.points if (price := _price(p, cost)) is not None]
        front, best = [], float("inf")
        for _, loss, number in sorted(found):
            if loss < best:
                front.append(number)
                best = loss
        return front


def point_of(number: int, share: float, folder: str, report: Report, seconds: float) -> SweepPoint:
    """The point that a bundle is."""
    arm = None if report.latency is None else report.latency.arms[1]
    certified = report.calibration
    return SweepPoint(
        number=number,
        share=share,
        folder=folder,
        size=report.compressed,
        latency_ms=None if arm is None else arm.median_ms,
        speedup=None if arm is None else arm.speedup,
        speedup_interval=None if arm is None else arm.speedup_interval,
        top1=None if report.accuracy is None else report.accuracy.compressed.top1,
        agreement=None if certified is None else certified.agreement,
        output_error=None if certified is None else certified.output_error,
        splits=len(report.split_sites),
        seconds=seconds,
    )


def read_sweep(folder: str | Path) -> Sweep:
    """The document of the sweep in `folder`.

    Raises:
        UsageError: no sweep there.
        ModelError: one that this version cannot read.
    """
    path = Path(folder) / "sweep.json"
    if not path.is_file():
        raise UsageError(
            f"{folder} is no sweep: it has no sweep.json; make one with rsi-deploy sweep MODEL -o {folder}"
        )
    try:
        return Sweep.model_validate_json(read_document(path))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(
            f"{path} is no sweep of schema version 1: {where}: {first['msg']}; make it again with rsi-deploy sweep"
        ) from error


def deliver(folder: str | Path, number: int, output: str | Path, *, force: bool = False) -> Report:
    """Copy the bundle of a point of a sweep to `output`, whole.

    Raises:
        UsageError: no such point, one that no plan reached, or a target that is there.
        ModelError: the point's model is not what its report says.
    """
    document = read_sweep(folder)
    known = {point.number: point for point in document.points}
    if number not in known:
        there = ", ".join(map(str, known)) or "none yet"
        raise UsageError(f"--point {number}: the sweep in {folder} has points {there}; choose one of them")
    if known[number].problem:
        raise UsageError(f"--point {number}: there is no such model: {known[number].problem}; choose another point")
    source = Path(folder) / known[number].folder
    report = read_report(source)
    for name, digest in report.files.items():
        if not (source / name).is_file() or file_hash(source / name) != digest:
            raise ModelError(f"{source / name} is not the file that its report speaks of; run the sweep again")
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
