"""The quality budget: a limit on what the compressed model's outputs may lose, on samples without labels.

--min-agreement 98%      class scores: share of equal top-1 answers
--min-cosine 0.98        embeddings: mean cosine of the angle between both outputs
--max-output-error 3%    any outputs: squared distance, relative to their variance over samples

A budget is kept if the one-sided 95 % limit of its measure on the check part keeps it.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from rsi_deploy.core.units import share_text

if TYPE_CHECKING:
    from rsi_deploy.calibration.record import OutputQuality

Measure: TypeAlias = Literal["agreement", "cosine", "output_error"]

OPTIONS: dict[Measure, str] = {
    "agreement": "--min-agreement",
    "cosine": "--min-cosine",
    "output_error": "--max-output-error",
}
KINDS: dict[Measure, str] = {"agreement": "class scores", "cosine": "embeddings", "output_error": "any outputs"}
DEFAULTS: dict[Measure, float] = {"agreement": 0.99, "cosine": 0.99, "output_error": 0.01}
"""Limits where no size is set."""
ROOM = 2.2
"""Least check samples over those that suffice if all answers are equal; two answers may then differ."""
AMPLE = 4.0
"""Check samples over those that suffice, where there are samples beyond the fit part; six answers may then differ."""


@dataclass(frozen=True, kw_only=True)
class QualityBudget:
    """A limit on one measure of the output quality.

    Attributes:
        measure: field of `OutputQuality`.
        limit: smallest share of equal answers or smallest cosine in (0, 1], or largest output error, at least 0.
    """

    measure: Measure
    limit: float

    @classmethod
    def default(cls, measure: Measure) -> "QualityBudget":
        """Return the budget where no size is set."""
        return cls(measure=measure, limit=DEFAULTS[measure])

    @property
    def setting(self) -> str:
        """Name of the setting."""
        return OPTIONS[self.measure].removeprefix("--").replace("-", "_")

    @property
    def needed(self) -> int | None:
        """Number of check samples that suffice if all answers are equal; None where no such number is known.

        Example:
            >>> QualityBudget(measure="agreement", limit=0.99).needed, QualityBudget(measure="cosine", limit=0.9).needed
            (299, None)
        """
        if self.measure != "agreement" or self.limit >= 1:
            return None
        return math.ceil(round(math.log(0.05) / math.log(self.limit), 9))

    def check_size(self, beyond: int) -> int | None:
        """Return the number of check samples to take; None for the usual number.

        Args:
            beyond: number of samples beyond the fit part.

        Examples:
            >>> budget = QualityBudget(measure="agreement", limit=0.99)
            >>> budget.check_size(0), budget.check_size(976), budget.check_size(50_000)
            (658, 976, 1196)
        """
        if self.needed is None:
            return None
        return max(math.ceil(ROOM * self.needed), min(beyond, math.ceil(AMPLE * self.needed)))

    @property
    def foreseen(self) -> float:
        """A foreseen loss (relative output distance + KL divergence) that may be about right, to start a search at."""
        if self.measure == "output_error":
            return self.limit / 3
        return (1 - self.limit) if self.measure == "cosine" else 3 * (1 - self.limit) ** 2

    def limit_of(self, quality: "OutputQuality") -> float | None:
        """Return the one-sided limit of the measure, as a fraction; None where there is none."""
        if self.measure == "agreement":
            return None if quality.agreement_at_least is None else quality.agreement_at_least / 100
        return quality.cosine_at_least if self.measure == "cosine" else quality.output_error_at_most

    def holds(self, limit: float | None) -> bool:
        """Return whether a one-sided limit (`limit_of`) keeps the budget."""
        if limit is None:
            return False
        return limit <= self.limit if self.measure == "output_error" else limit >= self.limit

    def excess(self, limit: float | None) -> float:
        """Return the logarithm of a model's loss over the largest allowed one, from its one-sided limit.

        It is on the scale of foreseen losses, with which the share of other answers rises as a square root.

        Example:
            >>> round(QualityBudget(measure="cosine", limit=0.99).excess(0.9), 3)
            2.303
        """
        if limit is None:
            return math.log(1000)
        if self.measure == "output_error":
            return math.log(max(limit, 1e-9) / max(self.limit, 1e-9))
        ratio = math.log(max(1 - limit, 1e-9) / max(1 - self.limit, 1e-9))
        return ratio if self.measure == "cosine" else 2 * ratio

    def text(self, value: float) -> str:
        """Return a value of the measure as it is typed."""
        return f"{value:.4g}" if self.measure == "cosine" else share_text(float(f"{value:.4g}"))

    def __str__(self) -> str:
        return f"{OPTIONS[self.measure]} {self.text(self.limit)}"


def parse_quality(option: str, value: str) -> QualityBudget | None:
    """Return the budget of an option and its value as a report has them; None for another option.

    Raises:
        ValueError: the value is no number.
    """
    for measure, known in OPTIONS.items():
        if option == known:
            number = float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
            return QualityBudget(measure=measure, limit=number)
    return None
