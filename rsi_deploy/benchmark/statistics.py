"""What the times of interleaved arms show: medians, intervals, percentiles and a verdict. No clock, no files.

    t[a, b]  arm a in block b, ms
    speedup  median_b t[first, b] / median_b t[a, b]

The arms of one block share the machine's mood, so a speedup's interval comes from resampling *blocks*, the same ones
for both arms. Moods outlast a block: runs of neighbouring blocks are resampled together, the longer the more alike
neighbours are (circular block bootstrap, Politis and Romano 1992); single blocks would make the interval too narrow.

A difference is claimed only where the whole 99 % interval lies beyond 1 % either way:

- 99 %, for one in twenty is too often for a table of twenty lines;
- 1 %, for two copies of one model differ by that much for good in one process (where their weights lie in memory),
  and no number of blocks makes it the model's doing;
- measuring ends when the intervals are *narrow*, never when they exclude 1. An estimate is all but independent of its
  own width, so such a stop keeps the confidence (Chow and Robbins 1965); stopping at the first significant look
  would not.
"""

from collections.abc import Sequence

import numpy as np

from rsi_deploy.core.types import Floats, Interval

CONFIDENCE = 0.99  # of the intervals of speedups, and so of claims
MEDIAN_CONFIDENCE = 0.95  # of the intervals of one arm's median
SMALLEST_CLAIM = 0.01  # relative; see above
MIN_BLOCKS = 8  # fewer cannot cover a median with 99 %, whatever the method: 1 - 2 / 2**n
ENOUGH_BLOCKS = 20  # with fewer, the result carries a note
RESAMPLES, LOOK_RESAMPLES = 2000, 500

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
BEYOND = 10  # timed calls beyond a percentile, without which it is not given
STALLED = 1.5  # the median over the fastest twentieth, from which on a note says so
SHORT_MS, VISIT_MS, MAX_CALLS = 20.0, 5.0, 50  # calls under SHORT_MS repeat until a visit has about VISIT_MS


def bootstrap_medians(blocks: Floats, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Medians of resamples of the columns of `blocks (arms, B)`, runs of them: float64 `(arms, resamples)`."""
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
    """How many neighbouring columns of `blocks (arms, B)` are resampled together.

    With `r` the rank correlation of neighbours (of the ratio to the first arm; of one arm alone its times), the best
    length is `(2 r / (1 - r**2))**(2/3) * B**(1/3)` (Kunsch 1989, for an autoregression); never less than `B**(1/3)`,
    for `r` is an estimate, nor more than a quarter of the blocks.
    """
    count = blocks.shape[1]
    if count < MIN_BLOCKS:
        return 1
    series = np.log(blocks[1:] / blocks[:1]) if len(blocks) > 1 else blocks
    r = min(max(_neighbours(row) for row in series), 0.95)
    factor = (2 * r / (1 - r * r)) ** (2 / 3) if r > 0 else 1.0
    return int(np.clip(round(max(factor, 1.0) * count ** (1 / 3)), 1, count // 4))


def _neighbours(row: Floats) -> float:
    """Rank correlation of each value of `row (B,)` with the next; ranks, for one spike must not hide it."""
    ranks = np.argsort(np.argsort(row, kind="stable"), kind="stable").astype(np.float64)
    if np.ptp(row) == 0:
        return 0.0
    return float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])


def interval(samples: Floats, confidence: float) -> Interval:
    """The middle `confidence` of bootstrap samples `(resamples,)`."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def median_interval(blocks: Floats, seed: int) -> tuple[float, Interval]:
    """The median of `blocks (B,)` and its 95 % interval."""
    return float(np.median(blocks)), interval(bootstrap_medians(blocks[None], seed)[0], MEDIAN_CONFIDENCE)


def compare(first: Floats, arm: Floats, seed: int) -> tuple[float, Interval]:
    """How many times faster `arm (B,)` is than `first (B,)`, and the 99 % interval over paired blocks.

    Raises:
        ValueError: unpaired blocks, or none.
    """
    if first.shape != arm.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"expected paired blocks (B,) with B >= 1, but got {first.shape} and {arm.shape}")
    resampled = bootstrap_medians(np.stack([first, arm]), seed)
    return float(np.median(first) / np.median(arm)), interval(resampled[0] / resampled[1], CONFIDENCE)


