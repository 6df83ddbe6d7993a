"""Write candidate models of an export, and judge their outputs on the check part."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.output_agreement import PartOutputs, dense_outputs, output_quality
from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.errors import GateError
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.decide import Planned


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Models that an export may deliver.

    Attributes:
        dense: the dense model.
        data: calibration data.
        provider: onnxruntime provider.
        write: function that writes a model as the final one is written.
        outputs: part of the data -> outputs of the dense model; more are added.
    """

    dense: DenseModel
    data: CalibrationData
    provider: str
    write: Callable[[Planned, Path], SplitModel]
    outputs: dict[str, PartOutputs]

    @property
    def can_be_judged(self) -> bool:
        """Return whether the check part is large enough for a verdict."""
        return self.data.check is not None and self.data.needed is None

    @contextmanager
    def written(self, made: Planned) -> Iterator[tuple[Path, SplitModel]]:
        """Write a model to be measured, and delete it at the end."""
        path = self.dense.path.with_name("candidate.onnx")
        try:
            yield path, self.write(made, path)
        finally:
            for file in (path, path.with_name(f"{path.name}.data")):
                file.unlink(missing_ok=True)

    @property
    def dense_outputs(self) -> PartOutputs:
        """Outputs of the dense model on the check part."""
        part = self.data.check
        assert part is not None
        if "check" not in self.outputs:
            self.outputs["check"] = dense_outputs(self.dense.reference, part, self.provider, self.dense.proto)
        return self.outputs["check"]

    def quality(self, made: Planned) -> OutputQuality | None:
        """Return the quality of a model's outputs; None if they are not finite."""
        part = self.data.check
        assert part is not None
        with self.written(made) as (path, _):
            try:
                return output_quality(self.dense_outputs, path, part, self.provider)
            except GateError:
                return None

    def loss(self, made: Planned) -> float:
        """Return the loss of a model; infinite where its outputs are not finite."""
        return loss_shown(self.quality(made))


def loss_shown(quality: OutputQuality | None) -> float:
    """Return the relative output distance plus the KL divergence, as planning sums it; infinite without numbers."""
    if quality is None:
        return math.inf
    is_planned = quality.perplexity_ratio is None  # plans foresee no divergence of a decoder's tokens
    return (quality.output_error or 0.0) + ((is_planned and quality.divergence) or 0.0)
