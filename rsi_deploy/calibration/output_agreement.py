"""Compare the outputs of a compressed model with those of the dense one on unlabelled data.

output error   sum |z - z~|^2 / sum |z - E z|^2          of the first floating output, or of the scores before class ids
divergence     mean KL(softmax z || softmax z~), nats    of class scores
agreement      share of equal top-1 answers, percent     of class scores
perplexity     exp(mean surprisal of the next token)     of the logits of a decoder on text; agreement a token then
cosine         mean <z, z~> / (|z| |z~|)                 of embeddings: rows of unit norm
neighbours     share of 10 nearest neighbours, percent   of embeddings
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from rsi_deploy.calibration.calibration_data import CalibrationData, SamplePart
from rsi_deploy.calibration.record import CalibrationRecord, OutputQuality
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.core.types import Floats
from rsi_deploy.data.dataset import spaced_rows
from rsi_deploy.data.text_data import TextRows
from rsi_deploy.evaluation.accumulator import shown_positions
from rsi_deploy.evaluation.answer_outputs import with_readable_output
from rsi_deploy.evaluation.intervals import (
    mean_interval,
    percentile_interval,
    ratio_of_sums_interval,
    share_at_least,
    wilson_interval,
)
from rsi_deploy.evaluation.next_tokens import TokenAnswers, TokenSums, divergences, mean_over, summed
from rsi_deploy.evaluation.scores import are_scores, cosine, divergence, log_probabilities, neighbours_kept
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.runtime.feeds.values import Value, arrays_of_output
from rsi_deploy.runtime.sessions import make_session, run_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = npt.NDArray[Any]
_Pair = tuple[Array, Array, Array]
"""Outputs of the dense and of the compressed model, 0 at padding, and whether a position is no padding."""

QualityField = Literal["agreement", "cosine", "output_error", "perplexity_ratio", "perplexity"]
MOST_BYTES = 512 * 2**20
"""Bytes of the dense model's outputs after which no further batch is run."""
LOGIT_BYTES = 128 * 2**20
"""Bytes of a decoder's logits, at evenly spaced positions, by which the divergence and the output error are found."""
NEIGHBOURS = 10
ONE_SIDED = 90.0
"""Level of the interval each of whose ends is a one-sided 95 % limit."""


@dataclass(frozen=True, kw_only=True)
class PartOutputs:
    """The dense model's outputs on a part of the data.

    Attributes:
        batches: float32 `(n, ...)` of each batch; samples along the first axis. Of a decoder's logits, some positions.
        fingerprint: sha256 of the samples as they enter the model.
        tokens: a decoder's answers in each batch; empty for other models.
    """

    batches: tuple[Array, ...]
    fingerprint: str
    tokens: tuple[TokenAnswers, ...] = ()

    @property
    def perplexity(self) -> float:
        """Perplexity of a decoder."""
        sums = [own.sums(np.zeros(len(own.kept), np.int64)) for own in self.tokens]
        return TokenSums.concatenate(sums).perplexity()[0]


def calibration_record(
    dense: Path,
    compressed: Path,
    data: CalibrationData,
    provider: str,
    known: Mapping[str, PartOutputs] | None = None,
    proto: ModelProto | None = None,
) -> tuple[CalibrationRecord, dict[str, PartOutputs]]:
    """Compare the outputs of both models on the check part and on samples of the fit part.

    Args:
        dense: file of the dense model.
        compressed: file of the compressed model.
        data: calibration data.
        provider: execution provider of onnxruntime.
        known: outputs of the dense model on the same data, as an earlier call returned them; None to run it.
        proto: the dense model, parsed; None reads it from its file.

    Returns:
        The record for the report, and the outputs of the dense model.

    Raises:
        UsageError: data that do not fit, or a model without a floating output.
        GateError: NaN or infinity where the dense model has none.
    """
    parts = {"in-sample": data.in_sample} | ({} if data.check is None else {"check": data.check})
    outputs = dict(known or {})
    for name, part in parts.items():
        if name not in outputs:
            outputs[name] = dense_outputs(dense, part, provider, proto)
    # Fewer nearest neighbours are kept among more samples, so both parts search among equally many.
    pool = min(part.samples for part in parts.values())
    quality = {name: output_quality(outputs[name], compressed, part, provider, pool) for name, part in parts.items()}
    record = CalibrationRecord(
        samples=data.samples,
        check_samples=0 if data.check is None else data.check.samples,
        is_separate=data.is_separate,
        needed=data.needed,
        checked=quality.get("check"),
        in_sample=quality["in-sample"],
    )
    return record, outputs


