"""Records that the steps of an export pass on; none of them changes once it is made.

DenseModel --> Delivered (the compressed model) --> Verified (one compared with the other) --> report
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto

import graph_passes as gp
from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.evaluation.softmax_bound import Head, SoftmaxBound
from rsi_deploy.io.onnx_reader import graph_of
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.precision.record import PrecisionRecord
from rsi_deploy.report.schema import Accuracy, ProbeOutput, Undone, Verification
from rsi_deploy.runtime.feeds.inputs import InputSpec, model_inputs
from rsi_deploy.runtime.feeds.values import Value
from rsi_deploy.runtime.parity import OutputComparison
from rsi_deploy.runtime.shape_trace import UncountedNode
from rsi_deploy.torch_models.model_source import Source


@dataclass(frozen=True, kw_only=True)
class DenseModel:
    """The dense model: written to a file, parsed and surveyed once, and run once on the probe inputs.

    Its weights stay in the data file beside it and are memory-mapped when they are read.

    Attributes:
        source: the model it comes from, without its torch module.
        folder: folder of the bundle in the making.
        proto: the parsed file.
        opset: opset of ONNX's own operators.
        sites: its sites; each reads its own weight.
        unsplit: names of weights that are no sites, as the report has them.
        head: the classifier head, for its softmax bound; None without one, or without evaluation data.
        preprocessing: from 8-bit pictures to inputs.
        reference: file that the compressed model is compared with: this model's, or the quantized file that its
            weights were dequantized from.
        quantized: nodes that multiply by weights of few bits.
        exporter: comparison with the source, where the dense model was converted from it.
        weights_hash: sha256 of all weights.
        size: the model's size as the user has it.
        feeds: probe inputs.
        examples: input name -> shape with one sample in the user's data, where the model leaves shapes open.
        outputs: outputs on the probe inputs; None where the model could not be run.
        expected: outputs of `reference` on them.
        batch: samples in the probe inputs.
        macs: node name -> MACs a sample.
        attention_macs: the part of `macs` that no factorization changes.
        uncounted: nodes whose MACs are unknown.
        dataset: evaluation data for this model's inputs.
        accuracy: the model's accuracy on them.
        notes: notes for the report.
    """

    source: Source
    folder: Path
    proto: ModelProto
    opset: int
    sites: Sequence[gp.Site]
    unsplit: tuple[str, ...]
    head: Head | None
    preprocessing: Preprocessing | None
    reference: Path
    quantized: tuple[str, ...]
    exporter: OutputComparison | None
    weights_hash: str
    size: Size
    feeds: Feeds
    examples: Mapping[str, tuple[int, ...]]
    outputs: list[Value] | None
    expected: list[Value] | None
    batch: int
    macs: Mapping[str, int]
    attention_macs: Mapping[str, int]
    uncounted: tuple[UncountedNode, ...]
    dataset: Dataset | None
    accuracy: AccuracyResult | None
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The dense model's file."""
        return dense_file(self.folder)

    @property
    def target(self) -> Path:
        """The compressed model's file."""
        return self.folder / "model.onnx"

    @cached_property
    def inputs(self) -> list[InputSpec]:
        """The model's inputs.

        Raises:
            ModelError: an input is no tensor.
        """
        return model_inputs(self.proto, self.path.name)

    def graph(self) -> ir.Model:
        """Return a graph of the model to change; it is made from the parsed file."""
        return new_graph(self.proto, self.path)


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The compressed model that is delivered.

    Attributes:
        split: its sites and nodes.
        predicted: its share of the dense model's time by the cost table, as first planned; None without a table.
        latency: measurement of both models; None where nothing is measured.
        undone: splits that were undone, for the model was not measured faster with them.
        verdict: what the measurement has led to; None where it decides nothing.
        precision: the choice of a precision; None where the model stays in float32.
        notes: notes for the report.
    """

    split: SplitModel
    predicted: float | None
    latency: BenchResult | None = None
    undone: tuple[Undone, ...] = ()
    verdict: str | None = None
    precision: PrecisionRecord | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The comparison of the compressed model with the dense one.

    Attributes:
        verification: the gates.
        probe: the compressed model's outputs on the probe inputs.
        accuracy: accuracy of both on the evaluation data.
        bound: bound on the softmax of a factorized head.
        agreement: distance of both models on the calibration data.
        macs: node name -> MACs a sample of the compressed model.
        notes: notes for the report.
    """

    verification: Verification
    probe: tuple[ProbeOutput, ...]
    accuracy: Accuracy | None
    bound: SoftmaxBound | None
    agreement: CalibrationRecord | None
    macs: Mapping[str, int]
    notes: tuple[str, ...]


def dense_file(folder: Path) -> Path:
    """Return the dense model's file while a bundle is made in `folder`.

    It lies apart from the bundle, so that a compressed model that still needs the dense one's data cannot load.
    """
    return folder / "work" / "dense.onnx"


def new_graph(proto: ModelProto, path: Path) -> ir.Model:
    """Return a new graph of a parsed file, which stays as it is."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    return graph_of(copy, path)
