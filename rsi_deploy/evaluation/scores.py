"""What two models' outputs on the same samples say about each other, sample by sample: pure functions of arrays.

label rank     place of the label among a sample's scores or class ids, 0 is the best; equal scores go by class number
divergence     KL(p_reference || p_model), p = softmax(scores), nats
cosine         <y, y_ref> / (||y|| ||y_ref||)                     1 where both are zero, 0 where one is
distance       ||y - y_ref|| / ||y_ref||                          0 where both are zero, 1 where y_ref is
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def label_ranks(scores: Array, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of each label among its sample's scores `(N, classes)`, 0 is the highest; ties go by class number."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return np.asarray(((scores > own) | ((scores == own) & before)).sum(axis=1), np.int64)


def id_ranks(ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of each label among its sample's class ids `(N, places)`, 0 is the first; `places` where it is not there.

    Example:
        >>> id_ranks(np.array([[3, 1], [0, 2], [5, 4]]), np.array([3, 2, 0])).tolist()
        [0, 1, 2]
    """
    hits = ids == labels[:, None]
    return np.asarray(np.where(hits.any(axis=1), hits.argmax(axis=1), ids.shape[1]), np.int64)


def log_probabilities(scores: Array) -> Floats:
    """Log-softmax of scores `(N, classes)`, float64; scores that are probabilities already are not squashed again."""
    values = scores.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, rtol=0, atol=1e-3):
        return np.asarray(np.log(np.maximum(values, 1e-12)))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergence(reference: Array, scores: Array) -> Floats:
    """KL(p_reference || p_scores) of each sample, nats, float64 `(N,)`."""
    log_p, log_q = log_probabilities(reference), log_probabilities(scores)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1))


def cosine(reference: Array, values: Array) -> Floats:
    """Cosine of the angle between each sample's outputs `(N, ...)`, float64 `(N,)`."""
    a, b = _rows(reference), _rows(values)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    found = np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)
    return np.asarray(np.clip(np.where(both_zero, 1.0, found), -1.0, 1.0))


def relative_distance(reference: Array, values: Array) -> Floats:
    """`||y - y_ref|| / ||y_ref||` of each sample's outputs `(N, ...)`, float64 `(N,)`."""
    a, b = _rows(reference), _rows(values)
    norm, moved = np.linalg.norm(a, axis=1), np.linalg.norm(b - a, axis=1)
    return np.asarray(np.divide(moved, norm, out=(moved > 0).astype(np.float64), where=norm > 0))


def are_scores(reference: Array) -> bool:
    """Whether outputs `(N, ...)` look like class scores: two axes, two classes or more, and no rows of unit norm.

    Rows of unit norm are embeddings, as for calibration (`rsi_deploy.calibration.activations.output_distance`).
    """
    if reference.ndim != 2 or reference.shape[1] < 2:
        return False
    return not bool((np.abs(np.linalg.norm(reference.astype(np.float64), axis=1) - 1) < 1e-3).all())


def _rows(values: Array) -> Floats:
    return np.asarray(values.reshape(len(values), -1), np.float64)
