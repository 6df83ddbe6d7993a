"""Compare bench documents of several devices: the same models and configurations, one column per device.

Times of different devices are shown side by side and not tested against each other. The verdicts in a column compare
models that were measured together on that device. Configurations match by batch, inputs, precision and requested
threads, models by label. A note says if the files of one label differ.
"""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantResult
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Interval


class Device(BaseModel, frozen=True, extra="forbid"):
    """The device of one document.

    Attributes:
        name: name of the column: that of the file, with its folder if two files have the same name.
        cpu: name of the processor.
        cores: number of cores that the process could use.
        gpus: names of the GPUs.
        providers: full names of the providers, in the order of the cells.
        onnxruntime: version of onnxruntime.
        created: time of creation, ISO 8601.
        partial: whether the run was interrupted.
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
    """The times of one model on one device; `verdict` compares it with the first model there."""

    median_ms: float
    median_interval_ms: Interval
    speedup: float | None
    speedup_interval: Interval | None
    verdict: str


class TimingRow(BaseModel, frozen=True, extra="forbid"):
    """The times of one model in one configuration on every device; None for devices without a measurement."""

    configuration: str
    arm: str
    timings: tuple[DeviceTiming | None, ...]


class FigureRow(BaseModel, frozen=True, extra="forbid"):
    """One figure of a model on every device, such as top-1 in percent; None for devices without a measurement."""

    figure: str
    unit: str
    arm: str
    values: tuple[float | None, ...]


class DeviceComparison(BaseModel, frozen=True, extra="forbid"):
    """The comparison of devices; every row has one entry per device, in their order."""

    devices: tuple[Device, ...]
    timings: tuple[TimingRow, ...]
    figures: tuple[FigureRow, ...]
    notes: tuple[str, ...]


def compare_documents(documents: Mapping[str, BenchDocument]) -> DeviceComparison:
    """Compare the results of several devices.

    Args:
        documents: device -> document, in the order of the columns.

    Raises:
        UsageError: fewer than two documents, or no common model and configuration.
    """
    if len(documents) < 2:
        raise UsageError(f"--compare takes two results or more, but got {', '.join(documents) or 'none'}")
    columns = list(documents.values())
    rows = list(
        dict.fromkeys(
            (_key(cell), variant.label) for document in columns for cell in document.cells for variant in cell.arms
        )
    )
    found = [[_timing(document, key, variant) for document in columns] for key, variant in rows]
    if not any(sum(timing is not None for timing in row) > 1 for row in found):
        contents = "; ".join(f"{name}: {_described(document)}" for name, document in documents.items())
        raise UsageError(
            f"--compare: the results have no model and configuration in common ({contents})"
            f"; measure them with the same options"
        )
    names = {_key(cell): cell.name for document in columns for cell in document.cells}
    ambiguous = len(set(names.values())) < len(names)
    return DeviceComparison(
        devices=tuple(_device(name, document) for name, document in documents.items()),
        timings=tuple(
            TimingRow(configuration=names[key] + f" ({_inputs(key)})" * ambiguous, arm=variant, timings=tuple(row))
            for (key, variant), row in zip(rows, found, strict=True)
        ),
        figures=tuple(_figures(columns)),
        notes=tuple(_notes(documents)),
    )


def device_names(paths: Sequence[str]) -> list[str]:
    """Return short names of result files: their stems, or their paths if two stems are equal.

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
    variant: VariantResult | None = next(
        (variant for cell in document.cells if _key(cell) == key for variant in cell.arms if variant.label == label),
        None,
    )
    if variant is None:
        return None
    return DeviceTiming(
        median_ms=variant.median_ms,
        median_interval_ms=variant.median_interval_ms,
        speedup=variant.speedup,
        speedup_interval=variant.speedup_interval,
        verdict=variant.verdict,
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
    """Return accuracy, file size and peak memory, if any device has them."""
    labels = list(dict.fromkeys(variant.label for document in columns for variant in document.arms))
    rows = []
    for label in labels:
        accuracies = [document.accuracy.get(label) for document in columns]
        sizes = [next((variant.file_bytes for variant in d.arms if variant.label == label), None) for d in columns]
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
    for label in dict.fromkeys(variant.label for document in columns for variant in document.arms):
        if len({variant.sha256 for document in columns for variant in document.arms if variant.label == label}) > 1:
            notes.append(f"{label} is not the same file everywhere")
    versions = {name: _device(name, document).onnxruntime for name, document in documents.items()}
    if len(set(versions.values())) > 1:
        notes.append(f"onnxruntime differs: {', '.join(f'{name} {v}' for name, v in versions.items())}")
    if len({found.data_fingerprint for d in columns for found in d.accuracy.values()}) > 1:
        notes.append("the evaluation data differ: accuracies do not compare")
    for name, document in documents.items():
        if document.partial or any(cell.partial for cell in document.cells):
            notes.append(f"{name} was interrupted: its intervals are rough")
        load = document.environment.load_average
        if load is not None and load[0] > document.environment.cores:
            notes.append(
                f"{name} was busy while it measured (load {load[0]:.1f} on {document.environment.cores} cores)"
            )
    return notes


def _described(document: BenchDocument) -> str:
    return (
        f"{', '.join(variant.label for variant in document.arms)} at {', '.join(cell.name for cell in document.cells)}"
    )
