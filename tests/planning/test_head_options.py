"""Sites that read values of heads: what a number of each head costs, and zero-filled factors of that size."""

import pytest
import torch

from graph_passes import Units
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.exporting.calibration_step import _macs_of_weights
from rsi_deploy.planning.decide import zero_filled


def site(form: str) -> CalibratedSite:
    units = Units(form=form, count=8, run=3, makers=("v",), nodes=("v", "m"), numbers=3 * 17, beside=3)
    return CalibratedSite(
        name="o",
        kind="MatMul",
        groups=1,
        out_features=10,
        in_features=24,
        forms=("matmul", form),
        macs=240 * 5,
        load=lambda: torch.zeros(1, 10, 24),
        units=units,
        unit_macs=24 * 25,
    )


def test_costs_are_in_proportion_to_the_numbers_of_a_head():
    heads = site("heads")
    assert heads.split_params("heads", 24) == 240
    assert heads.split_params("heads", 12) == 120 - 4 * 3  # without the bias of the numbers that are gone
    assert heads.split_macs("heads", 12) == 240 * 5 / 2 - 24 * 25 / 2  # half of the attention goes too
    assert heads.split_params("matmul", 4) == 4 * 34
    assert heads.split_macs("matmul", 4) == 4 * 34 * 5


def test_zero_filled_factors_keep_the_first_numbers_of_every_head():
    right = zero_filled(site("heads"), "heads", 6).replacement.right[0]
    assert right.nonzero()[:, 1].tolist() == [0, 1, 8, 9, 16, 17]
    assert zero_filled(site("units"), "units", 6).replacement.right[0].nonzero()[:, 1].tolist() == list(range(6))
    assert not zero_filled(site("heads"), "matmul", 6).replacement.right.any()


@pytest.mark.parametrize(("count", "attention", "left"), [(100, 0, 100), (100, 30, 70), (100, 100, 50), (0, 0, 0)])
def test_macs_that_a_factorization_may_change(count, attention, left):
    assert _macs_of_weights(count, attention) == left
