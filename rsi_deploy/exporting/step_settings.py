"""The settings that the steps of one export share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnx import ModelProto

from rsi_deploy.benchmark.latency import BenchResult, bench
from rsi_deploy.benchmark.variants import make_feeds
from rsi_deploy.calibration.calibration_data import example_shapes
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.execution.executor import Executor, LocalExecutor
from rsi_deploy.execution.ray_executor import ray_executor
from rsi_deploy.execution.result_store import ResultStore, StoringExecutor
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.probe import probe_feeds
from rsi_deploy.runtime.feeds.shapes import unsettled_inputs

Progress = Callable[[str, int, int], None]
Shapes = Mapping[str, tuple[int, ...]]


class Probe(NamedTuple):
    """Probe inputs, and the shapes with one sample that the data have where the model leaves its own open."""

    feeds: Feeds
    examples: Shapes


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings that the steps of one export share.

    Attributes:
        settings: the settings that shape model.onnx; the report stores them.
        solver: computes factors.
        device: where factors are computed.
        provider: onnxruntime provider.
        progress: called with (site, index, count) before each factorization.
        shapes: input name -> shape that the user chose.
        own_feeds: arrays of the user by input name, in place of random probe inputs; None draws random ones.
        assume_constant: treat weights that are graph inputs too as constants.
        requantize: turn the weights of a quantized ONNX file into float weights first.
        sources: option -> data; the first one gives the input shapes that the model leaves open.
        ray: address of a Ray cluster whose workers factorize; None factorizes in this process.
    """

    settings: ExportSettings
    solver: Solver
    device: torch.device
    provider: str
    progress: Progress | None
    shapes: Mapping[str, Sequence[int]]
    own_feeds: Feeds | None
    assume_constant: bool
    requantize: bool
    sources: Mapping[str, Any] = field(default_factory=dict)
    ray: str | None = None

    def probe(self, path: Path, proto: ModelProto, preprocessing: Preprocessing | None) -> Probe:
        """Make the probe inputs of the dense model: `proto`, parsed from `path`.

        Raises:
            UsageError, ModelError: as for `probe_feeds`.
        """
        inputs = model_inputs(proto, path.name)
        settled = self.own_feeds is not None or not unsettled_inputs(inputs, self.shapes)
        examples = {} if settled else example_shapes(self.sources, inputs, preprocessing)
        return Probe(probe_feeds(path, self.settings.seed, self.shapes, self.own_feeds, examples, inputs), examples)

    @contextmanager
    def executor(self, store: ResultStore | None, notes: list[str]) -> Iterator[Executor]:
        """Provide what factorizes; workers are released at the end, so that nothing is measured beside them.

        Args:
            store: results of an interrupted run; None without any.
            notes: list that receives notes for the report.
        """
        if self.ray is None:
            executor: Executor = LocalExecutor()
            yield executor if store is None else StoringExecutor(executor, store)
            return
        with ray_executor(self.ray, notes) as executor:
            yield executor if store is None else StoringExecutor(executor, store)

    def timing_feeds(self, dense: DenseModel, batch: int) -> dict[str, Array]:
        """Make the inputs that models are timed with: the user's own, or `batch` random samples."""
        fixed = self._fixed_feeds(dense)
        shapes = None if fixed else _timing_shapes(dense, batch)
        seed = self.settings.seed
        feeds, _ = make_feeds(dense.inputs, batch=0 if fixed else batch, seed=seed, given=fixed, shapes=shapes)
        return feeds

    def latency(
        self, dense: DenseModel, paths: Sequence[Path], batch: int, seconds: float, threads: int | None
    ) -> BenchResult:
        """Measure models side by side, the dense one first; the second of two is the compressed one."""
        fixed = self._fixed_feeds(dense)
        result = bench(
            [dense.reference if path == dense.path else path for path in paths],
            batch=batch,
            feeds=fixed,
            input_shape=None if fixed else _timing_shapes(dense, batch),
            provider=self.provider,
            threads=threads,
            seconds=seconds,
            seed=self.settings.seed,
            labels=["dense", "compressed"] if len(paths) == 2 else ["dense", *(path.stem for path in paths[1:])],
        )
        arms = tuple(arm.model_copy(update={"model": Path(arm.model).name}) for arm in result.arms)
        return result.model_copy(update={"arms": arms})

    def _fixed_feeds(self, dense: DenseModel) -> Feeds | None:
        """The probe inputs, where the user chose their shapes or arrays; else any batch will do."""
        return dense.feeds if self.own_feeds is not None or self.shapes else None


def _timing_shapes(dense: DenseModel, batch: int) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the data with a batch of this size; None where the model leaves no shape open."""
    axes = BatchAxes.of({spec.name: spec.shape for spec in dense.inputs})
    return axes.with_batch(dense.examples, axes.fixed or batch) if dense.examples else None
