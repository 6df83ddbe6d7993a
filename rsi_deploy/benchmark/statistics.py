"""Statistics of interleaved times: medians, intervals, percentiles and verdicts.

    t[v, b]  time of variant v in block b, ms
    speedup  median_b t[first, b] / median_b t[v, b]

Disturbances of the machine affect all variants of a block, so the interval of a speedup comes from resampling *blocks*,
the same ones for both variants. Disturbances last longer than a block. Therefore runs of neighbouring blocks are
resampled together, and longer runs if neighbours are more alike (circular block bootstrap, Politis and Romano 1992).
Single blocks would give intervals that are too narrow.

A difference is claimed only if the whole 99 % interval lies more than 1 % away from 1:

- 99 %, because one false claim in twenty is too many for a table of twenty rows;
- 1 %, because two copies of one model in one process can differ by that much permanently (by the placement of their
  weights in memory), whatever the number of blocks;
- measuring stops when the intervals are *narrow*, never when they exclude 1. An estimate is almost independent of the
  width of its interval, so this keeps the confidence (Chow and Robbins 1965). Stopping at the first significant look
  would not.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.99  # of the intervals of speedups
MEDIAN_CONFIDENCE = 0.95  # of the intervals of medians
SMALLEST_CLAIM = 0.01  # smallest relative difference that is claimed
MIN_BLOCKS = 8  # fewer blocks cannot cover a median with 99 % by any method: 1 - 2 / 2**n
ENOUGH_BLOCKS = 20  # with fewer blocks, the result has a note
RESAMPLES, LOOK_RESAMPLES = 2000, 500

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
BEYOND = 10  # smallest number of timed calls beyond a percentile
STALLED = 1.5  # ratio of the median to the fastest twentieth above which a note warns about waiting
SHORT_MS, VISIT_MS, MAX_CALLS = 20.0, 5.0, 50  # calls under SHORT_MS repeat until a visit takes about VISIT_MS
FIRST = "the model that the others are compared with"
"""The verdict on the first variant."""


def bootstrap_medians(blocks: Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Return medians of block-bootstrap resamples of `blocks (variants, B)`, float64 `(variants, resamples)`."""
    rng = np.random.default_rng([seed, *b"bootstrap"])
    count = blocks.shape[1]
    length = run_length(blocks)
    chunk = max(1, 1_000_000 // count)  # bounds the memory of long runs
    medians = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        starts = rng.integers(0, count, (rows, -(-count // length)))
        drawn = (starts[:, :, None] + np.arange(length)).reshape(rows, -1)[:, :count] % count
        medians.append(np.median(blocks[:, drawn], axis=2))
    return np.concatenate(medians, axis=1)


def run_length(blocks: Floats) -> int:
    """Return the number of neighbouring columns of `blocks (variants, B)` that are resampled together.

    With the rank correlation `r` of neighbours (of the ratio to the first variant, or of the times of a single
    variant), the best length is `(2 r / (1 - r**2))**(2/3) * B**(1/3)` (Kunsch 1989, for an autoregression). It is at
    least `B**(1/3)`, because `r` is an estimate, and at most a quarter of the blocks.
    """
    count = blocks.shape[1]
    if count < MIN_BLOCKS:
        return 1
    series = np.log(blocks[1:] / blocks[:1]) if len(blocks) > 1 else blocks
    r = min(max(_neighbours(row) for row in series), 0.95)
    factor = (2 * r / (1 - r * r)) ** (2 / 3) if r > 0 else 1.0
    return int(np.clip(round(max(factor, 1.0) * count ** (1 / 3)), 1, count // 4))


def _neighbours(row: Floats) -> float:
    """Return the rank correlation of each value of `row (B,)` with the next; ranks are robust against spikes."""
    ranks = np.argsort(np.argsort(row, kind="stable"), kind="stable").astype(np.float64)
    if np.ptp(row) == 0:
        return 0.0
    return float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])


def interval(samples: Floats, confidence: float) -> Interval:
    """Return the central interval that contains the share `confidence` of bootstrap samples `(resamples,)`."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def median_interval(blocks: Floats, seed: int) -> tuple[float, Interval]:
    """Return the median of `blocks (B,)` and its 95 % interval."""
    return float(np.median(blocks)), interval(bootstrap_medians(blocks[None], seed)[0], MEDIAN_CONFIDENCE)


def compare(first: Floats, variant: Floats, seed: int) -> tuple[float, Interval]:
    """Return the speedup of `variant (B,)` over `first (B,)`, and its 99 % interval over paired blocks.

    Raises:
        ValueError: the blocks are not paired, or there are none.
    """
    if first.shape != variant.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"expected paired blocks (B,) with B >= 1, but got {first.shape} and {variant.shape}")
    resampled = bootstrap_medians(np.stack([first, variant]), seed)
    return float(np.median(first) / np.median(variant)), interval(resampled[0] / resampled[1], CONFIDENCE)


def verdict(speedup: float, ends: Interval, blocks: int) -> str:
    """Describe the comparison; a difference is claimed only if the whole interval is beyond 1 %.

    >>> verdict(1.834, (1.79, 1.88), 40)
    '1.83x faster [1.79, 1.88]'
    >>> verdict(0.909, (0.885, 0.935), 40)
    '1.10x slower [1.07, 1.13]'
    >>> verdict(1.004, (0.99, 1.02), 40)
    'no difference shown [0.99, 1.02]'
    >>> verdict(1.006, (1.003, 1.009), 40)
    'no difference shown [1.003, 1.009]'
    """
    if blocks < MIN_BLOCKS:
        return f"too few blocks to compare ({blocks}; {MIN_BLOCKS} are needed)"
    low, high = ends
    sign = direction(ends)
    digits = 3 if max(abs(low - 1), abs(high - 1)) < SMALLEST_CLAIM else 2
    if not sign:
        return f"no difference shown [{low:.{digits}f}, {high:.{digits}f}]"
    if sign < 0:
        speedup, low, high = 1 / speedup, 1 / high, 1 / low
    digits = 2 if round(low, 2) > 1 + SMALLEST_CLAIM else 3  # rounding must not move an end towards 1
    return f"{speedup:.{digits}f}x {'faster' if sign > 0 else 'slower'} [{low:.{digits}f}, {high:.{digits}f}]"


def direction(ends: Interval) -> int:
    """Return 1 for a shown speedup, -1 for a shown slowdown, and 0 for neither.

    >>> direction((1.02, 1.1)), direction((0.9, 0.95)), direction((1.005, 1.2)), direction((0.9, 1.1))
    (1, -1, 0, 0)
    """
    low, high = ends
    return int(low > 1 + SMALLEST_CLAIM) - int(high < 1 / (1 + SMALLEST_CLAIM))


def half_width(blocks: Floats, seed: int) -> float:
    """Return the relative half width of the widest interval of `blocks (variants, B)`.

    The intervals are those of the speedups, or of the median of a single variant. Below `MIN_BLOCKS` the width is
    infinite.
    """
    if blocks.shape[1] < MIN_BLOCKS:
        return float("inf")
    medians = bootstrap_medians(blocks, seed, LOOK_RESAMPLES)
    samples = medians[:1] / medians[1:] if len(medians) > 1 else medians
    confidence = CONFIDENCE if len(medians) > 1 else MEDIAN_CONFIDENCE
    ends = [interval(row, confidence) for row in samples]
    return max((high - low) / (high + low) for low, high in ends)


def seconds_needed(seconds: float, reached: float, wanted: float) -> float:
    """Return the seconds for a half width of `wanted`, if `seconds` gave `reached`: widths shrink as 1 / sqrt(time).

    >>> seconds_needed(10, 0.04, 0.02)
    40.0
    """
    return seconds * (reached / wanted) ** 2


def supported_percentiles(times: Floats) -> dict[str, float]:
    """Return the percentiles of timed calls `(n,)` with at least ten calls beyond them, and always the median.

    p90 needs 100 calls, p99 1,000 and p99.9 10,000. The rank of the tenth largest time is certain to about a third,
    and that of the largest time not at all.

    >>> sorted(supported_percentiles(np.ones(999))), len(supported_percentiles(np.ones(1000)))
    (['p50', 'p90'], 3)
    """
    count = len(times)
    return {
        name: float(np.percentile(times, share))
        for name, share in PERCENTILES.items()
        if share == 50 or round(count * (100 - share) / 100, 6) >= BEYOND
    }


def quantiles(times: Floats) -> tuple[float, ...]:
    """Return the 0 %, 1 % ... 100 % quantiles of timed calls `(n,)` with five digits."""
    return tuple(float(f"{value:.5g}") for value in np.percentile(times, np.arange(101)))


def stalling(times: Floats) -> float | None:
    """Return the ratio of the median call to the fastest twentieth if it is at least `STALLED`, else None.

    Every call does the same work. If half of the calls take much longer than the fastest, they wait for cores that
    other processes use, or for a worker thread that the system has suspended.

    >>> stalling(np.array([2.0, 2.1, 2.0, 2.2])), stalling(np.array([2.0, 6.0, 6.4, 6.2]))
    (None, 3.05)
    """
    fast, middle = np.quantile(times, 0.05, method="lower"), np.median(times)
    return float(middle / fast) if middle >= STALLED * fast else None


def is_settled(times: Sequence[float]) -> bool:
    """Return whether the medians of the last five times and of the five before differ by at most 5 %."""
    if len(times) < 10:
        return False
    before, last = float(np.median(times[-10:-5])), float(np.median(times[-5:]))
    return abs(last - before) <= 0.05 * last


def calls_per_visit(call_ms: float) -> int:
    """Return the number of timed calls in a visit: one long call, or up to 50 short ones for about 5 ms."""
    return 1 if call_ms >= SHORT_MS else int(np.clip(np.ceil(VISIT_MS / max(call_ms, 1e-6)), 1, MAX_CALLS))
