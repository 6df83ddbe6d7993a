"""The calibration section of a report."""

import pydantic


class CalibrationRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The calibration data, and the change of the model's outputs on it.

    Attributes:
        samples: number of samples that factors are fitted to.
        checked: number of these samples that the values below are computed on.
        output_error: squared distance of the outputs, relative to their variance over samples, or to their squared
            norm if they do not vary; None if all outputs of the dense model are zero.
        divergence: mean KL divergence of the softmax in nats; None if the outputs are not class scores.
        agreement: percentage of equal top-1 answers; None if the outputs are not class scores.
        data_fingerprint: sha256 of the checked samples as they enter the model.
    """

    samples: int
    checked: int
    output_error: float | None
    divergence: float | None
    agreement: float | None
    data_fingerprint: str
