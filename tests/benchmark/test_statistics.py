"""Statistics, on times that were made up."""

import re

import numpy as np
import pytest

from rsi_deploy.benchmark import statistics


def synthetic(ratio, blocks=60, noise=0.05, seed=0):
    """Two variants, the second `ratio` times as fast, under a load that drifts for both alike: `(2, blocks)` ms."""
    rng = np.random.default_rng(seed)
    load = np.exp(np.cumsum(rng.normal(0, 0.05, blocks)))
    return np.stack([load, load / ratio]) * np.exp(rng.normal(0, noise, (2, blocks)))


def word(blocks, seed=0):
    speedup, interval = statistics.compare(*blocks, seed)
    return statistics.verdict(speedup, interval, blocks.shape[1])


def test_each_verdict_can_be_given():
    assert re.fullmatch(r"1\.[89]\dx faster \[1\.\d\d, [12]\.\d\d\]", word(synthetic(1.85, noise=0.01)))
    assert re.fullmatch(r"1\.2\dx slower \[1\.\d\d, 1\.\d\d\]", word(synthetic(1 / 1.25, noise=0.01)))
    assert re.fullmatch(r"no difference shown \[0\.\d\d, 1\.\d\d\]", word(synthetic(1.0)))
    assert word(synthetic(3.0)[:, :5]) == "too few blocks to compare (5; 8 are needed)"


def test_a_true_difference_is_found_and_its_size_is_inside():
    for seed in range(20):
        speedup, (low, high) = statistics.compare(*synthetic(1.3, seed=seed, noise=0.02), seed)
        assert low <= speedup <= high
        assert 1.2 < low < high < 1.4


def test_equal_arms_are_rarely_told_apart():
    claims = sum(not word(synthetic(1.0, seed=seed), seed).startswith("no difference") for seed in range(100))
    assert claims <= 12  # 5 expected; the control: variants that differ by 10 % are distinguished most of the time
    assert sum("faster" in word(synthetic(1.1, seed=seed), seed) for seed in range(20)) >= 15


def test_pairing_blocks_removes_the_load_that_arms_share():
    """Control: the same times with the blocks of one variant shuffled, so that they are no longer paired."""
    blocks = synthetic(1.1, noise=0.01)
    _, (low, high) = statistics.compare(*blocks, 0)
    shuffled = np.random.default_rng(0).permutation(blocks[1])
    _, (loose_low, loose_high) = statistics.compare(blocks[0], shuffled, 0)
    assert high - low < 0.5 * (loose_high - loose_low)


def test_speedup_turns_over_with_the_arms():
    blocks = synthetic(1.5)
    forth, (low, high) = statistics.compare(*blocks, 0)
    back, (back_low, back_high) = statistics.compare(*blocks[::-1], 0)
    np.testing.assert_allclose([forth, low, high], [1 / back, 1 / back_high, 1 / back_low], rtol=1e-6)


def test_a_claim_never_prints_an_end_of_one():
    assert statistics.verdict(1.02, (1.012, 1.03), 50) == "1.020x faster [1.012, 1.030]"
    assert statistics.verdict(0.98, (0.97, 0.988), 50) == "1.020x slower [1.012, 1.031]"


def test_what_two_copies_of_a_model_differ_by_is_no_difference():
    for ends in ((1.001, 1.02), (0.98, 0.999), (1.003, 1.009), (1.01, 1.5), (1 / 1.5, 1 / 1.01)):
        assert statistics.verdict(1.005, ends, 500).startswith("no difference"), ends
    assert "faster" in statistics.verdict(1.2, (1.011, 1.5), 500)


def test_the_same_seed_gives_the_same_interval():
    blocks = synthetic(1.2)
    assert statistics.compare(*blocks, 3) == statistics.compare(*blocks, 3) != statistics.compare(*blocks, 4)


