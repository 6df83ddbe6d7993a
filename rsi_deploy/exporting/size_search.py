"""Find the smallest or fastest model that keeps a limit, by bisection on its share of the dense model.

    1.00  the dense model keeps every limit
    0.74  keeps it: the answer
    0.73  does not keep it
    0.31  the smallest that any plan comes to

Every point is planned, fitted and judged as it would be delivered. The losses that the planner foresees give the first
point. They are no measure of the answer: they add up what sites do alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rsi_deploy.planning.decide import Decisions, Planned
from rsi_deploy.planning.record import PlanTrial

STEPS = 8
"""Most models that are fitted."""
CLOSE = 0.006
"""Difference of the shares of the answer and of the next smaller point at which the search ends."""


@dataclass(kw_only=True)
class SizeSearch:
    """A search over shares of the dense model.

    Attributes:
        plan: function that plans for a share.
        foreseen: function that returns the foreseen loss of decisions.
        splits: function that returns the splits of decisions, site name -> (form, rank).
        fit: function that fits the factors of decisions.
        judge: function that returns the value of a model, and whether it keeps the limit.
        smallest: share of the smallest plan.
        aim: foreseen loss of the first point.
        trials: models that were fitted and judged, in order.
    """

    plan: Callable[[float], Decisions]
    foreseen: Callable[[Decisions], float]
    splits: Callable[[Decisions], Mapping[str, Any]]
    fit: Callable[[Decisions], Planned]
    judge: Callable[[Planned], tuple[float | None, bool]]
    smallest: float
    aim: float
    trials: list[PlanTrial] = field(default_factory=list)

    def run(self) -> Planned | None:
        """Return the model of the smallest share that keeps the limit; None if none does that was tried."""
        low, high, best = self.smallest, 1.0, None
        seen: dict[frozenset[Any], tuple[Planned | None, bool]] = {}
        share = self._first(low)
        while len(self.trials) < STEPS and high - low > CLOSE:
            decisions = self.plan(share)
            key = frozenset(self.splits(decisions).items())
            if not key:  # the plan is the dense model
                made, holds = None, True
            elif key in seen:
                made, holds = seen[key]
            else:
                fitted = self.fit(decisions)
                value, holds = self.judge(fitted)
                self.trials.append(PlanTrial(share=share, value=value, holds=holds))
                made = fitted
                seen = {k: (m if m is best else None, h) for k, (m, h) in seen.items()} | {key: (made, holds)}
            if holds:
                high, best = share, made if made is not None else best
            else:
                low = share
            share = (low + high) / 2
        return best

    def _first(self, low: float) -> float:
        """Return the smallest share whose plan foresees the loss `aim`, within the middle of what is possible."""
        least, most = low, 1.0
        for _ in range(6):
            middle = (least + most) / 2
            least, most = (middle, most) if self.foreseen(self.plan(middle)) > self.aim else (least, middle)
        edge = (1 - low) / 4
        return min(max(most, low + edge), 1 - edge)
