"""The search over shares, on models that are numbers."""

import itertools
import math
from functools import partial

import pytest

from rsi_deploy.exporting.calibrated.size_search import CLOSE, STEPS, SizeSearch


def search(keeps, *, smallest=0.2, grain=1e-6, aim=0.05, excess=None):
    """A search whose plan, splits and model are the share, in steps of `grain`; `keeps` says which ones are good."""
    return SizeSearch(
        plan=lambda share: round(share / grain) * grain,
        foreseen=lambda share: (1 - share) ** 2,
        splits=lambda share: {} if share >= 1 else {"site": share},
        fit=lambda share: share,
        judge=lambda share: (share, keeps(share)),
        excess=excess or (lambda share: -1 if keeps(share) else 1),
        smallest=smallest,
        aim=aim,
    )


@pytest.mark.parametrize("needed", [0.25, 0.4, 0.61, 0.83, 0.97])
@pytest.mark.parametrize("aim", [1e-4, 0.05, 10])
def test_the_answer_is_tight(needed, aim):
    found = search(lambda share: share >= needed, aim=aim)
    best = found.run()
    assert needed <= best <= needed + 3 * CLOSE
    below = [trial for trial in found.trials if trial.value < best]
    assert below
    assert not any(trial.holds for trial in below), "the next smaller point was tried and failed"
    assert best - max(trial.share for trial in below) <= 3 * CLOSE
    assert len(found.trials) <= STEPS


def test_losses_that_are_shown_save_fits():
    def excess(share, needed, power):  # foreseen losses have the power 2
        return power * math.log(max(1 - share, 1e-9) / (1 - needed)) + 0.02 * math.sin(100 * share)

    def fits(needed, power, aim, *, is_shown):
        def keeps(share):
            return excess(share, needed, power) <= 0

        shown = partial(excess, needed=needed, power=power) if is_shown else None
        found = search(keeps, aim=aim, excess=shown)
        best = found.run()
        below = [trial.share for trial in found.trials if not trial.holds]
        assert not is_shown or best - max(below) <= 3 * CLOSE
        return len(found.trials)

    cases = list(itertools.product([0.25, 0.4, 0.61, 0.83, 0.97], [1, 2, 4], [1e-4, 0.05, 10]))
    counts = [sum(fits(*case, is_shown=is_shown) for case in cases) for is_shown in (True, False)]
    assert counts[0] < 0.8 * counts[1]


def test_a_limit_that_everything_keeps_gives_the_smallest():
    assert search(lambda share: True).run() <= 0.2 + 3 * CLOSE


def test_a_limit_that_nothing_keeps_has_no_answer():
    found = search(lambda share: False)
    assert found.run() is None
    assert max(trial.share for trial in found.trials) > 0.98, "also models that are almost dense were tried"


def test_the_same_plan_is_fitted_once():
    found = search(lambda share: share >= 0.6, grain=0.2)
    assert found.run() == pytest.approx(0.6)
    assert len({round(trial.value, 6) for trial in found.trials}) == len(found.trials) <= 4


def test_a_good_first_point_saves_fits():
    steps = {aim: search(lambda share: share >= 0.9, aim=aim) for aim in (0.01, 10)}
    for each in steps.values():
        assert each.run() == pytest.approx(0.9, abs=3 * CLOSE)
    assert len(steps[0.01].trials) <= len(steps[10].trials)