def test_unpaired_blocks_are_refused():
    for first, variant in ((np.ones(3), np.ones(4)), (np.ones(0), np.ones(0)), (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(ValueError, match="paired"):
            statistics.compare(first, variant, 0)


def test_settled_times():
    assert statistics.is_settled([9.0, 5.0] + [1.0] * 10)
    assert not statistics.is_settled([1.0] * 9)
    assert not statistics.is_settled([2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1])


def test_precise_times():
    assert statistics.half_width(synthetic(2.0, noise=0.01, blocks=200), 0) < 0.02
    assert statistics.half_width(synthetic(2.0, noise=0.3, blocks=20), 0) > 0.1
    one_variant = np.random.default_rng(0).normal(1, 0.2, (1, 20))
    assert statistics.half_width(one_variant, 0) > 0.02
    assert statistics.half_width(one_variant * 0 + 1, 0) == 0
    assert statistics.half_width(one_variant[:, :7], 0) == float("inf"), "seven blocks tell nothing"


def test_four_times_the_time_halves_the_width():
    """The estimated time for a precision, against widths of simulated times."""
    few, many = (statistics.half_width(synthetic(1.0, blocks=n, seed=1), 0) for n in (400, 1600))
    assert 0.6 < statistics.seconds_needed(10, few, many) / 40 < 1.7


def moods(rng, blocks, hold):
    """Log times of two equal variants whose difference wanders: autocorrelated for about `hold` blocks."""
    keep = np.exp(-1 / hold)
    steps = rng.normal(0, 0.05 * np.sqrt(1 - keep**2), (2, blocks))
    noise = np.empty((2, blocks))
    state = rng.normal(0, 0.05, 2)
    for block in range(blocks):
        state = keep * state + steps[:, block]
        noise[:, block] = state
    return np.exp(noise)


def test_moods_that_last_are_no_difference():
    """Control: the plain bootstrap of single blocks claims far more often on the same times."""
    rng = np.random.default_rng(0)
    runs = [moods(rng, 400, hold=4) for _ in range(60)]

    def claims(length):
        found = 0
        with pytest.MonkeyPatch.context() as patch:
            if length:
                patch.setattr(statistics, "run_length", lambda _: length)
            for times in runs:
                low, high = statistics.compare(*times, 0)[1]
                found += not low <= 1 <= high
        return found

    assert claims(0) <= 4
    assert claims(1) > claims(0) + 8


def test_runs_are_longer_where_neighbours_are_alike():
    rng = np.random.default_rng(0)
    lengths = [statistics.run_length(moods(rng, 1000, hold)) for hold in (0.01, 4, 20)]
    assert lengths[0] in (10, 11)
    assert lengths == sorted(set(lengths))
    assert statistics.run_length(np.ones((2, 100))) == 5
    assert statistics.run_length(np.ones((1, 5))) == 1


def test_looking_until_precise_raises_no_alarms():
    """Equal variants, measured until narrow; control: stopping at the first look that excludes 1 does raise alarms."""
    alarms = {"narrow": 0, "significant": 0}
    for seed in range(60):
        times = synthetic(1.0, blocks=1500, noise=0.05, seed=seed)
        for rule in alarms:
            look = 8
            while look < 1500:
                part = times[:, :look]
                low, high = statistics.compare(*part, seed)[1]
                stop = (high - low) / (high + low) <= 0.02 if rule == "narrow" else not low <= 1 <= high
                if stop:
                    break
                look += look // 2
            alarms[rule] += not low <= 1 <= high
    assert alarms["narrow"] <= 3
    assert alarms["significant"] >= 2 * max(alarms["narrow"], 1)


def test_percentiles_need_ten_calls_beyond_them():
    times = np.arange(10_000.0)
    counts = {"p90": 100, "p99": 1000, "p99.9": 10_000}
    for name, needed in counts.items():
        assert name in statistics.supported_percentiles(times[:needed])
        assert name not in statistics.supported_percentiles(times[: needed - 1])
    assert statistics.supported_percentiles(times[:1]) == {"p50": 0.0}


def test_quantiles_are_the_distribution():
    times = np.random.default_rng(0).gamma(2, 3, 5000)
    found = statistics.quantiles(times)
    assert len(found) == 101
    assert found[0] == pytest.approx(times.min(), rel=1e-4)
    assert found[50] == pytest.approx(np.median(times), rel=1e-4)
    assert list(found) == sorted(found)


def test_short_calls_fill_a_visit():
    lengths = (0.0, 0.01, 1.0, 3.0, 19.0, 20.0, 900.0)
    assert [statistics.calls_per_visit(ms) for ms in lengths] == [50, 50, 5, 2, 1, 1, 1]
