"""Factors in few bits: the left factor makes up for what rounding has done to the right one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.calibration.moments import MomentAccumulator
from rsi_deploy.calibration.reduced_rank_regression import response_error, response_problem
from rsi_deploy.calibration.rounded_factors import cosines, normal_equations, refit, rounded_factors
from rsi_deploy.calibration.rounding import rounded_weight, second_moments
from rsi_deploy.linalg.solver import Solver

SITES = st.tuples(
    st.integers(0, 10_000),  # seed
    st.integers(1, 2),  # groups
    st.integers(2, 20),  # outputs
    st.integers(2, 20),  # inputs
    st.sampled_from([5, 4, 3]),  # bits
    st.booleans(),  # whether the response is that of other inputs, as in a compressed network
    st.sampled_from([10**6, 1]),  # widest input whose moments are kept: moments, or rows
)


def drawn(seed, groups, out, into, shifted, limit, rows=300):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rows, into, generator=generator) * 0.7 ** torch.arange(into)
    x = x @ torch.randn(groups, into, into, generator=generator) + 2
    weight = torch.randn(groups, out, into, generator=generator)
    y = (x + 0.3 * shifted * torch.randn(x.shape, generator=generator)) @ weight.mT
    gathering = MomentAccumulator(into, limit=limit)
    gathering.add(x, y)
    return weight, gathering.result()


def near(matrix, second, bits):
    return rounded_weight(matrix.float(), second, is_product=True, bits=bits).weight().reshape(matrix.shape).to(matrix)


@settings(max_examples=60, deadline=None)
@given(SITES)
def test_refitting_is_never_worse_on_the_moments(site):
    seed, groups, out, into, bits, shifted, limit = site
    weight, moments = drawn(seed, groups, out, into, shifted, limit)
    rank = max(1, min(out, into) // 2)
    left, right = response_problem(weight, moments).factors(rank, Solver())
    coarse = near(right, second_moments(moments), bits)
    fitted = refit(left, *normal_equations(weight, moments, coarse, 0.0))
    errors = [response_error(factor @ coarse, moments) for factor in (fitted, left)]
    assert errors[0] <= errors[1] * (1 + 1e-5) + 1e-6


def test_a_refit_to_the_unrounded_factor_is_rejected():
    weight, moments = drawn(0, 1, 20, 20, True, 10**6)
    left, right = response_problem(weight, moments).factors(10, Solver())
    coarse = near(right, second_moments(moments), 3)
    gram, cross = normal_equations(weight, moments, coarse, 0.0)
    wrong = refit(left, normal_equations(weight, moments, right, 0.0)[0], cross)
    errors = [response_error(f @ coarse, moments) for f in (refit(left, gram, cross), left, wrong)]
    assert errors[0] < 0.95 * errors[1]
    assert errors[2] > errors[0]


@pytest.mark.parametrize("limit", [10**6, 1])
@pytest.mark.parametrize("bits", [4, 3])
def test_fitted_rounding_loses_less_than_rounding_each_factor(bits, limit):
    ratios = []
    for seed in range(5):
        weight, moments = drawn(seed, 1, 48, 32, False, limit, rows=600)
        left, right = response_problem(weight, moments).factors(16, Solver())
        second = second_moments(moments, centred=True)
        apart = near(left, right.double() @ second @ right.double().mT, bits) @ near(right, second, bits)
        fitted = rounded_factors(
            left,
            right,
            second,
            lambda R, W=weight, m=moments: normal_equations(W, m, R, 0.01),
            is_product=True,
            bits=bits,
        )
        errors = [response_error(product, moments) for product in (fitted[0] @ fitted[1], apart, left @ right)]
        ratios.append((errors[0] - errors[2]) / (errors[1] - errors[2]))
    assert sorted(ratios)[2] < 0.8


@pytest.mark.parametrize("rank", [1, 2, 7, 64])
def test_cosines_are_orthogonal(rank):
    T = cosines(rank)
    assert torch.allclose(T @ T.mT, torch.eye(rank, dtype=torch.float64), atol=1e-12)
