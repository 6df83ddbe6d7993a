"""Cross-validation from moments gives what leaving rows out gives."""

import pytest
import torch

from rsi_deploy.calibration.cross_validation import (
    ResponseCurves,
    Trust,
    has_folds,
    held_out_error,
    parted,
    trust_of,
)
from rsi_deploy.calibration.moments import MomentAccumulator, Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import RIDGE, dense_response_error, response_problem
from rsi_deploy.linalg.solver import Solver

OUT, IN = 9, 12


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def folded(x, y, folds=4):
    """Return the moments of rows in equal folds, and the rows of each fold."""
    accumulator = MomentAccumulator(x.shape[-1])
    parts = list(zip(x.chunk(folds, dim=1), y.chunk(folds, dim=1), strict=True))
    for number, part in enumerate(parts):
        accumulator.add(*part, fold=number)
    return accumulator.result(), parts


def rows(count, *, noise=0.0, seed=0):
    x = randn(1, count, IN, seed=seed) * 0.7 ** torch.arange(IN) + 3
    W = randn(1, OUT, IN, seed=1)
    return x, x @ W.mT + noise * randn(1, count, OUT, seed=seed + 2), W


def one_by_one(parts):
    for number, (x, y) in enumerate(parts):
        others = [part for n, part in enumerate(parts) if n != number]
        yield tuple(torch.cat(some, dim=1).double() for some in zip(*others, strict=True)), (x.double(), y.double())


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_the_curve_is_that_of_projections_judged_on_rows_left_out(sensitive, shape):
    out, n = shape
    x, W = randn(1, 40, n) * 0.7 ** torch.arange(n) + 3, randn(1, out, n, seed=1)
    moments, parts = folded(x, x @ W.mT)
    G = torch.diag_embed(torch.linspace(0.1, 4, out)).unsqueeze(0) if sensitive else None
    found = ResponseCurves(W, moments, G).held_out_curve().errors
    for rank in (1, 3, 5):
        lost = total = 0.0
        for (x_fit, y_fit), (x_out, y_out) in one_by_one(parts):
            (others, _), *_ = [folded(x_fit.float(), y_fit.float(), 1)]
            problem = response_problem(W, others, sensitivity=G)
            left, right = problem.factors(rank, Solver())
            z = (x_out - x_fit.mean(dim=1, keepdim=True)) @ (left @ right).mT + y_fit.mean(dim=1, keepdim=True)
            scale = torch.ones(out) if G is None else (0.1 + 0.9 * G[0].diagonal() / G[0].diagonal().mean())
            lost += float((scale * (y_out - z) ** 2).sum())
            total += float((scale * (y_out - (x @ W.mT).double().mean(dim=1)) ** 2).sum())
        assert float(found[rank]) == pytest.approx(lost / total, rel=1e-2)  # the ridge is that of all rows
        assert float(found[rank]) != pytest.approx(lost / total * 1.1, rel=1e-2)
    assert float(found[-1]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sensitive", [False, True])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_a_projection_has_the_error_that_it_is_said_to_have(sensitive, shape):
    out, n = shape
    x, W = randn(1, 60, n) * 0.7 ** torch.arange(n) + 3, randn(1, out, n, seed=1)
    moments, _ = folded(x, x @ W.mT)
    G = torch.diag_embed(torch.linspace(0.1, 4, out)).unsqueeze(0) if sensitive else None
    for given in (moments, Samples(x=x, y=x @ W.mT)):
        response = ResponseCurves(W, given, G)
        for rank in (1, 4):
            left, right = response.projection(rank)
            assert (left.shape, right.shape) == ((1, out, rank), (1, rank, n))
            found = dense_response_error(W, left @ right, moments, G)
            assert float(response.errors[rank]) == pytest.approx(found, rel=1e-3)
            assert float(response.errors[rank]) != pytest.approx(float(response.errors[rank + 1]), rel=0.1)
        assert float(response.errors[-1]) == pytest.approx(0, abs=1e-6)


def test_more_outputs_than_rows_look_good_in_sample_only():
    wide, count = 60, 40
    W, x = randn(1, wide, wide, seed=1), randn(1, count, wide)
    moments, _ = folded(x, x @ W.mT)
    fresh = randn(1, 4000, wide, seed=9)
    rank = 35
    problem = response_problem(W, moments)
    left, right = problem.factors(rank, Solver())
    y = fresh @ W.mT
    true = float(((y - fresh @ (left @ right).float().mT) ** 2).sum() / y.square().sum())
    assert float(problem.errors()[rank]) < 0.3 * true, "in sample the site looks far better than it is"
    assert float(ResponseCurves(W, moments).held_out_curve().errors[rank]) == pytest.approx(true, rel=0.35)


def test_halves_of_rows_judge_wide_inputs():
    x, y, W = rows(400)
    by_rows = ResponseCurves(W, Samples(x=x, y=y)).held_out_curve().errors
    by_moments = ResponseCurves(W, folded(x, y, 2)[0]).held_out_curve((1e-9,)).errors
    assert has_folds(Samples(x=x, y=y))
    torch.testing.assert_close(by_rows, by_moments, rtol=1e-2, atol=1e-5)


def test_the_held_out_error_is_that_of_rows_left_out():
    x, y, W = rows(60, noise=0.5)
    moments, parts = folded(x, y)

    def fit(part: Moments):
        left, right = response_problem(W, part).factors(5, Solver())
        return left @ right

    lost = total = 0.0
    for (x_fit, y_fit), (x_out, y_out) in one_by_one(parts):
        T = fit(folded(x_fit.float(), y_fit.float(), 1)[0]).double()
        mean = y_fit.mean(dim=1, keepdim=True)
        lost += float((y_out - mean - (x_out - x_fit.mean(dim=1, keepdim=True)) @ T.mT).square().sum())
        total += float((y_out - mean).square().sum())
    assert held_out_error(fit, moments) == pytest.approx(lost / total, rel=1e-4)
    assert held_out_error(fit, moments, folds=1) != pytest.approx(lost / total, rel=1e-4)


def test_folds_are_about_the_means_of_the_others():
    x, y, _ = rows(48)
    moments, parts = folded(x, y)
    for (others, judged), ((x_fit, _), (x_out, _)) in zip(parted(moments), one_by_one(parts), strict=True):
        d = x_out - x_fit.mean(dim=1, keepdim=True)
        torch.testing.assert_close(judged.xx, d.mT @ d / d.shape[1], rtol=1e-5, atol=1e-6)
        assert others.rows == 36


def test_a_regression_is_trusted_as_far_as_it_holds_on_rows_left_out():
    x, _, W = rows(4000)
    other = randn(1, OUT, IN, seed=7)
    enough, _ = folded(x, x @ other.mT)  # the response is another linear function of the input
    trust = trust_of(W, enough, OUT)
    assert trust.share > 0.95
    assert trust.extra_ridge <= 0.03
    x, _, W = rows(16)
    noise, _ = folded(x, x @ W.mT + 5 * randn(1, 16, OUT, seed=5))  # what differs from W x is noise
    assert trust_of(W, noise, OUT).share * (1 / (1 + trust_of(W, noise, OUT).extra_ridge)) < 0.5


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_mixes_the_regression_with_the_weight(share):
    x, y, W = rows(300, noise=1.0)
    moments, _ = folded(x, y)
    whole = response_problem(W, moments).target
    mixed = response_problem(W, Trust(share=share).applied(moments, W)).target
    plain = response_problem(W, Trust(share=0.0).applied(moments, W)).target
    torch.testing.assert_close(plain, W.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mixed, torch.lerp(plain, whole, share), rtol=1e-3, atol=1e-4)


def test_scarce_rows_prefer_a_larger_ridge():
    W, x = randn(1, 30, 40, seed=1), randn(1, 24, 40)
    response = ResponseCurves(W, folded(x, x @ W.mT)[0])
    scarce = response.held_out_curve((RIDGE, 1.0))
    assert min(scarce.ridges[5:20]) == 1.0
    one = response.held_out_curve((RIDGE,))
    assert (scarce.errors <= one.errors + 1e-12).all()
