"""The accuracy of ONNX models on labelled data, and their distance from a reference on the same samples.

    class scores
    top-1        share of samples whose label has the highest score, or is the model's first class id
                                                                               (percent, Wilson's 95 % interval)
    top-5        share of samples whose label is among the five highest        (percent; None below six classes
                                                                               or five ids)
    agreement    share of samples where model and reference give the same top-1 answer                 (percent)
    divergence   mean over samples of KL(p_reference || p_model), p = softmax(scores)       (nats, bootstrapped)
    paired       McNemar's exact test: is the model right less often than the reference?
                 (`rsi_deploy.evaluation.paired_test`)

    values: embeddings, regressions and other outputs that are not class scores
    cosine       mean cosine to the reference's outputs, sample by sample                         (bootstrapped)
    distance     mean of ||y - y_ref|| / ||y_ref||                                                (bootstrapped)

    next tokens: logits `(n, t, vocabulary)` of a decoder on the windows of a text (`rsi_deploy.evaluation.next_tokens`)
    perplexity   exp(mean surprisal), its ratio to the reference's, and agreement and divergence a token

With labels, outputs are class scores. Without labels they are class scores if the reference's first floating output
looks like them (`scores.are_scores`); cosine and distance are then reported too. Equal scores rank by class number, as
in argmax. Pictures are preprocessed with the user's settings; unset fields come from the settings stored in the model.
Without either, only a model of integers takes pictures unprocessed; any other model is refused, because a guess could
falsify the result. Positions masked by an input with `mask` in its name do not count. Memory holds one batch, and a few
numbers per sample.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds, Interval
from rsi_deploy.data.dataset import LABEL_NAMES, Labels, for_inputs, spaced_rows
from rsi_deploy.data.feeding import Feeding, errors_for_option
from rsi_deploy.data.model_pictures import preset_note
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset, open_data
from rsi_deploy.data.text_data import TextRows
from rsi_deploy.evaluation.accumulator import OutputKind, Scorer, ValueDistance
from rsi_deploy.evaluation.next_tokens import STEPS, TextQuality, TokenScorer, prompts_of
from rsi_deploy.evaluation.paired_test import PairedTest
from rsi_deploy.evaluation.predictor import Predictor
from rsi_deploy.evaluation.zipmap_columns import class_numbers
from rsi_deploy.runtime.feeds.inputs import InputSpec

Progress = Callable[[int, int], None]


class AccuracyResult(BaseModel, frozen=True, extra="forbid"):
    """Results on `samples` samples; shares in percent, 95 % intervals.

    Attributes:
        samples: number of samples; of a decoder, windows of text.
        classes: number of class scores, or tokens of a decoder's vocabulary; 0 for other outputs.
        top1: top-1 accuracy; None without labels.
        top1_interval: interval of `top1`.
        top5: top-5 accuracy; None without labels or below six classes.
        top5_interval: interval of `top5`.
        agreement: agreement with the reference's top-1 answers, of a decoder its next tokens; None without a reference.
        agreement_interval: interval of `agreement`.
        divergence: mean KL divergence from the reference in nats, of a decoder a token; None without a reference.
        divergence_interval: interval of `divergence`.
        paired: comparison of right answers with the reference's; None without labels or reference.
        values: distance of each output from the reference's, if outputs are compared as values.
        text: how well a decoder continues texts; None for other models.
        kind: what the outputs are.
        partial: whether the run was interrupted; `samples` are then the first of the data.
        provider: full name of the provider that ran the model.
        preprocessing: description of the preprocessing; None if the data were ready inputs.
        data_fingerprint: sha256 of all the data, even if `limit` read only a part.
        notes: notes on how pictures became inputs.
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
    text: TextQuality | None = None
    kind: Literal["classes", "values", "tokens"] = "classes"
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
        model: ONNX file.
        data: opened data set, or its name (see `rsi_deploy.data.sources`).
        preprocessing: settings for pictures; unset fields come from the model's metadata.
        provider: short or full name, for the model and the reference.
        batch_size: samples per run. A model with a fixed batch uses that; copies fill up the last batch. A decoder
            takes at most `TextRows.most_rows` windows of text a run, because its logits are large.
        reference: another ONNX file, which runs on the same samples.
        outputs: "classes" or "values" states what the outputs are; "auto" decides by labels and output shapes.
        limit: largest number of samples, evenly spaced over the data.
        progress: called with (samples done, samples in total) after each batch.

    Raises:
        UsageError: The data do not fit the model, labels are not among its classes, the preprocessing is unknown, or
            there are neither labels nor a reference. All of this is checked before the long run.
        ModelError: A model cannot be loaded or run, returns no class scores, or returns NaN.
        KeyboardInterrupt: Raised again before the first batch is done; after that the result is partial.
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
        data: as in `evaluate`.
        preprocessing: settings for all models; unset fields come from the last model that stores some.
        provider: provider for all models.
        batch_size: samples per run.
        outputs: kind of the outputs.
        limit: largest number of samples.
        progress: called after each batch.

    Returns:
        One result per model in order; the first has no agreement, divergence or paired test.

    Raises:
        UsageError, ModelError, KeyboardInterrupt: As in `evaluate`.
    """
    run = _Run(models, data, preprocessing, provider, outputs, limit)
    dataset, arms, scorer = run.dataset, run.arms, run.scorer
    total = len(dataset) if limit is None else min(limit, len(dataset))
    batches: list[tuple[Any, ...]] = []
    size = arms[-1].batch or min(batch_size, getattr(dataset, "most_rows", None) or batch_size)
    done, partial, generated = 0, False, None
    try:
        for inputs, labels in run.feeding.inputs(size, limit):
            fed = [own.to_feeds(inputs) for own in run.feedings]
            batch = [arm.outputs(feeds) for arm, feeds in zip(arms, fed, strict=True)]
            if not batches:
                scorer.check(batch)
                run.prove_providers(fed)
            batches.append(scorer.score(batch, run.class_numbers(labels), fed[-1]))
            done += batches[-1][0].samples
            if progress is not None:
                progress(done, total)
        generated = run.greedy_tokens(limit)
    except KeyboardInterrupt:
        if not batches:
            raise
        partial = True
    whole = [type(own[0]).concatenate(own) for own in zip(*batches, strict=True)]
    found = [result.statistics(whole[0] if place else None) for place, result in enumerate(whole)]
    if generated is not None:
        for own, tokens in zip(found[1:], generated[1:], strict=True):
            own["text"] = own["text"].with_greedy(generated[0], tokens)
    fingerprint = dataset.fingerprint()
    return [
        AccuracyResult(
            kind=scorer.kind,
            partial=partial,
            provider=arm.provider,
            preprocessing=None if run.steps is None else run.steps.describe(),
            data_fingerprint=fingerprint,
            notes=(*run.notes, *run.feeding.notes()),
            **statistics,
        )
        for arm, statistics in zip(arms, found, strict=True)
    ]


def check_data(
    models: Sequence[str | Path],
    data: Dataset | str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    provider: str = "cpu",
) -> None:
    """Check on one sample what `evaluate_all` would refuse, for callers whose other work takes long.

    Raises:
        UsageError, ModelError: As in `evaluate`.
    """
    run = _Run(models, data, preprocessing, provider, "auto")
    inputs, _ = next(run.feeding.inputs(1, 1))
    run.scorer.check([arm.outputs(own.to_feeds(inputs)) for arm, own in zip(run.arms, run.feedings, strict=True)])


class _Run:
    """Loaded models that share one pass over the data."""

    def __init__(
        self,
        models: Sequence[str | Path],
        data: Dataset | str | Path,
        preprocessing: Preprocessing | None,
        provider: str,
        outputs: OutputKind,
        limit: int | None = None,
    ):
        self.arms = [Predictor(model, provider) for model in models]
        self.dataset = _opened(data, self.arms[-1])
        text = None if outputs != "auto" else self._continued_text()
        if self.dataset.labels is None and len(models) == 1 and text is None:
            raise UsageError(
                "the data have no labels and there is no reference: nothing to compare the answers with",
                hint=f"give labels{_taken_labels(self.arms[-1])}, or a second model (eval: --reference DENSE.onnx)",
            )
        self.steps, self.notes = picture_steps(self.dataset, self.arms, preprocessing)
        self.feeding = Feeding(self.dataset, self.arms[-1].specs, self.steps, model=self.arms[-1].name)
        self.feedings = [Feeding(self.feeding.dataset, arm.specs, self.steps, model=arm.name) for arm in self.arms]
        names, classes = [arm.name for arm in self.arms], getattr(self.dataset, "classes", ())
        self.scorer: Scorer | TokenScorer
        if text is not None:
            self.scorer = TokenScorer(names, text.ids, text.documents[spaced_rows(len(text), 1, limit)])
            return
        self.scorer = Scorer(names, self.class_numbers(self.dataset.labels), classes, outputs, self.arms[-1].ids)

    def _continued_text(self) -> TextRows | None:
        """Return the windows of text that the models continue; None if they are no decoders with logits."""
        text = self.dataset
        if not isinstance(text, TextRows) or not text.is_decoder:
            return None
        return text if all(arm.has_logits for arm in self.arms) else None

    def greedy_tokens(self, limit: int | None) -> list[npt.NDArray[np.int64]] | None:
        """Return what each of several decoders generates after the beginnings of some documents; None if one cannot."""
        text = self.dataset
        if self.scorer.kind != "tokens" or not isinstance(text, TextRows) or len(self.arms) < 2:
            return None
        prompts = prompts_of(text, spaced_rows(len(text), 1, limit))
        if not len(prompts):
            return None
        found = [tokens for arm in self.arms if (tokens := arm.greedy(prompts, STEPS)) is not None]
        return found if len(found) == len(self.arms) else None

    def class_numbers(self, labels: Labels | None) -> Labels | None:
        """Return the score columns that the labels stand for."""
        return class_numbers(labels, self.arms[-1].column_classes, self.arms[-1].name)

    def prove_providers(self, fed: Sequence[Feeds]) -> None:
        for arm, feeds in zip(self.arms, fed, strict=True):
            arm.prove_provider(feeds)


def _opened(data: Dataset | str | Path, arm: Predictor) -> Dataset:
    """Open the data for a model; arrays with the name of one of its inputs are not labels."""
    if isinstance(data, str | Path):
        return open_data(data, specs=arm.specs)
    with errors_for_option("--data"):
        return for_inputs(data, arm.specs)


def _taken_labels(arm: Predictor) -> str:
    """Say which name is free for labels if an input of the model has the usual one."""
    taken = [spec.name for spec in arm.specs if spec.name in LABEL_NAMES]
    free = next((name for name in LABEL_NAMES if name not in taken), "")
    return f" under the name {free} ({', '.join(taken)} is an input of the model)" if taken and free else ""


def picture_steps(
    dataset: Dataset,
    arms: Sequence[Predictor],
    passed: Preprocessing | None,
    else_do: str = "or store ready inputs as float32 in the data",
) -> tuple[Preprocessing | None, list[str]]:
    """Return the preprocessing by the rules in the module's docstring, and notes on how it changes the size.

    Args:
        dataset: data.
        arms: models; the last one has priority.
        passed: fields that override the stored ones.
        else_do: advice for the error if there is no preprocessing.

    Raises:
        UsageError: There is a preprocessing for ready inputs, or none for a model that needs one.
    """
    if dataset.kind != "images":
        if passed is not None:
            raise UsageError(
                "the data are ready model inputs, so no preprocessing can apply",
                hint="pass none (leave out --mean, --std, --resize, --crop, --layout), or pictures",
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
        f"{subject.name} takes {subject.specs[0]} and does not say how 8-bit images become that",
        hint=f"pass a preprocessing (--mean, --std, ...), {else_do}",
    )


def _takes_raw(spec: InputSpec) -> bool:
    """Return whether an input takes unprocessed pictures, or integers `(N, ..., ...)` that only look like pictures."""
    return spec.dtype in (np.uint8, np.uint16) or (spec.dtype.kind in "iu" and len(spec.shape) == 3)
