"""Compare two models' outputs on the same samples, sample by sample, with pure functions of arrays.

label rank     rank of the label among a sample's scores or class ids, 0 is the best; ties go by class number
divergence     KL(p_reference || p_model), p = softmax(scores), nats
cosine         <y, y_ref> / (||y|| ||y_ref||)                     1 if both are zero, 0 if one is
distance       ||y - y_ref|| / ||y_ref||                          0 if both are zero, 1 if only y_ref is
neighbours     the samples of the largest cosine                  share of y_ref's that are y's too
"""

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.types import Array, Floats


def label_ranks(scores: Array, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rank of each label among its sample's scores `(N, classes)`, 0 for the highest; ties by number."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return np.asarray(((scores > own) | ((scores == own) & before)).sum(axis=1), np.int64)


def id_ranks(ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rank of each label among its sample's class ids `(N, places)`; `places` if it is not among them.

    Example:
        >>> id_ranks(np.array([[3, 1], [0, 2], [5, 4]]), np.array([3, 2, 0])).tolist()
        [0, 1, 2]
    """
    hits = ids == labels[:, None]
    return np.asarray(np.where(hits.any(axis=1), hits.argmax(axis=1), ids.shape[1]), np.int64)


def log_probabilities(scores: Array) -> Floats:
    """Return the log-softmax of scores `(N, classes)` as float64; scores that are already probabilities keep them."""
    values = scores.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, rtol=0, atol=1e-3):
        return np.asarray(np.log(np.maximum(values, 1e-12)))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergence(reference: Array, scores: Array) -> Floats:
    """Return KL(p_reference || p_scores) of each sample in nats, float64 `(N,)`."""
    log_p, log_q = log_probabilities(reference), log_probabilities(scores)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1))


def cosine(reference: Array, values: Array) -> Floats:
    """Return the cosine of the angle between each sample's outputs `(N, ...)`, float64 `(N,)`."""
    a, b = _rows(reference), _rows(values)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = ~a.any(axis=1) & ~b.any(axis=1)
    found = np.divide((a * b).sum(axis=1), norms, out=np.zeros(len(a)), where=norms > 0)
    return np.asarray(np.clip(np.where(both_zero, 1.0, found), -1.0, 1.0))


def relative_distance(reference: Array, values: Array) -> Floats:
    """Return `||y - y_ref|| / ||y_ref||` of each sample's outputs `(N, ...)`, float64 `(N,)`."""
    a, b = _rows(reference), _rows(values)
    norm, moved = np.linalg.norm(a, axis=1), np.linalg.norm(b - a, axis=1)
    return np.asarray(np.divide(moved, norm, out=(moved > 0).astype(np.float64), where=norm > 0))


def neighbours_kept(reference: Array, values: Array, count: int) -> Floats:
    """Return the share of each sample's `count` nearest neighbours by cosine that stay its neighbours, float64 `(N,)`.

    Args:
        reference: embeddings `(N, width)` that neighbours are found in.
        values: embeddings `(N, width)` of the same samples.
        count: number of neighbours, below N.
    """
    sets = [_neighbours(embeddings, count) for embeddings in (reference, values)]
    return np.array([len(set(a) & set(b)) / count for a, b in zip(*sets, strict=True)])


def _neighbours(embeddings: Array, count: int) -> npt.NDArray[np.int64]:
    """Return the numbers of each row's nearest other rows by cosine, `(N, count)`."""
    rows = _rows(embeddings)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    alike = rows @ rows.T
    np.fill_diagonal(alike, -np.inf)
    return np.asarray(np.argpartition(-alike, count - 1, axis=1)[:, :count], np.int64)


def are_scores(reference: Array) -> bool:
    """Return whether outputs `(N, ...)` look like class scores: two axes, at least two classes, rows not of unit norm.

    Rows of unit norm are embeddings, as in calibration (`rsi_deploy.calibration.activations.output_distance`).
    """
    if reference.ndim != 2 or reference.shape[1] < 2:
        return False
    return not bool((np.abs(np.linalg.norm(reference.astype(np.float64), axis=1) - 1) < 1e-3).all())


def _rows(values: Array) -> Floats:
    return np.asarray(values.reshape(len(values), -1), np.float64)
