import numpy as np
import pytest

from rsi_deploy.evaluation.intervals import difference_interval, mean_interval, wilson_interval


def test_wilson_interval_covers_and_stays_inside():
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 100
    assert wilson_interval(0, 10)[1] == pytest.approx(27.75, abs=0.01)
    hits = np.random.default_rng(0).binomial(200, 0.93, 2000)
    covered = np.mean([wilson_interval(int(h), 200)[0] <= 93 <= wilson_interval(int(h), 200)[1] for h in hits])
    assert 0.93 < covered < 0.98
    assert wilson_interval(930, 1000)[1] < wilson_interval(93, 100)[1]


def test_the_interval_of_a_mean_covers_it_at_the_promised_rate():
    rng = np.random.default_rng(0)
    samples = rng.exponential(2.0, (300, 80))  # skewed, as divergences are
    covered = np.mean([low <= 2 <= high for low, high in map(mean_interval, samples)])
    assert 0.89 < covered < 0.98
    narrow, wide = (high - low for low, high in map(mean_interval, (rng.normal(size=4000), rng.normal(size=40))))
    assert narrow * 5 < wide
    assert mean_interval(np.full(7, 3.0)) == (3, 3)
    assert mean_interval(samples[0]) == mean_interval(samples[0]) != mean_interval(samples[0], seed=1)


def test_the_interval_of_a_difference_covers_it_at_the_promised_rate():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(1000, [0.06, 0.02, 0.92], 2000)  # lost, won, neither: 4 points fewer
    ends = [difference_interval(int(lost), int(won), 1000) for lost, won, _ in counts]
    assert 0.94 < np.mean([low <= -4 <= high for low, high in ends]) < 0.97
    assert np.mean([low <= 0 <= high for low, high in ends]) < 0.02, "it must also be able to exclude"
    assert difference_interval(0, 5, 5)[1] == 100
    low, high = difference_interval(7, 7, 100)
    assert low == pytest.approx(-high)
