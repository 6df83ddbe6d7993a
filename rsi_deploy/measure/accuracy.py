"""Accuracy of an ONNX classifier on labelled data, and how far it agrees with a reference model.

    top-1        share of samples whose label has the highest score        (percent, with Wilson's 95 % interval)
    top-5        share of samples whose label is among the five highest    (percent; None below six classes)
    agreement    share of samples where model and reference give the same top-1 answer             (percent)
    divergence   mean over samples of KL(p_reference || p_model), p = softmax(scores)                 (nats)

Equal scores rank by class number, as argmax does. What pictures go through is decided by one rule: the
preprocessing that was passed, else the one stored in the model, else none, which is right only for a model that
takes the 8-bit pictures as they are; with any other model it is refused, since to guess would falsify the result.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure import providers
from rsi_deploy.measure.data import Dataset, open_data
from rsi_deploy.measure.inputs import model_inputs
from rsi_deploy.measure.preprocess import METADATA_KEY, Preprocessing

Array = npt.NDArray[Any]


class AccuracyResult(BaseModel, frozen=True, extra="forbid"):
    """What was found on `samples` samples; shares in percent.

    Attributes:
        samples: how many were read.
        classes: scores a sample.
        top1: None without labels.
        top1_interval: Wilson's 95 % interval of it.
        top5: None without labels or below six classes.
        agreement: with the reference's top-1 answers; None without a reference.
        divergence: mean KL divergence from the reference, nats; None without a reference.
        provider: full name of the one that ran the model.
        preprocessing: in words; None where the data were ready inputs.
        data_fingerprint: sha256 of all the data, also where `limit` read a part.
    """

    samples: int
    classes: int
    top1: float | None
    top1_interval: tuple[float, float] | None
    top5: float | None
    agreement: float | None
    divergence: float | None
    provider: str
    preprocessing: str | None
    data_fingerprint: str


def evaluate(
    model: str | Path,
    data: Dataset | str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    provider: str = "cpu",
    batch_size: int = 64,
    reference: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AccuracyResult:
    """Run a classifier over the data, batch by batch.

    Args:
        model: an ONNX file with one input, whose first output is scores `(N, classes)`.
        data: an opened data set, or its path.
        preprocessing: for pictures; None takes what the model's metadata carries.
        provider: short or full name, for the model and the reference.
        batch_size: samples a run. A model with a fixed batch gets that one, the last filled up with copies.
        reference: another ONNX file, fed with the same samples.
        limit: at most so many samples, evenly spaced over the data.
        progress: called with (samples done, samples in all) after each batch.

    Raises:
        UsageError: data that do not fit the model, labels outside its classes, no preprocessing known, neither
            labels nor reference; all of it before the long run.
        ModelError: a model cannot be loaded or run, gives no class scores, or gives NaN.
    """
    dataset = open_data(data) if isinstance(data, str | Path) else data
    if dataset.labels is None and reference is None:
        raise UsageError("the data have no labels and there is no reference: nothing to compare the answers with")
    subject = _Classifier(model, provider)
    other = None if reference is None else _Classifier(reference, provider)
    steps = _steps(dataset, subject, preprocessing)
    batches = dataset.batches(subject.batch or batch_size, steps, limit)
    total = len(dataset) if limit is None else min(limit, len(dataset))

    tally = _Tally()
    for number, (inputs, labels) in enumerate(batches):
        scores = subject.scores(inputs)
        if number == 0:
            _check_labels(dataset.labels, scores.shape[1], model)
            subject.prove_provider(inputs)
        against = None if other is None else other.scores(inputs)
        if against is not None and against.shape != scores.shape:
            raise UsageError(
                f"{model} gives {scores.shape[1]} classes, but the reference {reference} {against.shape[1]}"
            )
        tally.add(scores, labels, against)
        if progress is not None:
            progress(tally.samples, total)
    return tally.result(subject.provider, steps, dataset)


def wilson_interval(hits: int, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, in percent (Wilson 1927): it stays inside 0 to 100 and holds near the ends.

    >>> tuple(round(end, 2) for end in wilson_interval(50, 100))
    (40.38, 59.62)
    """
    z = 1.959963984540054
    centre = (hits + z * z / 2) / (samples + z * z)
    half = z / (samples + z * z) * math.sqrt(hits * (samples - hits) / samples + z * z / 4)
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def label_ranks(scores: Array, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Place of each label among its sample's scores `(N, classes)`, 0 is the highest; ties go by class number."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    return np.asarray(((scores > own) | ((scores == own) & before)).sum(axis=1), np.int64)


def log_probabilities(scores: Array) -> npt.NDArray[np.float64]:
    """Log-softmax of scores `(N, classes)`, float64; scores that are probabilities already are not squashed again."""
    values = scores.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, rtol=0, atol=1e-3):
        return np.asarray(np.log(np.maximum(values, 1e-12)))
    shifted = values - values.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergence(reference: Array, scores: Array) -> npt.NDArray[np.float64]:
    """KL(p_reference || p_scores) of each sample, nats, float64 `(N,)`."""
    log_p, log_q = log_probabilities(reference), log_probabilities(scores)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=1))


