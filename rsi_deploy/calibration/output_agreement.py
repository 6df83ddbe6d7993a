"""Compare the outputs of a compressed model with those of the dense one on unlabelled data.

output error   sum |z - z~|^2 / sum |z - E z|^2          of the first floating output, or of the scores before class ids
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
from rsi_deploy.runtime.feeds.values import Value, arrays_of_output
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]

CHECKED_SAMPLES = 512
"""Number of samples after which no further batch is run."""


def output_agreement(
    dense: Path,
    compressed: Path,
    data: CalibrationData,
    provider: str,
    dense_outputs: Array | None = None,
    proto: ModelProto | None = None,
) -> tuple[CalibrationRecord, Array]:
    """Run both models on the first batches of `data` and compare their outputs.

    Args:
        dense: file of the dense model.
        compressed: file of the compressed model.
        data: calibration data.
        provider: execution provider of onnxruntime.
        dense_outputs: float32 outputs of the dense model on the same batches; None to run it.
        proto: the dense model, parsed; None reads it from its file.

    Returns:
        The record for the report, and the outputs of the dense model.

    Raises:
        UsageError: data that do not fit, or a model without a floating output.
        GateError: NaN or infinity where the dense model has none.
    """
    dense_session = _readable_session(dense, provider, proto) if dense_outputs is None else None
    session = _readable_session(compressed, provider)
    fingerprint = hashlib.sha256()
    dense_batches: list[Array] = []
    batches: list[Array] = []
    for feeds in data.feeds():
        for name in sorted(feeds):
            fingerprint.update(feeds[name].tobytes())
        if dense_session is not None:
            dense_batches.append(_output(run_session(dense_session, feeds, dense.name), dense_session))
        batches.append(_output(run_session(session, feeds, compressed.name), session))
        if sum(map(len, batches)) >= CHECKED_SAMPLES:
            break
    if dense_outputs is None:
        dense_outputs = np.concatenate(dense_batches)
    return _compare(dense_outputs, np.concatenate(batches), data.samples, fingerprint.hexdigest()), dense_outputs


def _compare(z: Array, w: Array, samples: int, fingerprint: str) -> CalibrationRecord:
    """Compare the dense model's outputs `z` with the compressed model's `w`."""
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
    """Open a session whose outputs include the scores before a final ArgMax or TopK."""
    proto = proto or read_proto(model)
    readable = with_readable_output(proto)
    if readable is proto:
        return make_session(model, provider)
    return make_session(readable.SerializeToString(), provider, data_folder=model.parent)


def _output(outputs: list[Value], session: "InferenceSession") -> Array:
    """Return the first floating output, with samples along the first axis."""
    arrays = (array for output in outputs for array in arrays_of_output("", output).values())
    found = next((a for a in arrays if a.dtype.kind == "f" and a.ndim and a.size), None)
    if found is None:
        gives = ", ".join(f"{value.name}: {value.type}" for value in session.get_outputs())
        raise UsageError(
            f"the model has no floating output to compare on the calibration data, and no floating scores before its "
            f"outputs ({gives}); leave out --calib and choose a size with --rank"
        )
    return found.astype(np.float32)
