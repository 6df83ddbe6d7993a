"""From response errors to losses: errors at ranks that were not tried, and the effect of an error on the outputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rsi_deploy.calibration.activations import Distance

FARTHEST = 1e9
"""Upper limit of a distance, also for outputs that are not finite."""


def filled(known: Mapping[int, float], multiple: int) -> dict[int, float]:
    """Interpolate errors to all ranks, linearly in their logarithms.

    Example:
        >>> {rank: round(error, 6) for rank, error in filled({2: 0.16, 6: 0.01}, 2).items()}
        {2: 0.16, 4: 0.04, 6: 0.01}
    """
    ranks = sorted(known)
    every = range(ranks[0], ranks[-1] + 1, multiple)
    logs = np.interp(every, ranks, [math.log(max(known[rank], 1e-30)) for rank in ranks])
    return {rank: known.get(rank, float(math.exp(log))) for rank, log in zip(every, logs, strict=True)}


@dataclass
class PowerLaw:
    """The loss as a function of the response error, interpolated linearly in logarithms between measured points.

    Below the first point it is proportional to the error; beyond the last one it rises with its 1.5th power.
    """

    points: dict[float, float] = field(default_factory=dict)

    def has_near(self, error: float) -> bool:
        """Return whether a measured point is so near that another one would add nothing."""
        return any(abs(math.log(max(error, 1e-12) / known)) < 0.2 for known in self.points)

    def learn(self, error: float, distance: Distance) -> None:
        """Add a measured point: the relative distance of the outputs plus their KL divergence, if there is one."""
        self.points[max(error, 1e-12)] = min(max(distance.relative + (distance.kl or 0.0), 1e-9), FARTHEST)

    def __call__(self, error: float) -> float:
        """Return the loss of a response error."""
        known = sorted(self.points)
        x = math.log(max(error, 1e-12))
        xs, ys = [math.log(e) for e in known], [math.log(self.points[e]) for e in known]
        if x <= xs[0]:
            return math.exp(ys[0] + x - xs[0])
        if x >= xs[-1]:
            return math.exp(ys[-1] + 1.5 * (x - xs[-1]))
        return math.exp(float(np.interp(x, xs, ys)))
