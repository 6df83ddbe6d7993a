"""The record of a plan in a report: what was foreseen, what the check part shows, and what a search has tried."""

from typing import Literal

import pydantic


class PlanTrial(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A model that was fitted and judged during a search.

    Attributes:
        share: share of the dense model, in the `unit` of the plan.
        value: what was compared with the limit: the one-sided limit on the check part as a fraction, or the drop of
            top-1 in points; None if the model gives no numbers.
        holds: whether it keeps the limit.
    """

    share: float
    value: float | None
    holds: bool


class PlanRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What planning has foreseen and tried.

    Attributes:
        limit: quality that was searched for, as it is typed, or "".
        is_default: whether the limit stands in for a size that was not set.
        is_fastest: whether the search went for time, not for size.
        unit: what the shares of the trials are of.
        trials: models that were fitted and judged, in order.
        delivers_dense: whether the dense model is delivered, because no other one that was tried keeps the limit.
        foreseen: sum of the losses of the chosen options: relative output distance and KL divergence, site by site.
        shown: the same of the whole model, on the check part.
        given_back: sites that became dense again because the check part shows that their splits cost too much.
    """

    limit: str = ""
    is_default: bool = False
    is_fastest: bool = False
    unit: Literal["parameters", "bytes", "time"] = "parameters"
    trials: tuple[PlanTrial, ...] = ()
    delivers_dense: bool = False
    foreseen: float | None = None
    shown: float | None = None
    given_back: tuple[str, ...] = ()

    @property
    def next_smaller(self) -> PlanTrial | None:
        """The largest model tried that does not keep the limit; None if all keep it."""
        return max((trial for trial in self.trials if not trial.holds), key=lambda trial: trial.share, default=None)

    @property
    def worse(self) -> float | None:
        """How many times the loss shown is the one foreseen; None where either is unknown or zero."""
        return self.shown / self.foreseen if self.shown and self.foreseen else None