def dense_outputs(dense: Path, part: SamplePart, provider: str, proto: ModelProto | None = None) -> PartOutputs:
    """Run the dense model on a part of the data.

    Args:
        dense: file of the dense model.
        part: samples.
        provider: execution provider of onnxruntime.
        proto: the dense model, parsed; None reads it from its file.

    Raises:
        UsageError: data that do not fit, or a model without a floating output.
    """
    session = _readable_session(dense, provider, proto)
    fingerprint = hashlib.sha256()
    batches: list[Array] = []
    tokens: list[TokenAnswers] = []
    text = _continued(part)
    for feeds in part.feeds():
        for name in sorted(feeds):
            fingerprint.update(feeds[name].tobytes())
        output = _output(run_session(session, feeds, dense.name), session)
        if text is not None and output.ndim == 3 and output.shape[:2] == feeds[text.ids].shape:
            tokens.append(TokenAnswers.of(output, text.ids, feeds))
            output = output[:, _positions(output, part)]
        batches.append(output)
        if sum(batch.nbytes for batch in batches) >= MOST_BYTES:
            break
    return PartOutputs(batches=tuple(batches), fingerprint=fingerprint.hexdigest(), tokens=tuple(tokens))


def output_quality(
    dense: PartOutputs, compressed: Path, part: SamplePart, provider: str, pool: int | None = None
) -> OutputQuality:
    """Run a compressed model on a part of the data, and compare its outputs with the dense model's.

    Args:
        dense: outputs of the dense model on `part` (`dense_outputs`).
        compressed: file of the compressed model.
        part: samples.
        provider: execution provider of onnxruntime.
        pool: number of samples, evenly spaced, among which neighbours are looked for; None for all.

    Raises:
        UsageError: outputs of other shapes than the dense model's.
        GateError: NaN or infinity where the dense model has none.
    """
    session = _readable_session(compressed, provider)
    pairs = []
    tokens: list[TokenAnswers] = []
    text = _continued(part)
    for z, feeds in zip(dense.batches, part.feeds(), strict=False):
        w = _output(run_session(session, feeds, compressed.name), session)
        shown = shown_positions(w, feeds)
        if dense.tokens and text is not None:
            _refuse_not_finite(w)
            tokens.append(TokenAnswers.of(w, text.ids, feeds))
            at = _positions(w, part)
            w, shown = w[:, at], np.broadcast_to(shown, (*w.shape[:2], 1))[:, at]
        if z.shape != w.shape:
            raise UsageError(
                f"the first floating output has the shape {z.shape} in the dense model and {w.shape} in the compressed "
                f"one, so they cannot be compared; export the model without the steps that select among its answers, "
                f"or leave out --calib"
            )
        finite = np.isfinite(z)
        _refuse_not_finite(w[finite])
        pairs.append((np.where(finite & shown, z, 0), np.where(finite & shown, w, 0), shown))
    found = _compared(pairs, dense, pool)
    if text is not None and tokens:
        found |= _of_tokens(dense.tokens, tokens, pairs, text.documents[_row_numbers(part)])
    return OutputQuality(**found)


def _refuse_not_finite(outputs: Array) -> None:
    if not np.isfinite(outputs).all():
        raise GateError("the compressed model gives NaN or infinite outputs on the calibration data; export again")


def _continued(part: SamplePart) -> TextRows | None:
    """Return the text of a part whose model continues it; None for other data."""
    text = part.feeding.dataset
    return text if isinstance(text, TextRows) and text.is_decoder else None


