"""The calibration section of a report."""

import pydantic

from rsi_deploy.core.types import Interval

BROKEN_AGREEMENT = 50.0
BROKEN_COSINE = 0.5
BROKEN_ERROR = 0.5
BROKEN_PERPLEXITY = 10.0
"""Times the dense model's perplexity."""
SURE = 0.985
"""Mean largest probability of the dense model from which on samples may be training samples.

ResNet-20 and ResNet-56 reach 0.994 and 0.999 on their CIFAR-10 training images, 0.970 and 0.980 on test images.
"""


class OutputQuality(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The distance of the compressed model's outputs from the dense model's, on some samples.

    An interval holds the value for all data like these samples with 95 % confidence, as does each one-sided limit
    `..._at_least` and `..._at_most`. Values that the outputs do not have are None.

    Attributes:
        samples: number of samples.
        output_error: squared distance of the outputs, relative to their variance over samples, or to their squared
            norm if they do not vary; None if all outputs of the dense model are zero.
        output_error_interval, output_error_at_most: bootstrap over samples.
        divergence: mean KL divergence of the softmax in nats, for class scores.
        divergence_interval: bootstrap over samples.
        agreement: percentage of equal top-1 answers, for class scores.
        agreement_interval: Wilson's interval.
        agreement_at_least: Clopper and Pearson's limit.
        cosine: mean cosine of the angle between both outputs, for embeddings (rows of unit norm).
        cosine_interval, cosine_at_least: bootstrap over samples.
        worst_cosine: 1st percentile of the cosine.
        worst_cosine_interval: bootstrap over samples.
        neighbours: percentage of each sample's 10 nearest neighbours that stay its neighbours, for embeddings. Both
            parts of a record look for them among as many samples, at least 20.
        neighbours_interval: bootstrap over samples.
        confidence: mean largest probability of the dense model, for class scores.
        tokens: number of predicted tokens, for decoders. The samples are then windows of text, agreement counts tokens
            and has intervals over documents, and the divergence and the output error are those of some positions.
        perplexity: perplexity of the compressed model, for decoders.
        perplexity_interval: bootstrap over documents.
        perplexity_at_most: perplexity of the dense model times `perplexity_ratio_at_most`.
        perplexity_ratio: perplexity over that of the dense model, for decoders.
        perplexity_ratio_interval, perplexity_ratio_at_most: bootstrap over documents.
        data_fingerprint: sha256 of the samples as they enter the model.
    """

    samples: int
    output_error: float | None
    output_error_interval: Interval | None = None
    output_error_at_most: float | None = None
    divergence: float | None = None
    divergence_interval: Interval | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None
    agreement_at_least: float | None = None
    cosine: float | None = None
    cosine_interval: Interval | None = None
    cosine_at_least: float | None = None
    worst_cosine: float | None = None
    worst_cosine_interval: Interval | None = None
    neighbours: float | None = None
    neighbours_interval: Interval | None = None
    confidence: float | None = None
    tokens: int | None = None
    perplexity: float | None = None
    perplexity_interval: Interval | None = None
    perplexity_at_most: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_interval: Interval | None = None
    perplexity_ratio_at_most: float | None = None
    data_fingerprint: str

    @property
    def value(self) -> float | None:
        """The agreement in percent, else the mean cosine, else the output error."""
        values = (self.agreement, self.cosine, self.output_error)
        return next((value for value in values if value is not None), None)

    @property
    def is_broken(self) -> bool:
        """Return whether the compressed model answers otherwise than the dense one on most of the data."""
        if self.perplexity_ratio is not None:
            return self.perplexity_ratio > BROKEN_PERPLEXITY
        if self.agreement is not None:
            return (self.agreement_interval or (0, self.agreement))[1] < BROKEN_AGREEMENT
        if self.cosine is not None:
            return self.cosine < BROKEN_COSINE
        return self.output_error is not None and self.output_error > BROKEN_ERROR

    @property
    def is_sure(self) -> bool:
        """Return whether the dense model is as sure of its answers as on training samples."""
        return self.confidence is not None and self.confidence >= SURE


class CalibrationRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The calibration data, and the change of the model's outputs on them.

    Attributes:
        samples: number of samples of the fit part, which factors are fitted to.
        check_samples: number of samples of the check part, which fits nothing.
        is_separate: whether the check part is `--calib-check`, and not a part of `--calib`.
        needed: number of samples of the data of the check part that suffice for a verdict; None if they do.
        checked: quality on the check part; None without any.
        in_sample: quality on at most 512 samples of the fit part. It overstates what other samples keep.
    """

    samples: int
    check_samples: int
    is_separate: bool
    needed: int | None
    checked: OutputQuality | None
    in_sample: OutputQuality

    @property
    def quality(self) -> OutputQuality:
        """The quality on the check part; on the fit part if there is no check part."""
        return self.in_sample if self.checked is None else self.checked

    @property
    def part(self) -> str:
        """The samples of `quality`, in words."""
        return "in-sample" if self.checked is None else "check part"
