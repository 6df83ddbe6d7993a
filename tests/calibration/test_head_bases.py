"""Bases of the values of attention heads, and the weight that is refitted to them."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsi_deploy.calibration import head_bases
from rsi_deploy.calibration.head_bases import head_counts, head_factors

SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
RIDGE = 1e-9


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def moments(columns: int, seed: int = 0) -> torch.Tensor:
    """Second moments of correlated inputs, of falling variances."""
    x = drawn(400, columns, seed=seed) @ drawn(columns, columns, seed=seed + 1) * torch.logspace(0, -1, columns)
    return x.T @ x / len(x)


def error(W: torch.Tensor, near: torch.Tensor, xx: torch.Tensor, G: torch.Tensor | None = None) -> float:
    moved = (W - near) @ xx @ (W - near).T
    return float(moved.trace() if G is None else (moved @ G).trace())


def made(W: torch.Tensor, xx: torch.Tensor, heads: int, kept: int, G: torch.Tensor | None = None) -> torch.Tensor:
    ((left, right),) = head_factors(W, xx, heads, [kept], ridge=RIDGE, sensitivity=G)
    return left @ right


@settings(max_examples=25, **SETTINGS)
@given(heads=st.integers(1, 4), size=st.integers(1, 5), out=st.integers(1, 9), seed=st.integers(0, 3))
def test_shapes_blocks_and_falling_errors(heads, size, out, seed):
    W, xx = drawn(out, heads * size, seed=seed), moments(heads * size, seed)
    last = 0.0
    for kept, (left, right) in zip(
        range(size, 0, -1), head_factors(W, xx, heads, range(size, 0, -1), ridge=RIDGE), strict=True
    ):
        assert left.shape == (out, heads * kept)
        torch.testing.assert_close(right @ right.T, torch.eye(heads * kept).double())
        inside = torch.block_diag(*[torch.ones(kept, size)] * heads)
        assert not right[inside == 0].any()
        own = error(W, left @ right, xx)
        assert own >= last * (1 - 1e-6) - 1e-9
        last = own
        if kept == size:
            torch.testing.assert_close(left @ right, W, rtol=1e-5, atol=1e-5)


def test_one_head_is_the_best_low_rank_response():
    W, xx = drawn(7, 6, seed=3), moments(6)
    response = torch.linalg.svdvals(W @ torch.linalg.cholesky(xx))
    for kept in (1, 3, 5):
        assert error(W, made(W, xx, 1, kept), xx) == pytest.approx(float(response[kept:].square().sum()), rel=1e-5)


def test_turns_and_the_refit_lower_the_error_of_correlated_heads(monkeypatch):
    errors = {}
    for turns in (4, 1, 0):
        monkeypatch.setattr(head_bases, "TURNS", turns)
        cases = [(drawn(20, 24, seed=seed), moments(24, seed)) for seed in range(5)]
        errors[turns] = [error(W, made(W, xx, 4, 3), xx) for W, xx in cases]
    assert all(four <= one * (1 + 1e-9) for four, one in zip(errors[4], errors[1], strict=True))
    assert sum(errors[1]) < 0.97 * sum(errors[0])
    for seed, own in enumerate(errors[4]):
        W, xx = drawn(20, 24, seed=seed), moments(24, seed)
        first = torch.block_diag(*[torch.eye(6)[:3]] * 4).double()  # the first numbers of each head, refitted
        left = torch.linalg.solve(first @ xx @ first.T, first @ xx @ W.T).T
        assert own < 0.8 * error(W, left @ first, xx)


def test_numbers_that_a_head_repeats_cost_nothing():
    mix = torch.block_diag(*[drawn(6, 2, seed=seed) for seed in range(3)])  # two sources in each head
    xx = mix @ moments(6) @ mix.T
    W = drawn(5, 18)
    assert error(W, made(W, xx + 1e-8 * torch.eye(18), 3, 2), xx) < 1e-5 * error(W, 0 * W, xx)
    assert error(W, made(W, xx + 1e-8 * torch.eye(18), 3, 1), xx) > 1e-2 * error(W, 0 * W, xx)


def test_the_sensitivity_decides_what_is_kept():
    W, xx = torch.diag(torch.tensor([1.0, 2.0])).double(), torch.eye(2).double()
    G = torch.diag(torch.tensor([100.0, 1.0])).double()
    assert made(W, xx, 1, 1)[0].abs().max() < 1e-6
    assert made(W, xx, 1, 1, G)[1].abs().max() < 1e-6
    W, xx = drawn(12, 12, seed=5), moments(12, 5)
    G = drawn(12, 12, seed=6) * torch.logspace(1, -2, 12)
    G = G @ G.T
    assert error(W, made(W, xx, 3, 2, G), xx, G) < error(W, made(W, xx, 3, 2), xx, G)
    assert error(W, made(W, xx, 3, 2), xx) < error(W, made(W, xx, 3, 2, G), xx)


def test_counts_suit_kernels_and_divide():
    assert head_counts(64, 12) == [56, 48, 40, 32, 24, 16, 8]
    assert head_counts(24, 2) == [20, 16, 12, 8, 4]
    assert head_counts(2, 8) == [1]
    assert head_counts(1, 8) == []
    assert head_counts(16, 6, multiple=16) == [8]
    assert all(5 * kept % 7 == 0 for kept in head_counts(128, 5, multiple=7))
