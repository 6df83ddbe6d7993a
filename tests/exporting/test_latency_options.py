"""What an export says of a time that its finished model does not keep."""

import pytest
from full_document import timed_arm

from rsi_deploy.exporting.timing.latency_options import missed_time
from rsi_deploy.planning.budget import Budget


class Measured:
    """Dense takes 10 ms, and the finished model so long."""

    def __init__(self, milliseconds):
        self.arms = (timed_arm("dense", 10.0, None), timed_arm("compressed", milliseconds, 10.0))


@pytest.mark.parametrize("budget", [Budget(keep_latency=0.6), Budget(max_latency=6_000_000)], ids=str)
def test_a_time_that_is_missed_is_said_and_one_that_is_kept_is_not(budget):
    (note,) = missed_time(budget, Measured(8.0))
    assert note.startswith(f"{budget} is MISSED")
    assert "60.0 % were allowed" in note
    assert missed_time(budget, Measured(5.0)) == []
    assert missed_time(budget, Measured(6.01)) == []  # within the interval: not shown


def test_other_budgets_promise_no_time():
    assert missed_time(Budget(keep_macs=0.5), Measured(8.0)) == []
    assert missed_time(None, Measured(8.0)) == []
