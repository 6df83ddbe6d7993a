"""What the report says of calibration."""

import pydantic


class CalibrationRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What calibration was done on, and how far the outputs moved on it.

    Attributes:
        samples: used for fitting.
        checked: of them, used for the numbers below.
        output_error: squared distance of the outputs, relative to their variance over samples (to their size, where
            they do not vary); None where the dense model's are all zero.
        divergence: mean KL of the softmax, nats; None for other outputs than class scores.
        agreement: share of equal top-1 answers in percent; None likewise.
        data_fingerprint: sha256 of the checked samples as they enter the model.
    """

    samples: int
    checked: int
    output_error: float | None
    divergence: float | None
    agreement: float | None
    data_fingerprint: str
