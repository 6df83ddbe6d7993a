"""The kernel on a real GPU: as good as in float32, orthonormal, within its memory, and the same each time."""

import pytest
import torch
from spectra import normal, values

from rsi_deploy.linalg.products.rates import rates
from rsi_deploy.linalg.solver import Factors, Solver, certified_norm

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def weight_with(singular, *sides):
    """As `spectra.weight_with`, made on the GPU: float32 `(out, in)`."""
    n = len(singular)
    blocks = (normal(side, n, seed=seed, dtype=torch.float64) for seed, side in enumerate(sides))
    left, right = (torch.linalg.qr(block.cuda()).Q for block in blocks)
    return ((left * singular.cuda()) @ right.T).float()


def lost(weight, factors):
    """The residual's norm, exact to 1e-8."""
    residual = weight.double() - factors.left.double() @ factors.right.double()
    wide = residual if residual.shape[0] <= residual.shape[1] else residual.mT
    return float(torch.linalg.eigvalsh(wide @ wide.mT)[-1]) ** 0.5


@pytest.mark.parametrize("spectrum", ["slow", "medium", "fast"])
@pytest.mark.parametrize("shape", [(3000, 2100), (2100, 3000)])
@pytest.mark.parametrize("rank", [210, 1050])
def test_mixed_precision_loses_next_to_nothing(spectrum, shape, rank, monkeypatch):
    monkeypatch.setattr("rsi_deploy.linalg.solve.LEAST_LOW_FLOPS", {})
    weight = weight_with(values(spectrum, 2100), *shape)
    assert rates(weight.device).mixed
    mixed, plain = (
        Solver(route="chebyshev", mixed_precision=flag).solve(weight, rank, site="a") for flag in (True, False)
    )
    assert mixed.route == plain.route == "chebyshev"
    assert lost(weight, mixed.factors) <= 1.01 * lost(weight, plain.factors)
    left = mixed.factors.left.double()
    assert float((left.mT @ left - torch.eye(rank, device="cuda")).abs().max()) < 1e-5
    interval = certified_norm(weight, mixed.factors)
    assert float(interval.lower) <= lost(weight, mixed.factors) <= float(interval.upper)
    assert torch.equal(mixed.factors.left, Solver(route="chebyshev").solve(weight, rank, site="a").factors.left)


@pytest.mark.parametrize("route", ["auto", "direct", "gram", "krylov", "exact"])
def test_every_route_is_near_the_optimum(route):
    weight = weight_with(values("medium", 300), 700, 300)
    factors = Solver(route=route)(weight, 30)
    assert factors.left.is_cuda
    assert factors.right.is_cuda
    limit = (1.001 if route == "exact" else 1.15) / 31  # the optimum is the next singular value
    assert lost(weight, factors) <= limit
    assert lost(weight, Factors(factors.left, factors.right * 1.1)) > limit


def test_each_of_many_has_the_bytes_it_has_alone():
    weights = [normal(96, 80, seed=seed).cuda() for seed in range(5)]
    sites = [f"s{index}" for index in range(5)]
    together = Solver().solve_many(weights, 12, sites=sites)
    for weight, site, solution in zip(weights, sites, together, strict=True):
        alone = Solver().solve(weight, 12, site=site).factors
        assert torch.equal(alone.left, solution.factors.left)
        assert torch.equal(alone.right, solution.factors.right)
    assert not torch.equal(together[0].factors.left, together[1].factors.left)


@pytest.mark.parametrize("rank", [105, 525, 1050])
def test_memory_is_at_most_two_blocks(rank):
    weight = weight_with(values("slow", 2100), 2100, 4000)
    Solver(route="chebyshev")(weight, rank)  # workspaces of the libraries
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    Solver(route="chebyshev")(weight, rank)
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * 2 * 4 * sum(weight.shape) * rank


def test_what_is_refused_on_the_cpu_is_refused_here():
    bad = normal(40, 30).cuda()
    bad[3, 4] = torch.nan
    with pytest.raises(ValueError, match="1 NaN or infinite values"):
        Solver()(bad, 4)
    with pytest.raises(ValueError, match="real and floating"):
        Solver()(bad.int(), 4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_huge_and_tiny_weights(scale):
    weight = weight_with(values("medium", 600), 700, 600).double()
    plain, scaled = (Solver()((weight * s).float(), 150) for s in (1.0, scale))
    back = Factors(scaled.left, (scaled.right.double() / scale).float())
    assert lost(weight, back) <= 1.05 * lost(weight, plain)


def test_rank_above_full_is_said():
    solution = Solver().solve(normal(40, 30).cuda(), 31)
    assert solution.note == "rank 31 is above full rank: exact factors of rank 30"
