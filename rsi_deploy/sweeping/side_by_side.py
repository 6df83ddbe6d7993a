"""All points of a sweep are measured in one run with the dense model, in turn.

Times of different minutes cannot be compared: the load of the machine changes. Models that do not fit into memory
together keep the times of their own runs.
"""

from collections.abc import Sequence
from pathlib import Path

from rsi_deploy.benchmark.latency import bench
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.report.schema import read_report
from rsi_deploy.report.sweep_schema import Sweep
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.shapes import input_shapes, unsettled_inputs
from rsi_deploy.runtime.machine import free_memory

MEMORY_SHARE = 0.4
"""Largest share of the free memory for the files of the models; a session holds about as much again."""


def side_by_side(document: Sweep, folder: Path, dense: Path, config: ExportConfig) -> Sweep:
    """Return the sweep with times of one run and `side_by_side` set, or unchanged where that cannot be measured.

    Args:
        document: of a sweep whose points were all tried.
        folder: of the sweep.
        dense: the dense model.
        config: settings of the points' exports.
    """
    made = [point for point in document.points if point.folder]
    files = [folder / point.folder / "model.onnx" for point in made]
    if not made or not _fit([dense, *files]):
        return document
    try:
        result = bench(
            [dense, *files],
            batch=config.bench_batch,
            input_shape=_shapes(folder / made[0].folder, dense, config),
            provider=config.provider,
            threads=config.threads,
            seconds=config.bench_seconds * (len(files) + 1) / 2,
            seed=config.seed,
            labels=["dense", *(point.folder for point in made)],
        )
    except ModelError:
        return document
    arms = dict(zip((point.number for point in made), result.arms[1:], strict=True))
    points = tuple(
        point
        if (arm := arms.get(point.number)) is None
        else point.model_copy(
            update={
                "latency_ms": arm.median_ms,
                "speedup": arm.speedup,
                "speedup_interval": arm.speedup_interval,
            }
        )
        for point in document.points
    )
    return document.model_copy(update={"points": points, "side_by_side": True})


def _shapes(point: Path, dense: Path, config: ExportConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the settings; open ones are those of the data that the points were made with."""
    specs = model_inputs(dense)
    _, typed = input_shapes(config.input_shape)
    if not unsettled_inputs(specs, typed):
        return typed
    axes = BatchAxes.of({spec.name: spec.shape for spec in specs})
    return {**axes.with_batch(read_report(point).probe_shapes, axes.fixed or config.bench_batch), **typed}


def _fit(files: Sequence[Path]) -> bool:
    return sum(map(file_bytes, files)) < MEMORY_SHARE * free_memory()
