"""The quality budget: a limit on what the compressed model's outputs may lose, on samples without labels.

--min-agreement 98%      class scores: share of equal top-1 answers; decoders: of equal next tokens
--max-perplexity +5%     decoders: rise of the perplexity over the dense model's
--max-perplexity 25      decoders: the perplexity itself: the dense model's times the limit of the rise
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

Measure: TypeAlias = Literal["agreement", "cosine", "output_error", "perplexity_ratio", "perplexity"]

OPTIONS: dict[Measure, str] = {
    "agreement": "--min-agreement",
    "cosine": "--min-cosine",
    "output_error": "--max-output-error",
    "perplexity_ratio": "--max-perplexity",
    "perplexity": "--max-perplexity",
}
KINDS: dict[Measure, str] = {
    "agreement": "class scores",
    "cosine": "embeddings",
    "output_error": "any outputs",
    "perplexity_ratio": "decoders that continue a text",
    "perplexity": "decoders that continue a text",
}
DEFAULTS: dict[Measure, float] = {"agreement": 0.99, "cosine": 0.99, "output_error": 0.01, "perplexity_ratio": 1.05}
"""Limits where no size is set."""
ROOM = 2.2
"""Least check samples over those that suffice if all answers are equal; two answers may then differ."""
PERPLEXITY_SLOPE = 10.0
"""Change of the logarithm of a loss with that of the perplexity, a guess that a search corrects by bisection."""
AMPLE = 4.0
"""Check samples over those that suffice, where there are samples beyond the fit part; six answers may then differ."""


@dataclass(frozen=True, kw_only=True)
class QualityBudget:
    """A limit on one measure of the output quality.

    Attributes:
        measure: field of `OutputQuality`.
        limit: smallest share of equal answers or smallest cosine in (0, 1]; largest output error, at least 0; largest
            perplexity, or ratio of perplexities, at least 1.
    """

    measure: Measure
    limit: float

    @classmethod
    def default(cls, measure: Measure) -> "QualityBudget":
        """Return the budget where no size is set."""
        return cls(measure=measure, limit=DEFAULTS[measure])

    @classmethod
    def of_perplexity(cls, text: str) -> "QualityBudget":
        """Read a limit on the perplexity.

        Raises:
            ValueError: It is no number, or below the least possible perplexity.

        Example:
            >>> [QualityBudget.of_perplexity(text).limit for text in ("+5%", "25")]
            [1.05, 25.0]
        """
        is_rise = text.startswith("+") and text.endswith("%")
        limit = 1 + float(text[1:-1]) / 100 if is_rise else float(text)
        if not 1 <= limit < math.inf:
            raise ValueError(f"{text} is no limit on a perplexity")
        return cls(measure="perplexity_ratio" if is_rise else "perplexity", limit=limit)

    @property
    def is_upper(self) -> bool:
        """Whether the measure must stay below the limit."""
        return self.measure in ("output_error", "perplexity_ratio", "perplexity")

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
        if self.is_upper:
            return 0.1 if self.measure == "perplexity" else self.limit - 1
        return (1 - self.limit) if self.measure == "cosine" else 3 * (1 - self.limit) ** 2

    def limit_of(self, quality: "OutputQuality") -> float | None:
        """Return the one-sided limit of the measure, as a fraction; None where there is none."""
        if self.measure == "agreement":
            return None if quality.agreement_at_least is None else quality.agreement_at_least / 100
        if self.measure == "perplexity_ratio":
            return quality.perplexity_ratio_at_most
        if self.measure == "perplexity":
            return quality.perplexity_at_most
        return quality.cosine_at_least if self.measure == "cosine" else quality.output_error_at_most

    def holds(self, limit: float | None) -> bool:
        """Return whether a one-sided limit (`limit_of`) keeps the budget."""
        if limit is None:
            return False
        return limit <= self.limit if self.is_upper else limit >= self.limit

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
        if self.measure == "perplexity_ratio":
            return math.log(max(math.log(limit), 1e-9) / max(math.log(self.limit), 1e-9))
        if self.measure == "perplexity":  # how far the dense model is from the limit is not known here
            return PERPLEXITY_SLOPE * math.log(limit / self.limit)
        ratio = math.log(max(1 - limit, 1e-9) / max(1 - self.limit, 1e-9))
        return ratio if self.measure == "cosine" else 2 * ratio

    def text(self, value: float) -> str:
        """Return a value of the measure as it is typed."""
        if self.measure == "perplexity_ratio":
            return f"{float(f'{100 * (value - 1):.4g}'):+g}%"
        return f"{value:.4g}" if self.measure in ("cosine", "perplexity") else share_text(float(f"{value:.4g}"))

    def __str__(self) -> str:
        return f"{OPTIONS[self.measure]} {self.text(self.limit)}"


def parse_quality(option: str, value: str) -> QualityBudget | None:
    """Return the budget of an option and its value as a report has them; None for another option.

    Raises:
        ValueError: the value is no number.
    """
    for measure, known in OPTIONS.items():
        if option == known and option == OPTIONS["perplexity"]:
            return QualityBudget.of_perplexity(value)
        if option == known:
            number = float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
            return QualityBudget(measure=measure, limit=number)
    return None
