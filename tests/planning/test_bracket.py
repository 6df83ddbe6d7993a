"""The bracket search on linear, curved, discontinuous and noisy responses."""

import math

import pytest

from rsi_deploy.planning.bracket import Target, Trial, next_planned

TARGET = Target(low=0.40, middle=0.418, high=0.442)


def tries(response, first, *, largest=1.0, most=20):
    """The trials up to the first one within the target."""
    trials = [Trial(planned=first, reached=response(first))]
    while TARGET.side(trials[-1].reached) and len(trials) < most:
        planned = next_planned(trials, TARGET, largest)
        trials.append(Trial(planned=planned, reached=response(planned)))
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
def test_a_continuous_response_needs_few_trials(response, first):
    trials = tries(response, first)
    assert len(trials) <= 6
    assert TARGET.side(trials[-1].reached) == 0


def test_a_step_is_bracketed_from_both_sides():
    trials = tries(lambda s: 0.1 if s < 0.3 else 0.75, 0.9, most=12)
    assert TARGET.side(trials[-1].reached) != 0  # the response skips the target
    below = max(t.planned for t in trials if t.reached == 0.1)
    above = min(t.planned for t in trials if t.reached == 0.75)
    assert below < 0.3 <= above < below + 0.02


def test_after_a_trial_without_effect_the_largest_value_is_planned():
    assert next_planned([Trial(planned=0.2, reached=-0.1)], TARGET, 0.8) == 0.8
    assert next_planned([Trial(planned=0.2, reached=0.01)], TARGET, 0.8) == 0.8  # 8.4, of 0.8


def test_a_decrease_by_noise_does_not_break_the_search():
    noisy = [Trial(planned=0.5, reached=0.6), Trial(planned=0.6, reached=0.2)]  # the larger plan reached less
    assert 0 < next_planned(noisy, TARGET, 1.0) < 0.5
    assert TARGET.side(0.4) == 0 == TARGET.side(0.442)
    assert (TARGET.side(0.39), TARGET.side(0.45)) == (-1, 1)
