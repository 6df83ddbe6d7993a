"""Root finding for a noisy, possibly discontinuous response: choose the next value to plan for.

 reached |                      x too much
         |             . ' '          linear interpolation between the nearest trials on either side of the target;
  target |- - - - o                   bisection if the last two trials lie on the same side, which also converges
         |   x ' too little           where the response is bent or broken
         +------------------------ planned

Without a trial above the target, the line through the origin is extrapolated.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial.

    Attributes:
        planned: planned value, above 0.
        reached: measured value.
    """

    planned: float
    reached: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """The interval that a trial must reach.

    Attributes:
        low: lower end.
        middle: value to plan for.
        high: upper end.
    """

    low: float
    middle: float
    high: float

    def side(self, reached: float) -> int:
        """Return -1 below the interval, 0 inside and 1 above."""
        return (reached > self.high) - (reached < self.low)


def next_planned(trials: Sequence[Trial], target: Target, largest: float) -> float:
    """Return the next value to plan for, after trials that all missed the target.

    Args:
        trials: one or more trials in order.
        target: interval to reach.
        largest: largest value that can be planned for.

    Example:
        >>> target = Target(low=0.38, middle=0.4, high=0.42)
        >>> round(next_planned([Trial(planned=0.4, reached=0.2)], target, 1.0), 3)  # twice as much is needed
        0.8
        >>> round(next_planned([Trial(planned=0.4, reached=0.2), Trial(planned=0.8, reached=0.6)], target, 1.0), 3)
        0.6
    """
    over = min(
        (trial for trial in trials if target.side(trial.reached) > 0), key=lambda trial: trial.planned, default=None
    )
    below = [
        trial for trial in trials if target.side(trial.reached) < 0 and (over is None or trial.planned < over.planned)
    ]
    under = max(below, key=lambda trial: trial.planned, default=Trial(planned=0.0, reached=0.0))
    if over is None:
        return min(under.planned * target.middle / under.reached, largest) if under.reached > 0 else largest
    sides = {target.side(trial.reached) for trial in trials[-2:]}
    if len(trials) > 2 and len(sides) == 1:
        return (under.planned + over.planned) / 2
    share = (target.middle - under.reached) / (over.reached - under.reached)
    return under.planned + share * (over.planned - under.planned)