def _positions(logits: Array, part: SamplePart) -> npt.NDArray[np.int64]:
    """Return evenly spaced positions that predict a token, at which logits `(n, t, vocabulary)` are kept."""
    predicting = logits.shape[1] - 1
    count = LOGIT_BYTES // (logits.itemsize * logits.shape[2] * part.samples)
    return spaced_rows(predicting, 1, min(max(count, 1), predicting))


def _row_numbers(part: SamplePart) -> npt.NDArray[np.int64]:
    """Return the row of the data that each sample of a part is."""
    return spaced_rows(len(part.feeding.dataset), 1, part.limit)[part.rows]


def _compared(pairs: list[_Pair], dense: PartOutputs, pool: int | None) -> dict[str, Any]:
    """Compare the dense model's outputs with the compressed model's, batch by batch; return fields of the quality."""
    moved, unit = _moved(pairs)
    several = len(moved) > 1
    found: dict[str, Any] = {"samples": len(moved), "data_fingerprint": dense.fingerprint}
    relative = moved.sum() / unit.sum() if unit.any() else math.inf if moved.any() else 0.0
    found["output_error"] = float(relative) if math.isfinite(relative) else None
    if several and unit.any():
        found["output_error_interval"] = ratio_of_sums_interval(moved, unit)
        found["output_error_at_most"] = ratio_of_sums_interval(moved, unit, level=ONE_SIDED)[1]
    measure = measures_of(dense)[0]
    if measure in ("agreement", "cosine"):
        z, w, _ = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
        found |= _of_scores(z, w) if measure == "agreement" else _of_embeddings(z, w, pool or len(z))
    return found


def measures_of(outputs: PartOutputs) -> tuple[QualityField, ...]:
    """Return the fields of `OutputQuality` that these outputs have, that which says most first."""
    batches = outputs.batches
    if outputs.tokens:
        return "perplexity_ratio", "perplexity", "agreement", "output_error"
    is_matrix = len({z.shape[1:] for z in batches}) == 1 and batches[0].ndim == 2
    if not is_matrix or batches[0].shape[1] < 2:
        return ("output_error",)
    return ("agreement" if are_scores(np.concatenate(batches)) else "cosine"), "output_error"


def _moved(pairs: list[_Pair]) -> tuple[Floats, Floats]:
    """Return the squared distance of each sample's outputs, and the squared deviation from their mean, or squared norm.

    Positions of padding count in neither.
    The norm takes the place of the deviation if the outputs do not vary over samples, or have several shapes.
    """
    moved = np.concatenate([_squares(z.astype(np.float64) - w) for z, w, _ in pairs])
    size = np.concatenate([_squares(z.astype(np.float64)) for z, _, _ in pairs])
    if len({z.shape[1:] for z, _, _ in pairs}) > 1:
        return moved, size
    count = np.maximum(sum(shown.sum(axis=0) for _, _, shown in pairs), 1)
    mean = sum(z.sum(axis=0, dtype=np.float64) for z, _, _ in pairs) / count
    spread = np.concatenate([_squares((z - mean) * shown) for z, _, shown in pairs])
    return moved, spread if spread.sum() > 1e-12 * size.sum() else size


def _squares(values: Floats) -> Floats:
    """Return the sum of squares of each sample, float64 `(n,)`."""
    return np.asarray(np.square(values).reshape(len(values), -1).sum(axis=1), np.float64)


def _of_scores(z: Array, w: Array) -> dict[str, Any]:
    """Return the fields of class scores `(N, classes)`."""
    samples = len(z)
    same = int((z.argmax(axis=1) == w.argmax(axis=1)).sum())
    kl = divergence(z, w)
    return {
        "divergence": float(kl.mean()),
        "divergence_interval": mean_interval(kl) if samples > 1 else None,
        "agreement": 100 * same / samples,
        "agreement_interval": wilson_interval(same, samples),
        "agreement_at_least": share_at_least(same, samples),
        "confidence": float(np.exp(log_probabilities(z).max(axis=1)).mean()),
    }


