"""How far a compressed model's outputs are from the dense one's, on unlabelled data.

output error   sum |z - z~|^2 / sum |z - E z|^2          of the first floating output, or of what ids are read from
divergence     mean KL(softmax z || softmax z~), nats    of class scores
agreement      share of equal top-1 answers, percent     of class scores
"""

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto

from rsi_deploy.calibration.activations import output_distance
from rsi_deploy.calibration.calibration_data import CalibrationData
from rsi_deploy.calibration.record import CalibrationRecord
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.evaluation.answer_outputs import with_readable_output
from rsi_deploy.evaluation.scores import divergence
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.runtime.feeds.values import Value, arrays_of
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]

CHECKED_SAMPLES = 512
"""Samples after which no further batch is run."""


def output_agreement(dense: Path, compressed: Path, data: CalibrationData, provider: str) -> CalibrationRecord:
    """Run both models on the first batches of `data` and compare.

    Raises:
        UsageError: data that do not fit, or a model without a floating output.
        GateError: NaN or infinity where the dense model has none.
    """
    return certified(dense, compressed, data, provider)[0]


def certified(
    dense: Path,
    compressed: Path,
    data: CalibrationData,
    provider: str,
    known: Array | None = None,
    proto: ModelProto | None = None,
) -> tuple[CalibrationRecord, Array]:
    """As `output_agreement`, with the dense model's answers; where they are known, it is not asked again.

    Args:
        dense: the dense model.
        compressed: the one that is held against it.
        data: unlabelled.
        provider: onnxruntime's.
        known: float32, the dense model's answers on the same batches.
        proto: the dense model, where it is parsed already.
    """
    before = _readable_session(dense, provider, proto) if known is None else None
    after = _readable_session(compressed, provider)
    seen = hashlib.sha256()
    asked: list[Array] = []
    answers: list[Array] = []
    for feeds in data.feeds():
        for name in sorted(feeds):
            seen.update(feeds[name].tobytes())
        if before is not None:
            asked.append(_output(run_session(before, feeds, dense.name), before))
        answers.append(_output(run_session(after, feeds, compressed.name), after))
        if sum(map(len, answers)) >= CHECKED_SAMPLES:
            break
    told = np.concatenate(asked) if known is None else known
    return _compared(told, np.concatenate(answers), data.samples, seen.hexdigest()), told


def _compared(z: Array, w: Array, samples: int, fingerprint: str) -> CalibrationRecord:
    """The dense model's answers `z` and the compressed one's `w`."""
    finite = np.isfinite(z)
    if not np.isfinite(w[finite]).all():
        raise GateError("the compressed model gives NaN or infinite outputs on the calibration data; export again")
    z, w = np.where(finite, z, 0), np.where(finite, w, 0)
    distance = output_distance(torch.from_numpy(z), torch.from_numpy(w))
    is_scores = distance.kl is not None
    return CalibrationRecord(
        samples=samples,
        checked=len(z),
        output_error=distance.relative if math.isfinite(distance.relative) else None,
        divergence=float(divergence(z, w).mean()) if is_scores else None,
        agreement=100 * float((z.argmax(axis=1) == w.argmax(axis=1)).mean()) if is_scores else None,
        data_fingerprint=fingerprint,
    )


def _readable_session(model: Path, provider: str, proto: ModelProto | None = None) -> "InferenceSession":
    """A session that gives what lies before an ArgMax or a TopK, where the model itself does not."""
    proto = proto or read_proto(model)
    readable = with_readable_output(proto)
    if readable is proto:
        return make_session(model, provider)
    return make_session(readable.SerializeToString(), provider, data_folder=model.parent)


def _output(outputs: list[Value], session: "InferenceSession") -> Array:
    """The first floating output, samples first."""
    arrays = (array for output in outputs for array in arrays_of("", output).values())
    found = next((a for a in arrays if a.dtype.kind == "f" and a.ndim and a.size), None)
    if found is None:
        gives = ", ".join(f"{value.name}: {value.type}" for value in session.get_outputs())
        raise UsageError(
            f"the model has no floating output to compare on the calibration data, and nothing floating is before its "
            f"outputs ({gives}); leave out --calib and choose a size with --rank"
        )
    return found.astype(np.float32)
