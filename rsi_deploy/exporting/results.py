"""What the steps of an export find, each in one record that the later steps and the report take from.

Start (the dense model) --> Delivered (the compressed one) --> Checked (one held against the other)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.evaluation.softmax_bound import SoftmaxBound
from rsi_deploy.exporting.slowdown_rollback import LastWord
from rsi_deploy.exporting.steps import Compressed, DenseFacts
from rsi_deploy.report.schema import Accuracy, ProbeOutput, Verification
from rsi_deploy.runtime.parity import OutputComparison
from rsi_deploy.torch_models.model_source import Source


@dataclass(frozen=True, kw_only=True)
class Start:
    """The dense model, written and looked at: what every later step starts from.

    Attributes:
        source: of it; a torch model is let go by now.
        folder: of the bundle in the making.
        steps: from pictures to inputs.
        exporter: the dense model against its source, where it was made anew.
        facts: its size, probe inputs, outputs and MACs.
        dataset: the evaluation data for this model's inputs, where there are some.
        accuracy: on them.
        fed: what it is timed with; None where it could not be run.
    """

    source: Source
    folder: Path
    steps: Preprocessing | None
    exporter: OutputComparison | None
    facts: DenseFacts
    dataset: Dataset | None
    accuracy: AccuracyResult | None
    fed: Feeds | None

    @property
    def dense(self) -> Path:
        """The dense model's file."""
        return dense_file(self.folder)

    @property
    def path(self) -> Path:
        """The compressed model's file, to be."""
        return self.folder / "model.onnx"


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """The compressed model that is delivered.

    Attributes:
        result: what its making knew.
        predicted: its share of the dense model's time by the table, as first planned; None without a table.
        latency: beside the dense model; None where nothing is measured here.
        word: what the measurement has led to; None where it decides nothing.
    """

    result: Compressed
    predicted: float | None
    latency: BenchResult | None = None
    word: LastWord | None = None


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The compressed model, held against the dense one.

    Attributes:
        verification: the gates.
        probe: its outputs on the probe inputs.
        accuracy: of both on the evaluation data.
        bound: on the softmax of a factorized head.
        certified: how far it is from the dense model on the calibration data.
        macs: a sample, by node.
    """

    verification: Verification
    probe: tuple[ProbeOutput, ...]
    accuracy: Accuracy | None
    bound: SoftmaxBound | None
    certified: CalibrationRecord | None
    macs: Mapping[str, int]


def dense_file(folder: Path) -> Path:
    """Where the dense model lies while a bundle is made in `folder`.

    Apart from the bundle, so that a compressed model that still leans on the dense one's data cannot load.
    """
    return folder / "work" / "dense.onnx"
