import math

import numpy as np
import pytest

from rsi_deploy.evaluation.paired_test import mcnemar, paired_test, verdict

stats = pytest.importorskip("scipy.stats", reason="scipy comes with scikit-learn")


@pytest.mark.parametrize(
    ("lost", "won"), [(0, 0), (1, 0), (5, 0), (0, 6), (3, 3), (4, 3), (40, 9), (1200, 1100), (0, 900), (60_000, 61_000)]
)
def test_the_p_value_is_that_of_the_exact_binomial_test(lost, won):
    expected = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(won, lost) == mcnemar(lost, won)


def test_where_there_is_no_difference_one_is_claimed_at_most_once_in_twenty():
    for discordant in (6, 12, 25, 60):
        claimed = sum(
            math.comb(discordant, lost) / 2**discordant
            for lost in range(discordant + 1)
            if mcnemar(lost, discordant - lost) < 0.05
        )
        assert 0 < claimed <= 0.05


def test_a_real_loss_is_found():
    rng = np.random.default_rng(0)
    found = [
        paired_test(int(lost), int(won), 2000).p_value < 0.05
        for lost, won, _ in rng.multinomial(2000, [0.03, 0.01, 0.96], 200)  # 2 points of 2,000 samples
    ]
    assert np.mean(found) > 0.95


def test_the_words():
    assert verdict(6, 4, 2000, mcnemar(6, 4)) == "2 fewer right of 2,000: no difference shown (p = 0.75)"
    assert verdict(1, 20, 500, mcnemar(1, 20)) == "19 more right of 500: more accurate (p < 0.0001)"
    assert verdict(9, 0, 500, mcnemar(9, 0)) == "9 fewer right of 500: less accurate (p = 0.0039)"
    assert verdict(3, 3, 500, 1.0) == "as many right of 500: no difference shown (p = 1)"


def test_the_change_is_in_points():
    found = paired_test(40, 9, 2000)
    assert found.change == pytest.approx(-1.55)
    assert found.change_interval[0] < -1.55 < found.change_interval[1] < 0
    for counts in ((-1, 0, 5), (3, 3, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="expected counts"):
            paired_test(*counts)
