"""Per-sample results of several models, and the statistics over all samples.

Outputs are compared as class scores (the first floating output, `(n, classes)`), as class ids (an integer for each
sample, or a ranking of them), as values (every floating output), or both; see `rsi_deploy.evaluation.accuracy`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Array, Floats, Interval
from rsi_deploy.data.dataset import Labels
from rsi_deploy.evaluation.intervals import mean_interval, wilson_interval
from rsi_deploy.evaluation.paired_test import paired_test
from rsi_deploy.evaluation.scores import are_scores, cosine, divergence, id_ranks, label_ranks, relative_distance

if TYPE_CHECKING:
    from rsi_deploy.evaluation.answer_outputs import ClassIds

OutputKind = Literal["auto", "classes", "values"]
Batch = Sequence[Mapping[str, Array]]  # for each model: output name -> (n, ...)


class ValueDistance(BaseModel, frozen=True, extra="forbid"):
    """An output compared with the reference's; means over samples with their 95 % intervals.

    Attributes:
        output: name of the output.
        cosine: mean cosine of the angle between both.
        cosine_interval: interval of `cosine`.
        distance: mean of `||y - y_ref|| / ||y_ref||`.
        distance_interval: interval of `distance`.
    """

    output: str
    cosine: float
    cosine_interval: Interval
    distance: float
    distance_interval: Interval


@dataclass(frozen=True, kw_only=True)
class SampleResults:
    """Results of one model, one entry per sample.

    Attributes:
        samples: number of samples.
        classes: number of class scores; 0 without class scores.
        top: class of the highest score, or the first class id, `(n,)`; empty without either.
        places: number of ids in a ranking; 0 without class ids.
        ranks: rank of the label among the scores or ids, `(n,)`; empty without labels.
        same: share of a sample's class ids that equal the reference's (only the first of a ranking counts), `(n,)`;
            empty for the reference, or without ids.
        divergence: KL divergence from the reference in nats, `(n,)`; empty for the reference.
        values: output -> cosine and relative distance `(2, n)`; empty for the reference.
    """

    samples: int
    classes: int = 0
    top: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    places: int = 0
    ranks: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    same: Floats = field(default_factory=lambda: np.empty(0))
    divergence: Floats = field(default_factory=lambda: np.empty(0))
    values: Mapping[str, Floats] = field(default_factory=dict)

    @classmethod
    def concatenate(cls, parts: Sequence["SampleResults"]) -> "SampleResults":
        """Concatenate the results of batches."""
        return cls(
            samples=sum(part.samples for part in parts),
            classes=parts[0].classes,
            top=np.concatenate([part.top for part in parts]),
            places=parts[0].places,
            same=np.concatenate([part.same for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
            divergence=np.concatenate([part.divergence for part in parts]),
            values={name: np.concatenate([p.values[name] for p in parts], axis=1) for name in parts[0].values},
        )

    def statistics(self, reference: "SampleResults | None") -> dict[str, Any]:
        """Return shares, means and intervals by the names in `AccuracyResult`; `reference` is None for itself."""
        count = self.samples
        found: dict[str, Any] = {"samples": count, "classes": self.classes}
        found |= dict.fromkeys(("top1", "top1_interval", "top5", "agreement", "divergence"))
        if len(self.ranks):
            found |= _share("top1", int((self.ranks == 0).sum()), count)
            if self.places >= 5 or (self.classes > 5 and not self.places):
                found |= _share("top5", int((self.ranks < 5).sum()), count)
        if reference is None:
            return found
        if len(self.same):
            found |= {"agreement": 100 * float(self.same.mean()), "agreement_interval": _interval(self.same)}
        elif self.classes:
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
    """Interprets and scores the outputs of several models, the first of which is the reference.

    Args:
        names: names of the models.
        labels: labels of all the data, or None.
        class_names: class names, if the data have them.
        outputs: kind of the outputs as the user gives it.
        ids: output of class ids of the last model, if it is known.

    Attributes:
        kind: "classes" or "values", known after `check`.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Labels | None,
        class_names: Sequence[str],
        outputs: OutputKind,
        ids: "ClassIds | None" = None,
    ) -> None:
        if outputs == "values" and len(names) < 2:
            raise UsageError("outputs that are values need a reference to be compared with: --reference DENSE.onnx")
        self._names, self._class_names, self._outputs = list(names), list(class_names), outputs
        self._labels = None if outputs == "values" else labels
        self.kind: Literal["classes", "values"] = "classes"
        self._ids, self._is_known = ids, self._labels is not None or outputs == "classes"
        self._with_values = self._with_ids = False

    def check(self, batch: Batch) -> None:
        """Decide from the first batch what the outputs are, and check that models and labels fit together.

        Raises:
            UsageError: A model's outputs differ from the reference's, or labels are not among the classes.
            ModelError: There are labels, but outputs are neither class scores nor class ids.
        """
        answers = [self._answer(outputs) for outputs in batch]
        self._with_ids = self._outputs != "values" and any(answer.dtype.kind != "f" for answer in answers)
        if self._outputs == "values" and not all(_floats(outputs) for outputs in batch):
            raise UsageError("the outputs are only class ids, not values: leave out --outputs values")
        looks_like_scores = self._outputs == "auto" and (self._with_ids or are_scores(answers[0]))
        self.kind = "classes" if self._is_known or looks_like_scores else "values"
        # One model's ids may be compared with another one's scores, which has no such values.
        alike = len({tuple(array.shape for array in _floats(outputs).values()) for outputs in batch}) == 1
        self._with_values = len(batch) > 1 and not self._is_known and (alike or not self._with_ids)
        for name, answer in zip(self._names, answers, strict=True):
            if self.kind == "classes":
                self._check_answer(name, answer)
        for place, name in enumerate(self._names[1:], start=1):
            self._check_shapes(name, batch[place], batch[0])
        if self.kind == "classes":
            known = (self._ids.classes if self._ids is not None else 0) if self._with_ids else answers[0].shape[1]
            check_labels(self._labels, self._class_names, known, self._names[-1])

    def score(self, batch: Batch, labels: Labels | None, feeds: Mapping[str, Array]) -> tuple[SampleResults, ...]:
        """Return the results of one batch for each model."""
        answers = [self._answer(outputs) for outputs in batch]
        for name, outputs, answer in zip(self._names, batch, answers, strict=True):
            _check_finite(name, _floats(outputs) if self._with_values else {"scores": answer})
        found = []
        for place, (outputs, answer) in enumerate(zip(batch, answers, strict=True)):
            parts: dict[str, Any] = {}
            if self.kind == "classes":
                parts = self._classes(answer, labels)
                if place and self._with_ids:
                    parts["same"] = _same_ids(answers[0], answer, first_alone=self._is_ranked)
                elif place:
                    parts["divergence"] = divergence(answers[0], answer)
            if place and self._with_values:
                parts["values"] = {
                    name: np.stack([measure(*pair) for measure in (cosine, relative_distance)])
                    for name, pair in _paired_outputs(_floats(batch[0]), _floats(outputs), feeds).items()
                }
            found.append(SampleResults(samples=len(answer), **parts))
        return tuple(found)

    def _answer(self, outputs: Mapping[str, Array]) -> Array:
        """Return the output to score: the first, or with labels an integer output if the first is not scores."""
        if self._outputs == "values":
            outputs = _floats(outputs) or outputs
        first = _first(outputs)
        whole = [array for array in outputs.values() if array.dtype.kind != "f"]
        is_scores = first.ndim == 2 and first.shape[1] > 1
        return whole[0] if self._is_known and not is_scores and whole else first

    @property
    def _is_ranked(self) -> bool:
        return self._ids is not None and self._ids.ranked

    def _classes(self, answer: Array, labels: Labels | None) -> dict[str, Any]:
        """Return the results that belong to class scores or class ids."""
        labels = None if self._labels is None else labels
        if not self._with_ids:
            parts: dict[str, Any] = {"classes": answer.shape[1], "top": answer.argmax(axis=1)}
            return parts if labels is None else parts | {"ranks": label_ranks(answer, labels).astype(np.int32)}
        ids = _as_ids(answer)
        parts = {"classes": self._ids.classes if self._ids is not None else 0, "top": ids[:, 0], "places": ids.shape[1]}
        return parts if labels is None else parts | {"ranks": id_ranks(ids, labels).astype(np.int32)}

    def _check_answer(self, name: str, answer: Array) -> None:
        """Refuse an output that is neither class scores nor, with labels, one class id or ranking per sample."""
        if answer.dtype.kind == "f" and (answer.ndim != 2 or answer.shape[1] < 2):
            raise ModelError(
                f"{name}: its first output must be class scores ({len(answer)}, classes), but it is {answer.shape}",
                hint="values are compared with a reference: rsi-deploy eval --reference DENSE.onnx --outputs values",
            )
        is_single = self._is_ranked or answer.size == len(answer)
        if answer.dtype.kind != "f" and self._labels is not None and not is_single:
            raise ModelError(
                f"{name}: with labels it must return class scores or one class id per sample, but it returns "
                f"integers of shape {answer.shape}",
                hint="compare them with a reference instead, on data without labels: --reference DENSE.onnx",
            )

    def _check_shapes(self, name: str, outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        if self.kind == "classes" and not self._with_ids:
            ours, theirs = self._answer(outputs).shape, self._answer(reference).shape
            if ours != theirs:
                raise UsageError(
                    f"{name} gives {ours[1]} classes, but the reference {self._names[0]} {theirs[1]}",
                    hint="give the model that it was made from",
                )
        actual, expected = ([array.shape for array in _floats(found).values()] for found in (outputs, reference))
        if self._with_values and actual != expected:
            raise UsageError(
                f"{name} gives outputs {actual}, but the reference {self._names[0]} {expected}",
                hint="give the model that it was made from",
            )
        if self._with_ids:
            ours, theirs = (_as_ids(self._answer(found)).shape for found in (outputs, reference))
            if 1 not in (ours[1], theirs[1]) and ours != theirs:
                raise UsageError(
                    f"{name} gives {ours[1]} class ids per sample, but the reference {self._names[0]} {theirs[1]}",
                    hint="give the model that it was made from",
                )


def check_labels(labels: Labels | None, class_names: Sequence[str], classes: int, model: str) -> None:
    """Refuse labels that are not among the model's classes; `classes` is 0 if their number is unknown.

    Raises:
        UsageError: A label is out of range, or the data name another number of classes.
    """
    if labels is None:
        return
    low, high = int(labels.min()), int(labels.max())
    if not classes:  # the model does not say how many classes it has
        if low < 0:
            raise UsageError(f"{model} gives class ids, but the labels start at {low}", hint="give labels of 0 or more")
        return
    if low < 0 or high >= classes:
        raise UsageError(
            f"{model} has {classes} classes (0 to {classes - 1}), but the labels range from {low} to {high}",
            hint="give data of these classes, or the model's own",
        )
    if class_names and len(class_names) != classes:
        raise UsageError(
            f"{model} has {classes} classes, but the data name {len(class_names)} "
            f"({', '.join(class_names[:3])}{', ...' * (len(class_names) > 3)}), so their numbers differ",
            hint=f"for class folders, list all {classes} classes in the model's order: DATA#classes=FILE, one per line",
        )


def _check_finite(model: str, outputs: Mapping[str, Array]) -> None:
    for name, array in outputs.items():
        if not np.isfinite(array).all():
            raise ModelError(
                f"{model}: its output {name} has NaN or infinite values", hint="the model or its inputs are invalid"
            )


def _first(outputs: Mapping[str, Array]) -> Array:
    """Return the first floating output; `(n, classes, 1, 1)` becomes `(n, classes)`."""
    array = next(iter(outputs.values()))
    return array.reshape(len(array), -1) if array.ndim > 2 and array[0].size == array.shape[1] else array


def _floats(outputs: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in outputs.items() if array.dtype.kind == "f"}


def _as_ids(answer: Array) -> npt.NDArray[np.int64]:
    """Return class ids `(n, places)`; for class scores, the best class."""
    found = answer.argmax(axis=1) if answer.dtype.kind == "f" else answer
    return found.reshape(len(answer), -1).astype(np.int64)


def _same_ids(reference: Array, answer: Array, *, first_alone: bool) -> Floats:
    """Return the share of each sample's ids that equal the reference's at the same place, or only the first id's."""
    ours, theirs = _as_ids(answer), _as_ids(reference)
    places = 1 if first_alone else min(ours.shape[1], theirs.shape[1])
    return np.asarray((ours[:, :places] == theirs[:, :places]).mean(axis=1), np.float64)


def _interval(shares: Floats) -> Interval:
    """Return the interval of a mean of shares in percent; Wilson's if each share is 0 or 1."""
    if np.isin(shares, (0, 1)).all():
        return wilson_interval(int(shares.sum()), len(shares))
    low, high = mean_interval(shares)
    return 100 * low, 100 * high


def _paired_outputs(
    reference: Mapping[str, Array], outputs: Mapping[str, Array], feeds: Mapping[str, Array]
) -> dict[str, tuple[Array, Array]]:
    """Return the reference's and the model's array of each output, with zeros at masked positions."""
    found = {}
    for (name, ours), theirs in zip(outputs.items(), reference.values(), strict=True):
        keep = shown_positions(ours, feeds)
        found[name] = (theirs * keep, ours * keep)
    return found


def shown_positions(output: Array, feeds: Mapping[str, Array]) -> Array:
    """Return which positions of an output `(n, L, ...)` are no padding, bool, with sizes that broadcast to the output.

    Padding is what an input with `mask` in its name marks by 0.
    """
    masks = [a for name, a in feeds.items() if "mask" in name.lower() and a.ndim == 2 and a.dtype.kind in "iub"]
    fitting = next((mask for mask in masks if output.ndim > 2 and output.shape[:2] == mask.shape), None)
    if fitting is None:
        return np.ones((len(output), *[1] * (output.ndim - 1)) if output.ndim else (), bool)
    shown: Array = (fitting != 0).reshape(*fitting.shape, *[1] * (output.ndim - 2))
    return shown


def _share(name: str, hits: int, count: int) -> dict[str, Any]:
    return {name: 100 * hits / count, f"{name}_interval": wilson_interval(hits, count)}
