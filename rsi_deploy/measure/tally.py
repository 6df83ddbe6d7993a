"""What is noted of every sample while models run, and what it adds up to.

Outputs are compared as class scores (the first floating output, `(n, classes)`), as values (every floating output), or
both: see `rsi_deploy.measure.accuracy`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.measure.dataset import Array, Labels
from rsi_deploy.measure.intervals import Interval, mean_interval, wilson_interval
from rsi_deploy.measure.paired import paired_test
from rsi_deploy.measure.scores import Floats, are_scores, cosine, divergence, label_ranks, relative_distance

OutputKind = Literal["auto", "classes", "values"]
Batch = Sequence[Mapping[str, Array]]  # for every model: output name -> (n, ...)


class ValueDistance(BaseModel, frozen=True, extra="forbid"):
    """One output against the reference's; means over samples with their 95 % intervals.

    Attributes:
        output: its name.
        cosine: mean cosine of the angle between both.
        cosine_interval: of it.
        distance: mean of `||y - y_ref|| / ||y_ref||`.
        distance_interval: of it.
    """

    output: str
    cosine: float
    cosine_interval: Interval
    distance: float
    distance_interval: Interval


@dataclass(frozen=True, kw_only=True)
class Tally:
    """One model's samples.

    Attributes:
        samples: how many.
        classes: scores a sample; 0 without class scores.
        top: class of the highest score, `(n,)`; empty without class scores.
        ranks: of the label among the scores, `(n,)`; empty without labels.
        divergence: KL from the reference, nats, `(n,)`; empty for the reference itself.
        values: output -> cosine and relative distance `(2, n)`; empty for the reference itself.
    """

    samples: int
    classes: int = 0
    top: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    ranks: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    divergence: Floats = field(default_factory=lambda: np.empty(0))
    values: Mapping[str, Floats] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["Tally"]) -> "Tally":
        """Batches one after another."""
        return cls(
            samples=sum(part.samples for part in parts),
            classes=parts[0].classes,
            top=np.concatenate([part.top for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
            divergence=np.concatenate([part.divergence for part in parts]),
            values={name: np.concatenate([p.values[name] for p in parts], axis=1) for name in parts[0].values},
        )

    def findings(self, reference: "Tally | None") -> dict[str, Any]:
        """Shares, means and intervals, by the names of `AccuracyResult`; `reference` is None for itself."""
        count = self.samples
        found: dict[str, Any] = {"samples": count, "classes": self.classes}
        found |= dict.fromkeys(("top1", "top1_interval", "top5", "agreement", "divergence"))
        if len(self.ranks):
            found |= _share("top1", int((self.ranks == 0).sum()), count)
            if self.classes > 5:
                found |= _share("top5", int((self.ranks < 5).sum()), count)
        if reference is None:
            return found
        if self.classes:
            found |= _share("agreement", int((self.top == reference.top).sum()), count)
            found |= {
                "divergence": float(self.divergence.mean()),
                "divergence_interval": mean_interval(self.divergence),
            }
        if len(self.ranks):
            right, before = self.ranks == 0, reference.ranks == 0
            found["paired"] = paired_test(int((before & ~right).sum()), int((right & ~before).sum()), count)
        found["values"] = tuple(
            ValueDistance(
                output=name,
                cosine=float(angles.mean()),
                cosine_interval=mean_interval(angles),
                distance=float(distances.mean()),
                distance_interval=mean_interval(distances),
            )
            for name, (angles, distances) in self.values.items()
        )
        return found


class Scorer:
    """What the outputs of several models are taken for; the first model is the reference.

    Args:
        names: of the models.
        labels: of all the data, or None.
        class_names: as far as the data tell them.
        outputs: what the user says the outputs are.

    Attributes:
        kind: "classes" or "values", known after `check`.
    """

    def __init__(
        self, names: Sequence[str], labels: Labels | None, class_names: Sequence[str], outputs: OutputKind
    ) -> None:
        if outputs == "values" and len(names) < 2:
            raise UsageError("outputs that are values need a reference to be compared with: --reference DENSE.onnx")
        self._names, self._class_names, self._outputs = list(names), list(class_names), outputs
        self._labels = None if outputs == "values" else labels
        self.kind: Literal["classes", "values"] = "classes"
        self._with_values = False

    def check(self, batch: Batch) -> None:
        """Decide on the first batch what the outputs are, and refuse models that do not fit each other or the labels.

        Raises:
            UsageError: models with other outputs than the reference, labels outside the classes.
            ModelError: outputs that are no class scores where labels are given.
        """
        reference = _first(batch[0])
        told = self._labels is not None or self._outputs == "classes"
        is_classes = told or (self._outputs == "auto" and are_scores(reference))
        self.kind = "classes" if is_classes else "values"
        self._with_values = len(batch) > 1 and not told
        for name, outputs in zip(self._names, batch, strict=True):
            first = _first(outputs)
            if is_classes and (first.ndim != 2 or first.shape[1] < 2):
                raise ModelError(
                    f"{name}: its first output must be class scores ({len(first)}, classes), but it is {first.shape}; "
                    "values are compared with a reference: rsi-deploy eval --reference DENSE.onnx --outputs values"
                )
        for name, outputs in zip(self._names[1:], batch[1:], strict=True):
            self._check_shapes(name, outputs, batch[0])
        if is_classes:
            check_labels(self._labels, self._class_names, reference.shape[1], self._names[-1])

    def tally(self, batch: Batch, labels: Labels | None, feeds: Mapping[str, Array]) -> tuple[Tally, ...]:
        """One tally a model of one batch."""
        reference = _first(batch[0])
        for name, outputs in zip(self._names, batch, strict=True):
            _check_finite(name, outputs if self._with_values else {"scores": _first(outputs)})
        found = []
        for place, outputs in enumerate(batch):
            scores = _first(outputs)
            parts: dict[str, Any] = {}
            if self.kind == "classes":
                parts = {"classes": scores.shape[1], "top": scores.argmax(axis=1).astype(np.int32)}
                if self._labels is not None and labels is not None:
                    parts["ranks"] = label_ranks(scores, labels).astype(np.int32)
                if place:
                    parts["divergence"] = divergence(reference, scores)
            if place and self._with_values:
                parts["values"] = {
                    name: np.stack([measure(*pair) for measure in (cosine, relative_distance)])
                    for name, pair in _paired_outputs(batch[0], outputs, feeds).items()
                }
            found.append(Tally(samples=len(scores), **parts))
        return tuple(found)

    def _check_shapes(self, name: str, outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        came, wanted = ([array.shape for array in found.values()] for found in (outputs, reference))
        if self.kind == "classes" and _first(outputs).shape != _first(reference).shape:
            raise UsageError(
                f"{name} gives {_first(outputs).shape[1]} classes, but the reference {self._names[0]} "
                f"{_first(reference).shape[1]}; give the model that it was made from"
            )
        if self._with_values and came != wanted:
            raise UsageError(
                f"{name} gives outputs {came}, but the reference {self._names[0]} {wanted}"
                f"; give the model that it was made from"
            )


def check_labels(labels: Labels | None, class_names: Sequence[str], classes: int, model: str) -> None:
    """Refuse labels that cannot be the model's classes.

    Raises:
        UsageError: labels outside them, or data that name another number of classes; with both numbers.
    """
    if labels is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"{model} tells {classes} classes apart (0 to {classes - 1}), but the labels run from {low} to {high}"
            f"; give data of these classes, or the model's own"
        )
    if class_names and len(class_names) != classes:
        raise UsageError(
            f"{model} tells {classes} classes apart, but the data name {len(class_names)} ({', '.join(class_names[:3])}"
            f"{', ...' * (len(class_names) > 3)}): their numbers are not the model's; for class folders, name all "
            f"{classes} classes in the model's order: DATA#classes=FILE, one a line"
        )


def _check_finite(model: str, outputs: Mapping[str, Array]) -> None:
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise ModelError(
                f"{model}: its output {name} holds NaN or infinite values; the model is broken or its inputs are"
            )


def _first(outputs: Mapping[str, Array]) -> Array:
    """The first floating output; `(n, classes, 1, 1)` becomes `(n, classes)`."""
    array = next(iter(outputs.values()))
    return array.reshape(len(array), -1) if array.ndim > 2 and array[0].size == array.shape[1] else array


def _paired_outputs(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], feeds: Mapping[str, Array]
) -> dict[str, tuple[Array, Array]]:
    """Output -> the reference's and the model's, with zeros where a mask input masks positions away."""
    masks = [a for name, a in feeds.items() if "mask" in name.lower() and a.ndim == 2 and a.dtype.kind in "iub"]
    found = {}
    for (name, ours), theirs in zip(outputs.items(), reference.values(), strict=True):
        fitting = [mask for mask in masks if ours.ndim > 2 and ours.shape[:2] == mask.shape]
        keep: Array | int = 1
        if fitting:
            keep = (fitting[0] != 0).reshape(fitting[0].shape + (1,) * (ours.ndim - 2))
        found[name] = (theirs * keep, ours * keep)
    return found


def _share(name: str, hits: int, count: int) -> dict[str, Any]:
    return {name: 100 * hits / count, f"{name}_interval": wilson_interval(hits, count)}
