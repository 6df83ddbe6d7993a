import dataclasses

import ml_dtypes
import numpy as np
import pytest

from graph_passes import Site, SplitFactors


def test_site_ranks():
    site = Site(
        node="fc",
        op_type="MatMul",
        weight="fc.weight",
        out_features=6,
        in_features=3,
        groups=1,
        dtype="float32",
        loader=lambda: np.zeros((1, 6, 3), np.float32),
    )
    assert (site.break_even_rank, site.full_rank) == (2.0, 3)
    assert site.load().shape == (1, 6, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        site.node = "other"


@pytest.mark.parametrize(
    ("left", "right"), [((6, 2), (2, 4)), ((1, 6, 2), (1, 3, 4)), ((2, 6, 2), (1, 2, 4)), ((1, 6, 0), (1, 0, 4))]
)
def test_factors_that_do_not_fit(left, right):
    with pytest.raises(ValueError, match=r"expected left \(groups, out, rank\)") as caught:
        SplitFactors(left=np.ones(left), right=np.ones(right))
    assert str(left) in str(caught.value)


def test_factors_of_two_dtypes_or_no_float():
    with pytest.raises(ValueError, match="got left float32 and right float64"):
        SplitFactors(left=np.ones((1, 6, 2), np.float32), right=np.ones((1, 2, 4)))
    with pytest.raises(ValueError, match="got left int64"):
        SplitFactors(left=np.ones((1, 6, 2), np.int64), right=np.ones((1, 2, 4), np.int64))
    assert (
        SplitFactors(left=np.ones((1, 6, 2), ml_dtypes.bfloat16), right=np.ones((1, 2, 4), ml_dtypes.bfloat16)).rank
        == 2
    )


def test_a_bias_that_does_not_fit_the_factors():
    left, right = np.ones((1, 6, 2), np.float32), np.ones((1, 2, 4), np.float32)
    for bias, came in ((np.ones((1, 6), np.float32), r"\(1, 6\) in float32"), (np.ones(6), r"\(6,\) in float64")):
        with pytest.raises(ValueError, match=f"expected a bias with one axis in float32, but got {came}"):
            SplitFactors(left=left, right=right, bias=bias)
    assert SplitFactors(left=left, right=right).bias is None
    assert SplitFactors(left=left, right=right).form == "first"
