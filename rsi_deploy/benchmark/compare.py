"""Bench documents of several devices side by side: the same models and configurations, one column a device.

Times of different devices are laid side by side and never tested against each other: each column's verdict is about the
arms that were measured together there. Configurations match by batch, inputs, precision and threads as asked; models by
label, and where the files under one label differ, that is said.
"""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from rsi_deploy.benchmark.result import ArmResult, BenchDocument, BenchResult
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Interval


class Device(BaseModel, frozen=True, extra="forbid"):
    """Where one document was measured.

    Attributes:
        name: of its column: the file's, or with its folder where two have the same.
        cpu: the processor.
        cores: that the process could use.
        gpus: names.
        providers: full names, in the order of the cells.
        onnxruntime: version.
        created: when, ISO 8601.
        partial: whether the run was cut short.
    """

    name: str
    cpu: str
    cores: int
    gpus: tuple[str, ...]
    providers: tuple[str, ...]
    onnxruntime: str
    created: str
    partial: bool


class DeviceTiming(BaseModel, frozen=True, extra="forbid"):
    """An arm on one device; `verdict` compares it with the first arm there."""

    median_ms: float
    median_interval_ms: Interval
    speedup: float | None
    speedup_interval: Interval | None
    verdict: str


class TimingRow(BaseModel, frozen=True, extra="forbid"):
    """One arm in one configuration, a `DeviceTiming` a device; None where it was not measured there."""

    configuration: str
    arm: str
    timings: tuple[DeviceTiming | None, ...]


class FigureRow(BaseModel, frozen=True, extra="forbid"):
    """One figure of an arm on every device: top-1 in percent, bytes; None where it was not measured there."""

    figure: str
    unit: str
    arm: str
    values: tuple[float | None, ...]


class DeviceComparison(BaseModel, frozen=True, extra="forbid"):
    """Devices side by side; every row has one entry a device, in their order."""

    devices: tuple[Device, ...]
    timings: tuple[TimingRow, ...]
    figures: tuple[FigureRow, ...]
    notes: tuple[str, ...]


def compare_documents(documents: Mapping[str, BenchDocument]) -> DeviceComparison:
    """Lay results side by side.

    Args:
        documents: device -> its document, in the order of the columns.

    Raises:
        UsageError: fewer than two, or two without a model and a configuration in common.
    """
    if len(documents) < 2:
        raise UsageError(f"--compare takes two results or more, but got {', '.join(documents) or 'none'}")
    columns = list(documents.values())
    rows = list(
        dict.fromkeys((_key(cell), arm.label) for document in columns for cell in document.cells for arm in cell.arms)
    )
    found = [[_timing(document, key, arm) for document in columns] for key, arm in rows]
    if not any(sum(timing is not None for timing in row) > 1 for row in found):
        there = "; ".join(f"{name}: {_told(document)}" for name, document in documents.items())
        raise UsageError(
            f"--compare: the results have no model and configuration in common ({there})"
            f"; measure them with the same options"
        )
    names = {_key(cell): cell.name for document in columns for cell in document.cells}
    ambiguous = len(set(names.values())) < len(names)
    return DeviceComparison(
        devices=tuple(_device(name, document) for name, document in documents.items()),
        timings=tuple(
            TimingRow(configuration=names[key] + f" ({_inputs(key)})" * ambiguous, arm=arm, timings=tuple(row))
            for (key, arm), row in zip(rows, found, strict=True)
        ),
        figures=tuple(_figures(columns)),
        notes=tuple(_notes(documents)),
    )


def device_names(paths: Sequence[str]) -> list[str]:
    """Short names of result files: their stems, or the paths where two would be the same.

    Example:
        >>> device_names(["pi/a.json", "b.json"]), device_names(["pi/a.json", "nx/a.json"])
        (['a', 'b'], ['pi/a.json', 'nx/a.json'])
    """
    stems = [path.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".json") for path in paths]
    return stems if len(set(stems)) == len(stems) else list(paths)


def _key(cell: BenchResult) -> tuple[object, ...]:
    return cell.batch, tuple(sorted(cell.inputs.items())), cell.precision, cell.threads


def _inputs(key: tuple[object, ...]) -> str:
    pairs = key[1]
    assert isinstance(pairs, tuple)
    return ", ".join(f"{name} {text}" for name, text in pairs)


def _timing(document: BenchDocument, key: tuple[object, ...], label: str) -> DeviceTiming | None:
    arm: ArmResult | None = next(
        (arm for cell in document.cells if _key(cell) == key for arm in cell.arms if arm.label == label), None
    )
    if arm is None:
        return None
    return DeviceTiming(
        median_ms=arm.median_ms,
        median_interval_ms=arm.median_interval_ms,
        speedup=arm.speedup,
        speedup_interval=arm.speedup_interval,
        verdict=arm.verdict,
    )


def _device(name: str, document: BenchDocument) -> Device:
    return Device(
        name=name,
        cpu=document.environment.cpu,
        cores=document.environment.cores,
        gpus=document.environment.gpus,
        providers=tuple(dict.fromkeys(cell.provider for cell in document.cells)),
        onnxruntime=next((cell.onnxruntime for cell in document.cells), ""),
        created=document.created.isoformat(timespec="seconds"),
        partial=document.partial,
    )


def _figures(columns: Sequence[BenchDocument]) -> list[FigureRow]:
    """Accuracy, file size and peak memory, where any device has them."""
    labels = list(dict.fromkeys(arm.label for document in columns for arm in document.arms))
    rows = []
    for label in labels:
        accuracies = [document.accuracy.get(label) for document in columns]
        sizes = [next((arm.file_bytes for arm in d.arms if arm.label == label), None) for d in columns]
        peaks = [next((memory.peak_bytes for memory in d.memory if memory.label == label), None) for d in columns]
        rows += [
            FigureRow(figure=figure, unit=unit, arm=label, values=tuple(values))
            for figure, unit, values in (
                ("top-1", "%", [None if found is None else found.top1 for found in accuracies]),
                ("agreement", "%", [None if found is None else found.agreement for found in accuracies]),
                ("file", "bytes", sizes),
                ("peak memory", "bytes", peaks),
            )
            if any(value is not None for value in values)
        ]
    return sorted(rows, key=lambda row: ("top-1", "agreement", "file", "peak memory").index(row.figure))


def _notes(documents: Mapping[str, BenchDocument]) -> list[str]:
    notes = []
    columns = list(documents.values())
    for label in dict.fromkeys(arm.label for document in columns for arm in document.arms):
        if len({arm.sha256 for document in columns for arm in document.arms if arm.label == label}) > 1:
            notes.append(f"{label} is not the same file everywhere")
    versions = {name: _device(name, document).onnxruntime for name, document in documents.items()}
    if len(set(versions.values())) > 1:
        notes.append(f"onnxruntime differs: {', '.join(f'{name} {v}' for name, v in versions.items())}")
    if len({found.data_fingerprint for d in columns for found in d.accuracy.values()}) > 1:
        notes.append("the evaluation data differ: accuracies do not compare")
    for name, document in documents.items():
        if document.partial or any(cell.partial for cell in document.cells):
            notes.append(f"{name} was cut short: its intervals are rough")
        load = document.environment.load_average
        if load is not None and load[0] > document.environment.cores:
            notes.append(
                f"{name} was busy while it measured (load {load[0]:.1f} on {document.environment.cores} cores)"
            )
    return notes


def _told(document: BenchDocument) -> str:
    return f"{', '.join(arm.label for arm in document.arms)} at {', '.join(cell.name for cell in document.cells)}"
