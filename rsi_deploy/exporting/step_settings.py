"""The settings that the steps of one export share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnx import ModelProto

from rsi_deploy.calibration.calibration_data import example_shapes
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.execution.executor import Executor, LocalExecutor
from rsi_deploy.execution.ray_executor import ray_executor
from rsi_deploy.execution.result_store import ResultStore, StoringExecutor
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.runtime.feeds.caches import Caches
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
        sizes = {} if Caches.of(inputs) else examples  # few tokens prove a decoder: each has a score of every token
        return Probe(probe_feeds(path, self.settings.seed, self.shapes, self.own_feeds, sizes, inputs), examples)

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
