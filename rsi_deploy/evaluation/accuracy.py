"""How often ONNX models are right on labelled data, and how far they are from a reference, on the same samples.

    class scores
    top-1        share of samples whose label has the highest score, or is the first class id that a model gives
                                                                               (percent, Wilson's 95 % interval)
    top-5        share of samples whose label is among the five highest        (percent; None below six classes
                                                                               or five ids)
    agreement    share of samples where model and reference give the same top-1 answer                 (percent)
    divergence   mean over samples of KL(p_reference || p_model), p = softmax(scores)       (nats, bootstrapped)
    paired       McNemar's exact test: is the model right less often than the reference?
                 (`rsi_deploy.evaluation.paired_test`)

    values: embeddings, regressions, whatever is no class score
    cosine       mean cosine to the reference's outputs, sample by sample                         (bootstrapped)
    distance     mean of ||y - y_ref|| / ||y_ref||                                                (bootstrapped)

Outputs are class scores where there are labels; without labels where the reference's first floating output looks like
them (`scores.are_scores`), and then cosine and distance are told as well. Equal scores rank by class number, as argmax
does. Pictures go through the preprocessing that was passed; fields that it does not set come from the one stored in the
model. Without both they stay as they are, which is right only for a model of integers; any other model is refused,
since to guess would falsify the result. Positions that an input with `mask` in its name masks away do not count. One
batch is in memory at a time, with a few numbers for every sample.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.dataset import LABEL_NAMES, Labels, for_inputs
from rsi_deploy.data.feeding import Feeding, errors_for_option
from rsi_deploy.data.model_pictures import preset_note
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset, open_data
from rsi_deploy.evaluation.accumulator import OutputKind, Scorer, Tally, ValueDistance
from rsi_deploy.evaluation.intervals import Interval
from rsi_deploy.evaluation.paired_test import PairedTest
from rsi_deploy.evaluation.predictor import Answers
from rsi_deploy.evaluation.zipmap_columns import class_numbers
from rsi_deploy.runtime.feeds.inputs import InputSpec

Progress = Callable[[int, int], None]


class AccuracyResult(BaseModel, frozen=True, extra="forbid"):
    """What was found on `samples` samples; shares in percent, intervals of 95 %.

    Attributes:
        samples: how many were read.
        classes: scores a sample; 0 where the outputs are no class scores.
        top1: None without labels.
        top1_interval: of it.
        top5: None without labels or below six classes.
        top5_interval: of it.
        agreement: with the reference's top-1 answers; None without a reference.
        agreement_interval: of it.
        divergence: mean KL divergence from the reference, nats; None without a reference.
        divergence_interval: of it.
        paired: right answers against the reference's; None without labels or reference.
        values: distance of each output to the reference's, where outputs are compared as values.
        kind: whether the outputs are class scores.
        partial: interrupted; `samples` are the first of the data then.
        provider: full name of the one that ran the model.
        preprocessing: in words; None where the data were ready inputs.
        data_fingerprint: sha256 of all the data, also where `limit` read a part.
        notes: what a reader should know of how pictures became inputs.
    """

    samples: int
    classes: int
    top1: float | None
    top1_interval: Interval | None
    top5: float | None
    top5_interval: Interval | None = None
    agreement: float | None
    agreement_interval: Interval | None = None
    divergence: float | None
    divergence_interval: Interval | None = None
    paired: PairedTest | None = None
    values: tuple[ValueDistance, ...] = ()
    kind: Literal["classes", "values"] = "classes"
    partial: bool = False
    provider: str
    preprocessing: str | None
    data_fingerprint: str
    notes: tuple[str, ...] = ()


def evaluate(
    model: str | Path,
    data: Dataset | str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    provider: str = "cpu",
    batch_size: int = 64,
    reference: str | Path | None = None,
    outputs: OutputKind = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
) -> AccuracyResult:
    """Run a model over the data, batch by batch.

    Args:
        model: an ONNX file.
        data: an opened data set, or its name (see `rsi_deploy.data.sources`).
        preprocessing: for pictures; fields that are not set come from what the model's metadata carries.
        provider: short or full name, for the model and the reference.
        batch_size: samples a run. A model with a fixed batch gets that one, the last filled up with copies.
        reference: another ONNX file, fed with the same samples.
        outputs: "classes" or "values" says what the outputs are; "auto" decides by labels and looks.
        limit: at most so many samples, evenly spaced over the data.
        progress: called with (samples done, samples in all) after each batch.

    Raises:
        UsageError: data that do not fit the model, labels outside its classes, no preprocessing known, neither
            labels nor reference; all of it before the long run.
        ModelError: a model cannot be loaded or run, gives no class scores, or gives NaN.
        KeyboardInterrupt: again, before the first batch is done; later the result is partial.
    """
    return evaluate_all(
        [model] if reference is None else [reference, model],
        data,
        preprocessing=preprocessing,
        provider=provider,
        batch_size=batch_size,
        outputs=outputs,
        limit=limit,
        progress=progress,
    )[-1]


def evaluate_all(
    models: Sequence[str | Path],
    data: Dataset | str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    provider: str = "cpu",
    batch_size: int = 64,
    outputs: OutputKind = "auto",
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[AccuracyResult]:
    """Run models over the data in one pass; the first is the reference of the others.

    Args:
        models: ONNX files with the same inputs and outputs.
        data: as in `evaluate`, like the others.
        preprocessing: for all of them; fields that are not set come from the last of them that carries one.
        provider: for all of them.
        batch_size: samples a run.
        outputs: what the outputs are.
        limit: at most so many samples.
        progress: called after each batch.

    Returns:
        One result a model, in their order; the first has no agreement, divergence or paired test.

    Raises:
        UsageError, ModelError, KeyboardInterrupt: as in `evaluate`.
    """
    run = _Run(models, data, preprocessing, provider, outputs)
    dataset, arms, scorer = run.dataset, run.arms, run.scorer
    total = len(dataset) if limit is None else min(limit, len(dataset))
    tallies: list[tuple[Tally, ...]] = []
    done, partial = 0, False
    try:
        for inputs, labels in run.feeding.inputs(arms[-1].batch or batch_size, limit):
            fed = [own.to_feeds(inputs) for own in run.feedings]
            batch = [arm.outputs(feeds) for arm, feeds in zip(arms, fed, strict=True)]
            if not tallies:
                scorer.check(batch)
                run.prove_providers(fed)
            tallies.append(scorer.tally(batch, run.class_numbers(labels), fed[-1]))
            done += tallies[-1][0].samples
            if progress is not None:
                progress(done, total)
    except KeyboardInterrupt:
        if not tallies:
            raise
        partial = True
    whole = [Tally.joined(own) for own in zip(*tallies, strict=True)]
    fingerprint = dataset.fingerprint()
    return [
        AccuracyResult(
            kind=scorer.kind,
            partial=partial,
            provider=arm.provider,
            preprocessing=None if run.steps is None else run.steps.describe(),
            data_fingerprint=fingerprint,
            notes=(*run.notes, *run.feeding.notes()),
            **tally.findings(whole[0] if place else None),
        )
        for place, (arm, tally) in enumerate(zip(arms, whole, strict=True))
    ]


def check_data(
    models: Sequence[str | Path],
    data: Dataset | str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    provider: str = "cpu",
) -> None:
    """Refuse at once, on one sample, what `evaluate_all` would refuse: for callers whose other work takes long.

    Raises:
        UsageError, ModelError: as in `evaluate`.
    """
    run = _Run(models, data, preprocessing, provider, "auto")
    inputs, _ = next(run.feeding.inputs(1, 1))
    run.scorer.check([arm.outputs(own.to_feeds(inputs)) for arm, own in zip(run.arms, run.feedings, strict=True)])


class _Run:
    """Models loaded and fed from one pass over the data."""

    def __init__(
        self,
        models: Sequence[str | Path],
        data: Dataset | str | Path,
        preprocessing: Preprocessing | None,
        provider: str,
        outputs: OutputKind,
    ):
        self.arms = [Answers(model, provider) for model in models]
        self.dataset = _opened(data, self.arms[-1])
        if self.dataset.labels is None and len(models) == 1:
            raise UsageError(
                "the data have no labels and there is no reference: nothing to compare the answers with; give labels"
                f"{_taken_labels(self.arms[-1])}, or a second model (eval: --reference DENSE.onnx)"
            )
        self.steps, self.notes = picture_steps(self.dataset, self.arms, preprocessing)
        self.feeding = Feeding(self.dataset, self.arms[-1].specs, self.steps, model=self.arms[-1].name)
        self.feedings = [Feeding(self.feeding.dataset, arm.specs, self.steps, model=arm.name) for arm in self.arms]
        names, classes = [arm.name for arm in self.arms], getattr(self.dataset, "classes", ())
        self.scorer = Scorer(names, self.class_numbers(self.dataset.labels), classes, outputs, self.arms[-1].ids)

    def class_numbers(self, labels: Labels | None) -> Labels | None:
        """The columns of the scores that the labels stand for."""
        return class_numbers(labels, self.arms[-1].column_classes, self.arms[-1].name)

    def prove_providers(self, fed: Sequence[Feeds]) -> None:
        for arm, feeds in zip(self.arms, fed, strict=True):
            arm.prove_provider(feeds)


def _opened(data: Dataset | str | Path, arm: Answers) -> Dataset:
    """The data for a model: what has the name of one of its inputs is no label."""
    if isinstance(data, str | Path):
        return open_data(data, specs=arm.specs)
    with errors_for_option("--data"):
        return for_inputs(data, arm.specs)


def _taken_labels(arm: Answers) -> str:
    """What must be said where a usual name of labels is that of an input."""
    taken = [spec.name for spec in arm.specs if spec.name in LABEL_NAMES]
    free = next((name for name in LABEL_NAMES if name not in taken), "")
    return f" under the name {free} ({', '.join(taken)} is an input of the model)" if taken and free else ""


def picture_steps(
    dataset: Dataset,
    arms: Sequence[Answers],
    passed: Preprocessing | None,
    else_do: str = "or store ready inputs as float32 in the data",
) -> tuple[Preprocessing | None, list[str]]:
    """The preprocessing by the rule of the module's docstring, and notes on what a model's own does to the size.

    Args:
        dataset: the data.
        arms: the models; the last is the one that counts most.
        passed: fields that go before what the models store.
        else_do: what else helps where there is no preprocessing.

    Raises:
        UsageError: ready inputs with a preprocessing, or a model that needs one and has none.
    """
    if dataset.kind != "images":
        if passed is not None:
            raise UsageError(
                "the data are ready model inputs, so no preprocessing can apply; pass none (leave out --mean, --std, "
                "--resize, --crop, --layout), or pictures"
            )
        return None, []
    subject = arms[-1]
    for arm in reversed(arms):  # the model itself, then its reference
        if (stored := arm.stored_preprocessing()) is not None:
            steps = stored if passed is None else passed.over(stored)
            return steps, preset_note(steps, passed, arm.name)
    if passed is not None:
        return passed, []
    if all(_takes_raw(spec) for spec in subject.specs):
        return None, []
    raise UsageError(
        f"{subject.name} takes {subject.specs[0]} and does not say how 8-bit images become that; pass a preprocessing "
        f"(--mean, --std, ...), {else_do}"
    )


def _takes_raw(spec: InputSpec) -> bool:
    """Whether an input takes pictures as they are, or what only looks like pictures: integers `(N, ..., ...)`."""
    return spec.dtype in (np.uint8, np.uint16) or (spec.dtype.kind in "iu" and len(spec.shape) == 3)