def verdict(speedup: float, ends: Interval, blocks: int) -> str:
    """The comparison in words; a difference is claimed only where the whole interval is beyond 1 %.

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
    digits = 2 if round(low, 2) > 1 + SMALLEST_CLAIM else 3  # an end is not printed nearer to 1 than it is
    return f"{speedup:.{digits}f}x {'faster' if sign > 0 else 'slower'} [{low:.{digits}f}, {high:.{digits}f}]"


def direction(ends: Interval) -> int:
    """1 where a speedup is shown, -1 where a slowdown is, 0 where neither is.

    >>> direction((1.02, 1.1)), direction((0.9, 0.95)), direction((1.005, 1.2)), direction((0.9, 1.1))
    (1, -1, 0, 0)
    """
    low, high = ends
    return int(low > 1 + SMALLEST_CLAIM) - int(high < 1 / (1 + SMALLEST_CLAIM))


def half_width(blocks: Floats, seed: int) -> float:
    """Relative half width of the widest interval of `blocks (arms, B)`: of the speedups, of one arm alone its median.

    Infinite below `MIN_BLOCKS`.
    """
    if blocks.shape[1] < MIN_BLOCKS:
        return float("inf")
    medians = bootstrap_medians(blocks, seed, LOOK_RESAMPLES)
    samples = medians[:1] / medians[1:] if len(medians) > 1 else medians
    confidence = CONFIDENCE if len(medians) > 1 else MEDIAN_CONFIDENCE
    ends = [interval(row, confidence) for row in samples]
    return max((high - low) / (high + low) for low, high in ends)


def seconds_needed(seconds: float, reached: float, wanted: float) -> float:
    """Measuring time for a half width of `wanted`, where `seconds` gave `reached`: widths shrink as 1 / sqrt(time).

    >>> seconds_needed(10, 0.04, 0.02)
    40.0
    """
    return seconds * (reached / wanted) ** 2


def supported_percentiles(times: Floats) -> dict[str, float]:
    """Percentiles of timed calls `(n,)` that have at least ten calls beyond them, and the median always.

    p90 so needs 100 calls, p99 1,000 and p99.9 10,000: the tenth largest of n times is known to about a third in its
    own rank, the largest to nothing.

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
    """The 0 %, 1 % ... 100 % quantiles of timed calls `(n,)`, five digits each: their whole distribution, compact."""
    return tuple(float(f"{value:.5g}") for value in np.percentile(times, np.arange(101)))


def stalling(times: Floats) -> float | None:
    """The median call over the fastest twentieth, where it is `STALLED` times that or more.

    A call does the same work each time. Where half of them take so much longer than they can, they wait: for cores that
    other processes hold, or for a worker thread that was put off for a time slice of the system.

    >>> stalling(np.array([2.0, 2.1, 2.0, 2.2])), stalling(np.array([2.0, 6.0, 6.4, 6.2]))
    (None, 3.05)
    """
    fast, middle = np.quantile(times, 0.05, method="lower"), np.median(times)
    return float(middle / fast) if middle >= STALLED * fast else None


def is_settled(times: Sequence[float]) -> bool:
    """Whether the last five times and the five before them have medians within 5 % of each other."""
    if len(times) < 10:
        return False
    before, last = float(np.median(times[-10:-5])), float(np.median(times[-5:]))
    return abs(last - before) <= 0.05 * last


def calls_per_visit(call_ms: float) -> int:
    """Timed calls in a visit: one where a call is long, else about 5 ms of them, at most 50."""
    return 1 if call_ms >= SHORT_MS else int(np.clip(np.ceil(VISIT_MS / max(call_ms, 1e-6)), 1, MAX_CALLS))
