"""Products by oneDNN are the products, and are taken where they are faster and nowhere else."""

import itertools

import pytest
import torch
from spectra import normal, spectral, values, weight_with

from rsi_deploy.linalg.products import gemm, onednn, rates
from rsi_deploy.linalg.solver import Solver

CPU = torch.device("cpu")
here = pytest.mark.skipif(not onednn.has_onednn(CPU), reason="this torch has no float32 product of oneDNN here")


def turned(A):
    """The same matrix, stored by columns."""
    return A.mT.contiguous().mT


def gapped(A):
    """The same matrix with a gap behind each row."""
    return torch.cat([A, A], dim=1)[:, : A.shape[1]]


@pytest.fixture
def machine(monkeypatch):
    """Have oneDNN so many times as fast as `@`."""

    def with_rates(times):
        made = rates.Rates(full=1e11, onednn=times * 1e11, half=1e11, double=5e10, eigen=1e-9)
        monkeypatch.setitem(rates._set_rates, ("cpu", torch.get_num_threads()), made)

    return with_rates


@here
@pytest.mark.parametrize("layouts", list(itertools.product([torch.clone, turned], repeat=2)))
@pytest.mark.parametrize("shape", [(64, 96, 32), (97, 101, 13), (5, 300, 1), (1, 1, 1), (200, 3, 77)])
def test_it_is_the_product(shape, layouts):
    m, k, n = shape
    A, B = layouts[0](normal(m, k)), layouts[1](normal(k, n, seed=1))
    exact = A.double() @ B.double()
    found = onednn.by_onednn(A, B)
    assert found.is_contiguous()
    assert found.shape == (m, n)
    assert float((found - exact).norm() / exact.norm()) < 2e-6 < float((found + 1e-4 * A[0, 0] - exact).norm())


@here
@pytest.mark.parametrize(
    ("A", "B", "times", "taken"),
    [
        (normal(600, 700), normal(700, 400), 1.5, True),
        (turned(normal(600, 700)), turned(normal(700, 400)), 1.5, True),
        (normal(600, 700), normal(700, 400), 1.0, False),
        (normal(600, 700), normal(700, 10), 1.5, False),
        (normal(600, 700).double(), normal(700, 400).double(), 1.5, False),
        (gapped(normal(600, 700)), normal(700, 400), 1.5, False),
        (normal(600, 700), gapped(normal(700, 400)), 1.5, False),
    ],
)
def test_where_it_is_taken(A, B, times, taken, machine, monkeypatch):
    machine(times)
    calls = []
    monkeypatch.setattr(gemm, "by_onednn", lambda A, B: calls.append(1) or onednn.by_onednn(A, B))
    torch.testing.assert_close(gemm.product(A, B), A @ B, rtol=1e-4, atol=1e-4)
    assert bool(calls) is taken


@here
@pytest.mark.parametrize("shape", [(700, 900), (900, 700)])
def test_factors_are_as_good(shape, machine):
    weight = weight_with(values("medium", 700), *shape).float()
    errors = []
    for times in (1.0, 1.5):
        machine(times)
        left, right = Solver(seed=0, route="chebyshev")(weight, 300)
        errors.append(spectral(weight.double() - left.double() @ right.double()))
    assert errors[1] <= 1.001 * errors[0]
    assert errors[0] != errors[1]  # another library rounds elsewhere


def test_it_is_not_looked_for_on_a_gpu():
    assert not onednn.has_onednn(torch.device("cuda"))


@pytest.mark.parametrize(
    "broken",
    [
        lambda A, B: torch.ops.mkldnn.no_such_operator(A, B),
        lambda A, B: (A @ B) * 1.001,
        lambda A, B: torch.stack([torch.stack([(a * b).sum() for b in B.mT]) for a in A]),
    ],
    ids=["missing", "wrong", "loops"],
)
def test_one_that_is_missing_wrong_or_slow_is_not_there(broken, monkeypatch):
    monkeypatch.setattr(onednn, "by_onednn", broken)
    assert not onednn.has_onednn(CPU)