def _of_tokens(
    dense: Sequence[TokenAnswers], compressed: Sequence[TokenAnswers], pairs: Sequence[_Pair], documents: Array
) -> dict[str, Any]:
    """Return the fields of a decoder's answers.

    Args:
        dense: answers of the dense model in each batch.
        compressed: answers of the compressed model.
        pairs: logits of both at some positions.
        documents: document of each window, `(n,)`.
    """
    ends = np.cumsum([len(own.kept) for own in compressed])
    of_batch = np.split(documents[: ends[-1]], ends[:-1])
    before, after = (
        TokenSums.concatenate([own.sums(at, z) for own, z, at in zip(answers, dense, of_batch, strict=False)])
        for answers in (dense, compressed)
    )
    own, reference = after.by_document(), before.by_document()
    perplexity, interval = own.perplexity()
    ratio, ratio_interval = own.ratio(reference)
    limits = own.ratio(reference, ONE_SIDED)[1]
    agreement, agreement_interval = mean_over(100 * own.same, own.tokens)
    least = mean_over(100 * own.same, own.tokens, ONE_SIDED)[1]
    kl = np.concatenate([(divergences(z, w) * shown[..., 0]).sum(axis=1) for z, w, shown in pairs])
    counts = np.concatenate([shown.sum(axis=(1, 2), dtype=np.float64) for _, _, shown in pairs])
    divergence, divergence_interval = mean_over(summed(after.documents, kl), summed(after.documents, counts))
    return {
        "tokens": int(own.tokens.sum()),
        "perplexity": perplexity,
        "perplexity_interval": interval,
        "perplexity_at_most": None if limits is None else reference.perplexity()[0] * limits[1],
        "perplexity_ratio": ratio,
        "perplexity_ratio_interval": ratio_interval,
        "perplexity_ratio_at_most": None if limits is None else limits[1],
        "agreement": agreement,
        "agreement_interval": agreement_interval,
        "agreement_at_least": None if least is None else least[0],
        "divergence": divergence,
        "divergence_interval": divergence_interval,
    }


def _of_embeddings(z: Array, w: Array, pool: int) -> dict[str, Any]:
    """Return the fields of embeddings `(N, width)`; neighbours among `pool` of them, evenly spaced."""
    angles = cosine(z, w)
    found: dict[str, Any] = {"cosine": float(angles.mean()), "worst_cosine": float(np.percentile(angles, 1))}
    if len(z) > 1:
        found["cosine_interval"] = mean_interval(angles)
        found["cosine_at_least"] = mean_interval(angles, level=ONE_SIDED)[0]
        found["worst_cosine_interval"] = percentile_interval(angles, 1)
    if (count := min(pool, len(z))) >= 2 * NEIGHBOURS:
        rows = np.arange(count) * len(z) // count
        kept = 100 * neighbours_kept(z[rows], w[rows], NEIGHBOURS)
        found |= {"neighbours": float(kept.mean()), "neighbours_interval": mean_interval(kept)}
    return found


def _readable_session(model: Path, provider: str, proto: ModelProto | None = None) -> "InferenceSession":
    """Open a session whose outputs include the scores before a final ArgMax or TopK."""
    proto = proto or read_proto(model)
    readable = with_readable_output(proto)
    if readable is proto:
        return make_session(model, provider)
    return make_session(readable.SerializeToString(), provider, data_folder=model.parent)


def _output(outputs: list[Value], session: "InferenceSession") -> Array:
    """Return the first floating output, with samples along the first axis."""
    arrays: Iterator[Array] = (array for output in outputs for array in arrays_of_output("", output).values())
    found = next((a for a in arrays if a.dtype.kind == "f" and a.ndim and a.size), None)
    if found is None:
        gives = ", ".join(f"{value.name}: {value.type}" for value in session.get_outputs())
        raise UsageError(
            f"the model has no floating output to compare on the calibration data, and no floating scores before its "
            f"outputs ({gives}); leave out --calib and choose a size with --rank"
        )
    return found.astype(np.float32)
