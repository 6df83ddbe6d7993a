"""The search for a crossing, on responses that are straight, bent, broken and noisy."""

import math

import pytest

from rsi_deploy.planning.bracket import Aim, Trial, next_planned

AIM = Aim(low=0.40, middle=0.418, high=0.442)


def tries(response, first, *, largest=1.0, most=20):
    """The trials until one comes within the aim."""
    trials = [Trial(planned=first, came=response(first))]
    while AIM.side(trials[-1].came) and len(trials) < most:
        planned = next_planned(trials, AIM, largest)
        trials.append(Trial(planned=planned, came=response(planned)))
    return trials


@pytest.mark.parametrize("first", [0.05, 0.4, 0.9])
@pytest.mark.parametrize(
    "response",
    [
        lambda s: 0.7 * s,
        lambda s: 1.3 * s - 0.1,
        lambda s: s**0.4 * 0.8,
        lambda s: s**4,
        lambda s: 1 - math.exp(-4 * s),
    ],
    ids=["straight", "offset", "steep at first", "steep at last", "levelling off"],
)
def test_a_steady_response_is_met_in_a_few_tries(response, first):
    trials = tries(response, first)
    assert len(trials) <= 6
    assert AIM.side(trials[-1].came) == 0


def test_a_step_is_closed_in_on_from_both_sides():
    trials = tries(lambda s: 0.1 if s < 0.3 else 0.75, 0.9, most=12)
    assert AIM.side(trials[-1].came) != 0  # there is nothing between
    below = max(t.planned for t in trials if t.came == 0.1)
    above = min(t.planned for t in trials if t.came == 0.75)
    assert below < 0.3 <= above < below + 0.02


def test_what_does_nothing_is_followed_by_all_there_is():
    assert next_planned([Trial(planned=0.2, came=-0.1)], AIM, 0.8) == 0.8
    assert next_planned([Trial(planned=0.2, came=0.01)], AIM, 0.8) == 0.8  # 8.4, of 0.8


def test_a_response_that_fell_once_does_not_lead_astray():
    noisy = [Trial(planned=0.5, came=0.6), Trial(planned=0.6, came=0.2)]  # more was planned for, and less came
    assert 0 < next_planned(noisy, AIM, 1.0) < 0.5
    assert AIM.side(0.4) == 0 == AIM.side(0.442)
    assert (AIM.side(0.39), AIM.side(0.45)) == (-1, 1)
