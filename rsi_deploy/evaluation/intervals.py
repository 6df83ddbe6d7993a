"""95 % confidence intervals of shares, means over samples, differences of two shares, and ratios.

share        hits / n                      Wilson (1927); one-sided limit of Clopper and Pearson (1934)
mean         mean over the samples         percentile bootstrap over the samples, 2,000 resamples
ratio        sum a / sum b, percentile     likewise
difference   (won - lost) / n              Bonett and Price (2012):
             d +- z sqrt((p + q - (p - q)^2) / (n + 2)),  p = (won + 1)/(n + 2),  q = (lost + 1)/(n + 2),  d = p - q
ratio        a / b, independent            MOVER on logarithms (Zou and Donner 2008):
             log(a / b) +- hypot(log(a / a_end), log(b / b_end)), at the level of the two given intervals
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

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


def share_at_least(hits: int, samples: int, level: float = 95.0) -> float:
    """Return Clopper and Pearson's one-sided lower limit of a share in percent, at a level in percent.

    It is the share at which `hits` or more would be found with a probability of 100 % - level.

    >>> [round(share_at_least(hits, 100), 2) for hits in (0, 50, 99, 100)]
    [0.0, 41.36, 95.34, 97.05]
    """
    if hits == 0:
        return 0.0
    counts = np.arange(hits, samples + 1)
    ways = np.array([math.lgamma(samples + 1) - math.lgamma(k + 1) - math.lgamma(samples - k + 1) for k in counts])
    low, high = 0.0, 1.0
    for _ in range(50):
        share = (low + high) / 2
        misses = (samples - counts) * math.log1p(-share)
        probability = float(np.exp(ways + counts * math.log(share) + misses).sum())
        low, high = (share, high) if probability < 1 - level / 100 else (low, share)
    return 100 * low


def mean_interval(values: Floats, seed: int = 0, level: float = 95.0) -> Interval:
    """Return the bootstrap interval of the mean of `values (N,)`, at a level in percent; the seed makes it repeatable.

    Memory is bounded, as resamples are drawn a million indices at a time.
    """
    means = [values[rows].mean(axis=1) for rows in _resamples(len(values), [seed, *b"mean"])]
    return _middle(np.concatenate(means), level)


def percentile_interval(values: Floats, percentile: float, seed: int = 0, level: float = 95.0) -> Interval:
    """Return the bootstrap interval of a percentile of `values (N,)`; see `mean_interval`."""
    found = [np.percentile(values[rows], percentile, axis=1) for rows in _resamples(len(values), [seed, *b"percent"])]
    return _middle(np.concatenate(found), level)


def ratio_of_sums_interval(above: Floats, below: Floats, seed: int = 0, level: float = 95.0) -> Interval:
    """Return the bootstrap interval of `sum(above) / sum(below)`, both `(N,)` of the same samples; see `mean_interval`.

    The ratio of a resample whose `below` are all 0 is 0.
    """
    ratios = []
    for rows in _resamples(len(above), [seed, *b"ratio"]):
        sums = below[rows].sum(axis=1)
        ratios.append(np.divide(above[rows].sum(axis=1), sums, out=np.zeros(len(sums)), where=sums > 0))
    return _middle(np.concatenate(ratios), level)


def _resamples(count: int, seed: list[int]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield resamples of the numbers below `count`, one a row, a million numbers at a time."""
    rng = np.random.default_rng(seed)
    chunk = max(1, 1_000_000 // count)
    for start in range(0, RESAMPLES, chunk):
        yield rng.integers(0, count, (min(chunk, RESAMPLES - start), count))


def _middle(values: Floats, level: float) -> Interval:
    """Return the ends of the middle `level` percent of the values."""
    low, high = np.percentile(values, [50 - level / 2, 50 + level / 2])
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
