"""McNemar's exact test: do two models differ in how often they are right on the same samples?

    lost, won    samples where only the reference is right, and where only the model is right
    p            2 P(X <= min(won, lost)), X ~ Binomial(won + lost, 1/2), at most 1                (McNemar 1947, exact)

Samples where both are right or both are wrong carry no information on a difference. The exact test is used instead of
mid-p because it finds a false difference in at most 5 % of cases for all counts. It has less power if few answers
change: 5 changes are never significant (p = 0.06), 6 in the same direction are (p = 0.03).
"""

import math

from pydantic import BaseModel

from rsi_deploy.core.types import Interval
from rsi_deploy.evaluation.intervals import difference_interval

SIGNIFICANT = 0.05


class PairedTest(BaseModel, frozen=True, extra="forbid"):
    """A model compared with the reference on the same labelled samples.

    Attributes:
        samples: number of samples.
        lost: samples where only the reference is right.
        won: samples where only the model is right.
        change: top-1 of the model minus that of the reference, percentage points.
        change_interval: 95 % interval of `change`, percentage points.
        p_value: p-value of McNemar's exact two-sided test.
        verdict: the result in words.
    """

    samples: int
    lost: int
    won: int
    change: float
    change_interval: Interval
    p_value: float
    verdict: str


def paired_test(lost: int, won: int, samples: int) -> PairedTest:
    """Compare two models by the samples where exactly one of them is right.

    Raises:
        ValueError: A count is below 0, or the counts exceed the samples.
    """
    if min(lost, won) < 0 or samples < 1 or lost + won > samples:
        raise ValueError(f"expected counts within {samples} samples, but got {lost} lost and {won} won")
    p_value = mcnemar(lost, won)
    return PairedTest(
        samples=samples,
        lost=lost,
        won=won,
        change=100 * (won - lost) / samples,
        change_interval=difference_interval(lost, won, samples),
        p_value=p_value,
        verdict=verdict(lost, won, samples, p_value),
    )


def mcnemar(lost: int, won: int) -> float:
    """Return the p-value of McNemar's exact two-sided test.

    >>> round(mcnemar(6, 0), 5), mcnemar(3, 3), mcnemar(0, 0)
    (0.03125, 1.0, 1.0)
    """
    total, least = lost + won, min(lost, won)
    if lost == won:
        return 1.0
    # Terms decrease from `least` downwards; those below 1e-18 of the sum are omitted.
    first = math.lgamma(total + 1) - math.lgamma(least + 1) - math.lgamma(total - least + 1) - total * math.log(2)
    term, tail, count = 1.0, 1.0, least
    while count > 0 and term > 1e-18 * tail:
        term *= count / (total - count + 1)
        tail += term
        count -= 1
    return min(1.0, 2 * math.exp(first) * tail)


def verdict(lost: int, won: int, samples: int, p_value: float) -> str:
    """Describe the comparison in words; it states a difference only if p is below 0.05.

    >>> verdict(5, 3, 2000, 0.7266)
    '2 fewer right of 2,000: no difference shown (p = 0.73)'
    >>> verdict(40, 9, 2000, 9.2e-6)
    '31 fewer right of 2,000: less accurate (p < 0.0001)'
    >>> verdict(0, 0, 2000, 1.0)
    'the same answers are right of 2,000'
    """
    if not lost and not won:
        return f"the same answers are right of {samples:,}"
    change = won - lost
    counted = f"{abs(change):,} {'more' if change > 0 else 'fewer'} right" if change else "as many right"
    shown = "no difference shown"
    if p_value < SIGNIFICANT:
        shown = "more accurate" if change > 0 else "less accurate"
    return f"{counted} of {samples:,}: {shown} ({_p(p_value)})"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"
