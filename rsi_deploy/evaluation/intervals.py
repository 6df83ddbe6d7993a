"""95 % confidence intervals of shares, means over samples, differences of two shares, and ratios.

share        hits / n                      Wilson (1927)
mean         mean over the samples         percentile bootstrap over the samples, 2,000 resamples
difference   (won - lost) / n              Bonett and Price (2012):
             d +- z sqrt((p + q - (p - q)^2) / (n + 2)),  p = (won + 1)/(n + 2),  q = (lost + 1)/(n + 2),  d = p - q
ratio        a / b, independent            MOVER on logarithms (Zou and Donner 2008):
             log(a / b) +- hypot(log(a / a_end), log(b / b_end)), at the level of the two given intervals
"""

import math

import numpy as np

from rsi_deploy.core.types import Floats, Interval

Z = 1.959963984540054  # 97.5th percentile of the standard normal
RESAMPLES = 2000


def wilson_interval(hits: int, samples: int) -> Interval:
    """Return Wilson's 95 % interval of a share in percent; it stays within 0 to 100 and is valid near the ends.

    >>> tuple(round(end, 2) for end in wilson_interval(50, 100))
    (40.38, 59.62)
    """
    centre = (hits + Z * Z / 2) / (samples + Z * Z)
    half = Z / (samples + Z * Z) * math.sqrt(hits * (samples - hits) / samples + Z * Z / 4)
    return max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))


def difference_interval(lost: int, won: int, samples: int) -> Interval:
    """Return Bonett and Price's 95 % interval of the change of a paired share in percentage points.

    >>> tuple(round(end, 3) for end in difference_interval(5, 3, 2000))
    (-0.409, 0.21)
    """
    p, q = (won + 1) / (samples + 2), (lost + 1) / (samples + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (samples + 2))
    return max(-100.0, 100 * (p - q - half)), min(100.0, 100 * (p - q + half))


def mean_interval(values: Floats, seed: int = 0) -> Interval:
    """Return the 95 % bootstrap interval of the mean of `values (N,)`; the seed makes it repeatable.

    Memory is bounded, as resamples are drawn a million indices at a time.
    """
    rng = np.random.default_rng([seed, *b"mean"])
    count = len(values)
    chunk = max(1, 1_000_000 // count)
    means = [
        values[rng.integers(0, count, (min(chunk, RESAMPLES - start), count))].mean(axis=1)
        for start in range(0, RESAMPLES, chunk)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def ratio(a: float, a_ends: Interval, b: float, b_ends: Interval) -> tuple[float, Interval]:
    """Return `a / b` of two independent positive estimates and its interval.

    >>> found, ends = ratio(2.0, (1.9, 2.1), 1.0, (1.0, 1.0))
    >>> found, tuple(round(end, 9) for end in ends)
    (2.0, (1.9, 2.1))
    """
    down = math.hypot(math.log(a / a_ends[0]), math.log(b_ends[1] / b))
    up = math.hypot(math.log(a_ends[1] / a), math.log(b / b_ends[0]))
    return a / b, (a / b * math.exp(-down), a / b * math.exp(up))
