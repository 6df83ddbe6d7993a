import pytest
import torch
from spectra import normal, spectral, values, weight_with

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.routes.chebyshev import iterate, shifts, steps
from rsi_deploy.linalg.routes.direct import direct

SHAPES = [(300, 420), (420, 300)]
SPECTRA = ["slow", "medium", "fast", "flat"]


def plain(operand, draw, q, *, mixed):
    """The direct route's iteration on the shorter side, in either precision."""
    return iterate(operand, draw, [0.0] * (q - 1), mixed=mixed)


def filtered(operand, draw, q, *, mixed):
    return iterate(operand, draw, shifts(steps(q)), mixed=mixed)


def factors(weight, rank, *, mixed, q=4, seed=0, allowance=1 << 20, route=plain):
    operand = Operand(weight=weight, scale=1.0, allowance=allowance)
    return route(operand, lambda side: normal(side, rank, seed=seed), q, mixed=mixed)


def error(weight, X, Y):
    return spectral(weight.double() - X.double() @ Y.double().T)


@pytest.mark.parametrize("route", [plain, filtered])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_costs_at_most_a_percent(shape, name, share, route):
    weight = weight_with(values(name, 300), *shape).float()
    for seed in range(2):
        full = error(weight, *factors(weight, int(300 * share), mixed=False, seed=seed, route=route))
        mixed = error(weight, *factors(weight, int(300 * share), mixed=True, seed=seed, route=route))
        assert mixed <= 1.01 * full
        careless = error(weight, *factors(weight, int(300 * share), mixed=False, seed=seed, q=2, route=route))
        assert careless > 1.01 * full or name == "flat"  # where every subspace is as good


@pytest.mark.parametrize("decades", [3, 6, 9])
def test_where_bfloat16_would_harm_it_is_not_used(decades):
    """What lies below the weight's rounding in bfloat16 is found all the same."""
    weight = weight_with(torch.logspace(0, -decades, 200, dtype=torch.float64), 200, 260).float()
    full, mixed = (error(weight, *factors(weight, 100, mixed=mixed)) for mixed in (False, True))
    assert mixed <= 1.01 * full + 1e-6
    rounded = weight.bfloat16().float()
    X, _ = factors(rounded, 100, mixed=False)
    if decades == 9:
        assert error(weight, X, weight.T @ X) > 1.5 * full


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", [direct, plain])
def test_without_shifts_it_is_the_papers_iteration(route, shape):
    """On the shorter side: of a tall weight's transpose."""
    weight = weight_with(values("slow", 300), *shape).double()
    wide = weight.T if shape[0] > shape[1] and route is plain else weight
    Y = normal(wide.shape[1], 20).double()
    for _ in range(4):
        X = torch.linalg.qr(wide @ Y).Q
        Y = wide.T @ X
    expected = (X @ Y.T).T if wide is not weight else X @ Y.T
    left, right = route(
        Operand(weight=weight, scale=1.0, allowance=1 << 20), lambda side: normal(side, 20).double(), 4, mixed=False
    )
    torch.testing.assert_close(left @ right.T, expected, rtol=0, atol=1e-9)
    assert float((left @ right.T - X[:, :-1] @ Y[:, :-1].T).norm() if wide is weight else 1.0) > 1e-3


@pytest.mark.parametrize("q", [4, 6, 8])
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("name", ["slow", "medium", "fast"])
def test_fewer_shifted_iterations_do_as_much(name, share, q):
    """At the same sketch, within the noise of one; and more than as many plain ones do."""
    weight = weight_with(values(name, 300), 300, 420).float()
    rank, seeds = int(300 * share), range(4)
    shifted, others, fewer = (
        sum(error(weight, *factors(weight, rank, mixed=False, seed=seed, q=count, route=route)) for seed in seeds)
        for route, count in ((filtered, q), (plain, q), (plain, steps(q)))
    )
    assert shifted <= 1.005 * others
    assert shifted < fewer


def test_shifts_are_zeros_of_chebyshevs_polynomial():
    for d in (3, 4, 5, 9):
        zeros = torch.tensor(shifts(d)[1:]).double().sqrt()
        assert shifts(d)[0] == 0
        assert shifts(d) == sorted(shifts(d))
        assert len(shifts(d)) == d - 1
        assert float(torch.cos((2 * d - 1) * torch.acos(zeros)).abs().max()) < 1e-6
    assert [shifts(d) for d in (1, 2)] == [[], [0.0]]


@pytest.mark.parametrize("mixed", [False, True])
def test_right_is_the_projection_in_float32(mixed):
    weight = weight_with(values("slow", 200), 200, 260).float()
    X, Y = factors(weight, 20, mixed=mixed)
    assert X.dtype == Y.dtype == torch.float32
    torch.testing.assert_close(X.T @ X, torch.eye(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(Y, weight.T @ X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("allowance", [1 << 12, 1 << 16, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_by_panels_are_products(dtype, allowance):
    weight = normal(150, 90).to(dtype)
    operand = Operand(weight=weight, scale=1.0, allowance=allowance)
    Y, X = normal(90, 7), normal(150, 7, seed=1)
    torch.testing.assert_close(operand.forward(Y), weight.float() @ Y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(operand.adjoint(X), weight.float().T @ X, rtol=1e-5, atol=1e-5)
    low = {"rtol": 3e-2, "atol": 0.3}
    torch.testing.assert_close(operand.low_forward(Y.bfloat16()).float(), weight.float() @ Y, **low)
    torch.testing.assert_close(operand.low_adjoint(X.bfloat16()).float(), weight.float().T @ X, **low)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(operand.low_forward(Y.bfloat16()).float(), weight.float() @ -Y, **low)
    assert torch.equal(weight, normal(150, 90).to(dtype))


def test_the_weights_rounding_is_estimated():
    """Rows and columns of any size, at least half of the truth and at most four times it."""
    for scale in (torch.ones(300), torch.logspace(0, -3, 300), 1 + 30 * (torch.arange(300) == 5)):
        for weight in (normal(300, 400) * scale[:, None], normal(400, 300) * scale):
            Y = normal(weight.shape[1], 60, seed=3)
            operand = Operand(weight=weight, scale=1.0, allowance=1 << 20)
            before = weight.clone()
            found = operand.rounding(2.0**-9 / 3**0.5, weight @ Y, Y)
            assert 0.5 < found / spectral(weight - weight.bfloat16().float()) < 4
            assert torch.equal(weight, before)
