"""All points of a sweep are measured in one run with the dense model, in turn.

Times of different minutes cannot be compared: the load of the machine changes. Models that do not fit into memory
together keep the times of their own runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rsi_deploy.benchmark.latency import bench
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.report.schema import read_report
from rsi_deploy.report.sweep_schema import Sweep, SweepPoint, times_of
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.shapes import input_shapes, unsettled_inputs
from rsi_deploy.runtime.machine import free_memory

MEMORY_SHARE = 0.4
"""Largest share of the free memory for the files of the models; a session holds about as much again."""


def side_by_side(document: Sweep, folder: Path, dense: Path, rivals: Mapping[str, Path], config: ExportConfig) -> Sweep:
    """Return the sweep with times of one run and `side_by_side` set, or unchanged where that cannot be measured.

    Args:
        document: of a sweep whose points were all tried.
        folder: of the sweep.
        dense: the dense model.
        rivals: name -> file of a rival.
        config: settings of the points' exports.
    """
    made = [point for point in document.points if point.folder]
    models = {point.folder: folder / point.folder / "model.onnx" for point in made} | dict(rivals)
    files = list(models.values())
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
            labels=["dense", *models],
        )
    except ModelError:
        return document
    arms = dict(zip(models, result.arms[1:], strict=True))

    def timed(point: SweepPoint, label: str) -> SweepPoint:
        arm = arms.get(label)
        return point if arm is None else point.model_copy(update=times_of(arm))

    points = tuple(timed(point, point.folder) for point in document.points)
    others = tuple(timed(rival, rival.precision) for rival in document.rivals)
    return document.model_copy(update={"points": points, "rivals": others, "side_by_side": True})


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