class _Classifier:
    """A session with one input, and the answers to any number of samples."""

    def __init__(self, model: str | Path, provider: str):
        self.name = str(model)
        self.session = providers.make_session(model, provider)
        self.provider: str = self.session.get_providers()[0]
        specs = model_inputs(self.session)
        if len(specs) != 1:
            listed = "; ".join(map(str, specs))
            raise UsageError(f"{self.name} takes {len(specs)} inputs ({listed}); eval feeds models with one input")
        self.spec = specs[0]
        first = self.spec.shape[0] if self.spec.shape else None
        self.batch = first if isinstance(first, int) else None

    def scores(self, inputs: Array) -> Array:
        """Scores `(n, classes)` of `inputs (n, ...)`.

        Raises:
            UsageError: inputs that do not fit.
            ModelError: the run fails, or its first output is no scores, or holds NaN.
        """
        rows = [self._run(chunk) for chunk in self._chunks(self._fitted(inputs))]
        return np.concatenate(rows)[: len(inputs)]

    def prove_provider(self, inputs: Array) -> None:
        """Refuse a provider that runs nothing; the CPU one needs no proof, everything else falls back to it."""
        if providers.short_name(self.provider) != "cpu":
            chunk = next(self._chunks(self._fitted(inputs)))
            providers.proven_placement(self.name, self.provider, {self.spec.name: chunk})

    def _fitted(self, inputs: Array) -> Array:
        """Inputs in the model's type: one floating type may become another, nothing else is converted."""
        wanted, came = self.spec.shape[1:], inputs.shape[1:]
        fits = len(wanted) == len(came) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(wanted, came, strict=True)
        )
        if not fits:
            raise UsageError(
                f"{self.name} takes {self.spec}, but the data give {inputs.dtype} "
                f"(batch, {', '.join(map(str, came))}); set resize, crop or layout in the preprocessing, "
                "or give data of that shape"
            )
        if inputs.dtype == self.spec.dtype:
            return inputs
        if inputs.dtype.kind != "f" or self.spec.dtype.kind != "f":
            raise UsageError(f"{self.name} takes {self.spec}, but the data give {inputs.dtype}; convert the data")
        return inputs.astype(self.spec.dtype)

    def _chunks(self, inputs: Array) -> Iterator[Array]:
        """Runs of the model's fixed batch, the last filled up with copies of its last sample."""
        size = self.batch or len(inputs)
        for start in range(0, len(inputs), size):
            chunk = inputs[start : start + size]
            yield np.concatenate([chunk, np.repeat(chunk[-1:], size - len(chunk), axis=0)])

    def _run(self, inputs: Array) -> Array:
        output = providers.run_session(self.session, {self.spec.name: inputs}, self.name)[0]
        scores = (
            output.reshape(output.shape[0], -1) if output.ndim > 2 and output[0].size == output.shape[1] else output
        )
        if scores.ndim != 2 or len(scores) != len(inputs) or scores.shape[1] < 2:
            raise ModelError(
                f"{self.name}: its first output must be class scores ({len(inputs)}, classes), but it is {output.shape}"
            )
        if not np.isfinite(scores).all():
            raise ModelError(
                f"{self.name}: its scores hold NaN or infinite values; the model is broken or its inputs are"
            )
        return scores


class _Tally:
    """Counts that grow batch by batch."""

    def __init__(self) -> None:
        self.samples = self.classes = self.top1 = self.top5 = self.same = 0
        self.divergence = 0.0
        self.labelled = self.compared = False

    def add(self, scores: Array, labels: npt.NDArray[np.int64] | None, against: Array | None) -> None:
        self.samples += len(scores)
        self.classes = scores.shape[1]
        if labels is not None:
            ranks = label_ranks(scores, labels)
            self.labelled = True
            self.top1 += int((ranks == 0).sum())
            self.top5 += int((ranks < 5).sum())
        if against is not None:
            self.compared = True
            self.same += int((scores.argmax(axis=1) == against.argmax(axis=1)).sum())
            self.divergence += float(divergence(against, scores).sum())

    def result(self, provider: str, steps: Preprocessing | None, dataset: Dataset) -> AccuracyResult:
        share = 100 / self.samples
        return AccuracyResult(
            samples=self.samples,
            classes=self.classes,
            top1=self.top1 * share if self.labelled else None,
            top1_interval=wilson_interval(self.top1, self.samples) if self.labelled else None,
            top5=self.top5 * share if self.labelled and self.classes > 5 else None,
            agreement=self.same * share if self.compared else None,
            divergence=self.divergence / self.samples if self.compared else None,
            provider=provider,
            preprocessing=None if steps is None else steps.describe(),
            data_fingerprint=dataset.fingerprint(),
        )


def _steps(dataset: Dataset, model: _Classifier, passed: Preprocessing | None) -> Preprocessing | None:
    """The preprocessing by the rule of the module's docstring."""
    if dataset.kind == "inputs":
        if passed is not None:
            raise UsageError(
                "the data are ready model inputs, so no preprocessing can apply; pass none, or 8-bit images"
            )
        return None
    stored = model.session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if passed is not None:
        return passed
    if stored is not None:
        return Preprocessing.from_metadata(stored)
    if model.spec.dtype == np.uint8:
        return None
    raise UsageError(
        f"{model.name} takes {model.spec} and does not say how 8-bit images become that; pass a preprocessing "
        "(its scale, mean and std), or store ready inputs as float32 in the data"
    )


def _check_labels(labels: npt.NDArray[np.int64] | None, classes: int, model: str | Path) -> None:
    if labels is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"{model} tells {classes} classes apart (0 to {classes - 1}), but the labels run from {low} to {high}"
        )
