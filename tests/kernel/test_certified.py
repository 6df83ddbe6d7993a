import math

import pytest
import torch
from spectra import normal, spectral, values, weight_with

from rsi_deploy.kernel.certified import WIDTH, certified_norm, lanczos_gap, lanczos_steps
from rsi_deploy.rsi import Factors, Solver


def nothing(weight):
    return Factors(weight[..., :0], weight[..., :0, :])


def test_a_thousand_random_cases_at_one_percent():
    """The ends hold in at least 99 % of 1,000 cases, and a tenth of the steps would not."""
    held = lower = careless = 0
    for case in range(1000):
        generator = torch.Generator().manual_seed(case)
        out, in_ = (int(torch.randint(40, 110, (1,), generator=generator)) for _ in range(2))
        name = ("slow", "medium", "fast", "flat")[case % 4]
        weight = torch.randn(out, in_, generator=generator)
        if case % 3:  # a spectrum of its own on random directions, not orthogonal: values of all kinds
            weight = weight * values(name, in_).float()
        interval = certified_norm(weight, nothing(weight), seed=case)
        truth = spectral(weight)
        held += float(interval.lower) <= truth * (1 + 1e-9) and truth <= float(interval.upper)
        lower += float(interval.lower) <= truth * (1 + 1e-9)
        careless += truth <= float(interval.lower) * 1.0001
        assert float(interval.upper / interval.lower) <= 1.05
    assert held >= 990
    assert lower == 1000  # a norm that is reached never exceeds the truth
    assert careless < 990  # the lower end alone would not do for an upper one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["slow", "medium", "fast", "flat"])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1200, 1000), (1000, 1200)])
def test_of_residuals(shape, name, dtype):
    weight = weight_with(values(name, min(shape)), *shape).to(dtype)
    factors = Solver(route="direct", mixed_precision=False)(weight, 30)
    truth = spectral(weight.double() - factors.left.double() @ factors.right.double())
    interval = certified_norm(weight, factors)
    assert float(interval.lower) <= truth * (1 + 1e-9)
    assert truth <= float(interval.upper) <= 1.05 * float(interval.lower)
    assert interval.u.dtype == dtype
    reached = (weight.double() - factors.left.double() @ factors.right.double()).T @ interval.u.double()
    assert float(reached.norm()) == pytest.approx(float(interval.lower), rel=0.02)


def test_a_batch_holds_together():
    weight = torch.stack([weight_with(values("slow", 120), 120, 150, seed=seed) for seed in (0, 4, 8)])
    weight = weight.reshape(3, 1, 120, 150) * torch.tensor([1.0, 10.0, 0.1])[:, None, None, None]
    interval = certified_norm(weight, nothing(weight))
    truth = torch.linalg.matrix_norm(weight, 2)
    assert interval.lower.shape == (3, 1)
    assert interval.u.shape == (3, 1, 120)
    assert ((interval.lower <= truth * (1 + 1e-9)) & (truth <= interval.upper)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (30, 30), (33, 2000)])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_small_zero_tiny_and_huge(shape, scale):
    weight = normal(*shape) * scale
    interval = certified_norm(weight, nothing(weight))
    assert float(interval.lower) <= spectral(weight) * (1 + 1e-9) <= float(interval.upper) * (1 + 2e-9)
    assert float(interval.upper) <= 1.05 * spectral(weight)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_and_of_extreme_size(scale):
    weight = normal(1100, 1000) * scale
    interval = certified_norm(weight, nothing(weight))
    assert float(interval.lower) <= spectral(weight) <= float(interval.upper) <= 1.05 * float(interval.lower)


def test_the_theorem_solved():
    """`steps` is the least number for the width, and `gap` puts the failure where it was asked for."""
    for n in (33, 1000, 10**6):
        for failure in (0.1, 0.01, 1e-6):
            steps = lanczos_steps(n, failure)
            gap = lanczos_gap(steps, n, failure)
            assert 1.648 * math.sqrt(n) * math.exp(-math.sqrt(gap) * (2 * steps - 1)) == pytest.approx(failure)
            assert 1 / math.sqrt(1 - gap) <= 1 + WIDTH
            assert 1 / math.sqrt(1 - lanczos_gap(steps - 1, n, failure)) > 1 + WIDTH
    assert lanczos_gap(1, 10**6, 0.01) == 1.0


@pytest.mark.slow
def test_a_large_weight():
    weight = weight_with(values("slow", 2048), 2048, 2500).float()
    interval = certified_norm(weight, nothing(weight))
    assert float(interval.lower) <= 1 + 1e-6
    assert 1 - 1e-6 <= float(interval.upper) <= 1.05 * float(interval.lower)
