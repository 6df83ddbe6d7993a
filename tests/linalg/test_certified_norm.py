import itertools
import math

import pytest
import torch
from spectra import normal, spectral, values, weight_with

from rsi_deploy.linalg.certified_norm import (
    STARTS,
    WIDTH,
    certified_norm,
    is_certified,
    least_part,
    most_steps,
    search_norm,
)
from rsi_deploy.linalg.solver import Factors, Solver


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


def test_so_many_steps_are_enough_and_one_less_may_not_be():
    for n in (33, 1000, 10**6):
        for failure, starts in itertools.product((0.1, 0.01, 1e-6), (1, 4)):
            steps, part = most_steps(n, failure, starts=starts), least_part(n, failure ** (1 / starts))
            reached = [math.cosh((2 * k - 1) * math.acosh(1 + WIDTH)) * part for k in (steps - 1, steps)]
            assert reached[0] < 1 <= reached[1]


@pytest.mark.parametrize("n", [5, 50, 500])
def test_a_random_direction_has_less_than_the_least_part_as_rarely_as_said(n):
    v = normal(20_000, n)
    parts = v[:, 0].abs() / v.norm(dim=1)
    share = float((parts < least_part(n, 0.2)).float().mean())
    assert 0.15 < share < 0.21
    assert float((parts < 1.5 * least_part(n, 0.2)).float().mean()) > 0.21


@pytest.mark.parametrize("failure", [0.5, 0.1])
def test_the_upper_end_fails_as_rarely_as_said_and_not_never(failure):
    """On a spectrum that hides its largest value, one apart from many: a start may hardly have it."""
    weight = torch.diag(torch.cat([torch.ones(1), torch.linspace(0.93, 0, 159)])).double()
    uppers = [certified_norm(weight, nothing(weight), failure=failure, width=0.03, seed=n).upper for n in range(200)]
    missed = sum(float(upper) < 1 for upper in uppers) / 200
    assert 0.02 * failure < missed < failure


@pytest.mark.parametrize("k", [1, 2, 4, 6])
@pytest.mark.parametrize("name", ["slow", "fast", "flat"])
def test_the_best_polynomial_decides(name, k):
    """Against a least-squares problem in powers: among all `p`, the least `|R^T p(A) v|^2 / (l p(l)^2)`."""
    eigenvalues = values(name, 40).double() * (1 + 0.1 * normal(40).double().abs())
    v = torch.nn.functional.normalize(normal(40).double(), dim=0)
    low, high = torch.aminmax(eigenvalues)  # powers of what lies about zero: as good, and better conditioned
    about = (2 * eigenvalues - high - low) / (high - low)
    powers = torch.stack([about**j * v for j in range(k)], dim=1)
    Q = torch.linalg.qr(powers).Q
    T = Q.T @ (eigenvalues[:, None] * Q)
    at = float(torch.linalg.eigvalsh(T)[-1]) * (1 + WIDTH) ** 2
    at_powers = ((2 * at - high - low) / (high - low)) ** torch.arange(k, dtype=torch.float64)
    M = powers.T @ (eigenvalues[:, None] * powers)
    least = 1 / (at * float(at_powers @ torch.linalg.solve(M, at_powers)))
    assert is_certified(T[None], 1.02 * least**0.5, WIDTH)
    assert not is_certified(T[None], 0.98 * least**0.5, WIDTH)
    assert is_certified(torch.stack([T, 2 * T])[:, None], 1.02 * least**0.5, WIDTH).all()
    assert is_certified(
        torch.stack([T, 0.9 * T]), 1.02 * least**0.5, WIDTH
    )  # the lesser start tells more of the other's top
    assert not is_certified(torch.stack([T, T]), 0.98 * least**0.5, WIDTH)


def test_it_stops_early_and_the_more_so_the_less_is_asked():
    weight = weight_with(values("slow", 600), 600, 620).float()
    few = [search_norm(weight, nothing(weight), width=width).directions.shape[0] for width in (0.3, 0.045, 0.01)]
    assert few == sorted(few)
    assert few[0] < few[1] < STARTS * most_steps(600, starts=STARTS)


@pytest.mark.parametrize("weight", [torch.zeros(600, 620), normal(600, 3) @ normal(3, 620, seed=1)], ids=["0", "3"])
def test_a_space_that_ends(weight):
    """A residual of lower rank than there are steps: nothing is left to multiply."""
    interval, directions, images = search_norm(weight, nothing(weight))
    of_each = directions.reshape(STARTS, -1, directions.shape[-1])
    identities = torch.eye(of_each.shape[1]).expand(STARTS, -1, -1)
    torch.testing.assert_close(of_each @ of_each.mT, identities, rtol=0, atol=1e-4)
    torch.testing.assert_close(images, directions @ weight, rtol=0, atol=1e-4 * float(weight.norm()))
    truth = spectral(weight)
    assert float(interval.lower) <= truth * (1 + 1e-9)
    assert truth <= float(interval.upper) <= 1.05 * float(interval.lower) + 1e-30


@pytest.mark.slow
def test_a_large_weight():
    weight = weight_with(values("slow", 2048), 2048, 2500).float()
    interval = certified_norm(weight, nothing(weight))
    assert float(interval.lower) <= 1 + 1e-6
    assert 1 - 1e-6 <= float(interval.upper) <= 1.05 * float(interval.lower)
