"""What to plan for next, from what was planned for and what came of it: a crossing, closed in on from both sides.

    came |                      x too much
         |             . ' '          the line between the nearest x on either side, where it meets the aim;
    aim  |- - - - o                   halfway between them where the last two fell on the same side: a bent or
         |   x ' too little           broken line is closed in on all the same
         +------------------------ planned

Without one on the far side, the line through nothing planned, nothing came is gone on with.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One try.

    Attributes:
        planned: what was planned for, above 0.
        came: what came of it.
    """

    planned: float
    came: float


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is to come.

    Attributes:
        low: the least that is as good as any.
        middle: what is aimed at.
        high: the most that is as good as any.
    """

    low: float
    middle: float
    high: float

    def side(self, came: float) -> int:
        """-1 for too little, 0 within, 1 for too much."""
        return (came > self.high) - (came < self.low)


def next_planned(trials: Sequence[Trial], aim: Aim, largest: float) -> float:
    """What to plan for after some trials, none of which came within the aim.

    Args:
        trials: in the order they were made, one at least.
        aim: what is to come.
        largest: the most that can be planned for.

    Example:
        >>> aim = Aim(low=0.38, middle=0.4, high=0.42)
        >>> round(next_planned([Trial(planned=0.4, came=0.2)], aim, 1.0), 3)  # twice as much is needed
        0.8
        >>> round(next_planned([Trial(planned=0.4, came=0.2), Trial(planned=0.8, came=0.6)], aim, 1.0), 3)
        0.6
    """
    over = min((trial for trial in trials if aim.side(trial.came) > 0), key=lambda trial: trial.planned, default=None)
    below = [trial for trial in trials if aim.side(trial.came) < 0 and (over is None or trial.planned < over.planned)]
    under = max(below, key=lambda trial: trial.planned, default=Trial(planned=0.0, came=0.0))
    if over is None:
        return min(under.planned * aim.middle / under.came, largest) if under.came > 0 else largest
    sides = {aim.side(trial.came) for trial in trials[-2:]}
    if len(trials) > 2 and len(sides) == 1:
        return (under.planned + over.planned) / 2
    share = (aim.middle - under.came) / (over.came - under.came)
    return under.planned + share * (over.planned - under.planned)
