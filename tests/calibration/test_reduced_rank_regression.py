"""The regression problem against least squares and random factors, by brute force over the rows."""

import pytest
import torch

from rsi_deploy.calibration.moments import MomentAccumulator, Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import (
    EXACT_LIMIT,
    METRIC_FLOOR,
    RIDGE,
    dense_response_error,
    leading_left_vectors,
    noise_response_error,
    regularized_cholesky,
    response_error,
    response_problem,
    ridge_level,
    sensitivity_root,
)
from rsi_deploy.linalg.solver import Solver

SOLVER = Solver(power_iterations=8)
SMALL = 1e-10


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(groups=1, rows=300, in_features=12, *, mean=1.0, seed=0):
    """Inputs with a decaying spectrum."""
    turn = torch.linalg.qr(randn(in_features, in_features, seed=seed + 1)).Q
    return (randn(groups, rows, in_features, seed=seed) * 0.7 ** torch.arange(in_features)) @ turn + mean


def gathered(x, y, limit=10**6):
    gathering = MomentAccumulator(x.shape[-1], limit=limit)
    half = x.shape[1] // 2
    gathering.add(x[:, :half], y[:, :half])
    gathering.add(x[:, half:], y[:, half:])
    return gathering.result()


def brute_error(x, y, product):
    """The relative centred error of all groups together."""
    x, y = x.double(), y.double()
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return float((y - x @ product.double().mT).square().sum() / y.square().sum())


def stream(groups=1, out=8, seed=0, **settings):
    """Dense inputs, inputs after compressed layers, a weight and its desired response."""
    x = correlated(groups, seed=seed, **settings)
    xh = x @ (torch.eye(x.shape[-1]) + 0.2 * randn(x.shape[-1], x.shape[-1], seed=seed + 2)) + 0.1 * randn(
        *x.shape, seed=seed + 7
    )
    W = randn(groups, out, x.shape[-1], seed=seed + 3)
    return x, xh, W, x @ W.mT


CASES = {"narrow": (1, 8), "wide": (1, 20), "grouped": (3, 5)}


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
@pytest.mark.parametrize(("groups", "out"), CASES.values(), ids=CASES)
def test_the_error_of_a_product_is_the_empirical_one(groups, out, limit):
    _, xh, W, y = stream(groups, out)
    found = response_error(W, gathered(xh, y, limit))
    assert found == pytest.approx(brute_error(xh, y, W), rel=1e-4)
    assert found != pytest.approx(brute_error(xh, y, 1.01 * W), rel=1e-3)


@pytest.mark.parametrize(("groups", "out"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("sequential", [False, True])
def test_errors_are_the_empirical_ones_at_every_rank(groups, out, sequential):
    x, xh, W, y = stream(groups, out)
    x = xh if sequential else x
    problem = response_problem(W, gathered(x, y), ridge=SMALL)
    errors, full = problem.errors(), min(W.shape[-2:])
    assert len(errors) == full + 1
    for rank in range(1, full + 1):
        left, right = problem.factors(rank, SOLVER)
        assert float(errors[rank]) == pytest.approx(brute_error(x, y, left @ right), rel=1e-3, abs=1e-5)
        assert float(errors[rank - 1]) >= float(errors[rank])
    assert float(errors[1]) != pytest.approx(brute_error(x, y, W), rel=1e-3, abs=1e-5)
    assert float(errors[0]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("groups", "out"), CASES.values(), ids=CASES)
def test_the_factors_are_optimal(groups, out):
    _, xh, W, y = stream(groups, out)
    problem = response_problem(W, gathered(xh, y), ridge=SMALL)
    errors = problem.errors()
    for rank in (1, 3, 5):
        left, right = (t.double() for t in problem.factors(rank, SOLVER))
        for seed in range(30):
            step = 10.0 ** -(seed % 4)
            other = (left + step * randn(*left.shape, seed=seed)) @ (right + step * randn(*right.shape, seed=seed + 99))
            assert brute_error(xh, y, other) >= float(errors[rank]) - 1e-5
        assert (
            brute_error(xh, y, left @ right) < float(errors[rank - 1]) - 1e-4
        )  # the bound of another rank does not hold


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
def test_with_a_ridge_errors_are_an_upper_bound_in_the_dense_network(limit):
    x, _, W, y = stream()
    problem = response_problem(W, gathered(x, y, limit))
    level = RIDGE * float(x.var(1, correction=0).mean()) / float(y.var(1, correction=0).sum())
    for rank in range(1, 9):
        left, right = problem.factors(rank, SOLVER)
        empirical, error = brute_error(x, y, left @ right), float(problem.errors()[rank])
        allowed = level * float((W - left @ right).square().sum())
        assert empirical - 1e-6 <= error <= empirical + allowed + 1e-6


@pytest.mark.parametrize("rows", [300, 8])
@pytest.mark.parametrize("sequential", [False, True])
def test_moments_and_samples_pose_the_same_problem(sequential, rows):
    x, xh, W, y = stream(2, 7, rows=rows)
    x = xh if sequential else x
    a, b = response_problem(W, gathered(x, y)), response_problem(W, gathered(x, y, limit=2))
    assert isinstance(gathered(x, y), Moments)
    assert isinstance(gathered(x, y, limit=2), Samples)
    torch.testing.assert_close(a.target, b.target.double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(a.errors(), b.errors(), rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(a.mean_x, b.mean_x.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.bias(a.target), b.bias(b.target).double(), rtol=1e-3, atol=1e-3)
    left = [(p.factors(3, SOLVER)) for p in (a, b)]
    torch.testing.assert_close(left[0][0] @ left[0][1], (left[1][0] @ left[1][1]).double(), rtol=1e-2, atol=1e-3)


def test_in_the_dense_network_the_target_is_the_weight():
    x, xh, W, y = stream()
    torch.testing.assert_close(response_problem(W, gathered(x, y)).target, W.double(), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(response_problem(W, gathered(xh, y)).target, W.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_responses_are_kept_better_than_by_the_svd_of_the_weight(rank):
    x, _, W, y = stream(2, 8)
    problem = response_problem(W, gathered(x, y))
    left, right = problem.factors(rank, SOLVER)
    plain = Solver(method="svd")(W, rank)
    assert response_error(left @ right, gathered(x, y)) < response_error(plain.left @ plain.right, gathered(x, y))


def test_sequential_regression_beats_the_weight_and_the_dense_factors():
    x, xh, W, y = stream()
    moments = gathered(xh, y)
    problem = response_problem(W, moments)
    assert response_error(problem.target, moments) < 0.5 * response_error(W, moments)
    dense_left, dense_right = response_problem(W, gathered(x, y)).factors(4, SOLVER)
    left, right = problem.factors(4, SOLVER)
    assert response_error(left @ right, moments) < response_error(dense_left @ dense_right, moments)


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
def test_the_bias_makes_the_mean_error_zero(limit):
    _, xh, W, y = stream(2, 6, mean=30.0)
    problem = response_problem(W, gathered(xh, y, limit))
    left, right = problem.factors(2, SOLVER)
    product = left @ right
    missing = y - xh @ product.float().mT
    error = (missing.double() - problem.bias(product)[:, None]).mean(1)
    assert error.abs().max() < 1e-3
    assert missing.mean(1).abs().max() > 0.1


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
@pytest.mark.parametrize("inputs", ["zero", "constant", "some constant", "low rank", "few rows", "one group constant"])
def test_poor_inputs_have_finite_solutions(inputs, limit):
    x, xh, W, _ = stream(2, 6, rows=4 if inputs == "few rows" else 60)
    if inputs in ("zero", "constant"):
        xh = torch.full_like(xh, 0.0 if inputs == "zero" else 1 / 3)
    elif inputs == "some constant":
        xh[..., ::2] = 5.0
    elif inputs == "low rank":
        xh = xh[..., :2] @ randn(2, 12)
    elif inputs == "one group constant":
        xh[1] = 1 / 3
        xh[1, ::5] = torch.nextafter(xh[1, ::5], torch.tensor(1.0))
    problem = response_problem(W, gathered(xh, x @ W.mT, limit))
    errors = problem.errors()
    left, right = problem.factors(3, SOLVER)
    for value in (problem.target, errors, left, right, problem.bias(left @ right)):
        assert torch.isfinite(value).all()
    # Without data the solution is the weight itself, not amplified noise.
    assert problem.target.abs().max() < 20 * W.abs().max()
    if inputs in ("zero", "constant"):
        torch.testing.assert_close(problem.target.double(), W.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_of_the_data_change_nothing(scale):
    _, xh, W, y = stream()
    expected = response_problem(W, gathered(xh, y))
    found = response_problem(W, gathered(scale * xh, scale * y))
    torch.testing.assert_close(found.target, expected.target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.errors(), expected.errors(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_every_precision(dtype):
    x, _, W, _ = stream()
    W = W.to(dtype)
    y = x @ W.float().mT
    found = response_problem(W, gathered(x, y))
    assert found.target.dtype == torch.float64
    torch.testing.assert_close(found.target, W.double(), rtol=1e-4, atol=1e-4)


def test_a_zero_weight_has_no_error():
    x, _, W, _ = stream()
    problem = response_problem(0 * W, gathered(x, 0 * x @ W.mT))
    assert torch.equal(problem.errors(), torch.zeros(9, dtype=torch.float64))
    left, right = problem.factors(2, SOLVER)
    assert response_error(left @ right, gathered(x, 0 * x @ W.mT)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram_matrices_made_indefinite_by_rounding_are_regularized(dtype):
    x = randn(1, 3, 64).to(dtype)
    gram = x.mT @ x
    gram -= 5e-6 * torch.eye(64, dtype=dtype)
    level = torch.full((1, 1), 1e-9, dtype=dtype)
    assert torch.linalg.cholesky_ex(gram + level * torch.eye(64, dtype=dtype)).info.any()
    root, raised = regularized_cholesky(gram, level)
    assert raised > level
    torch.testing.assert_close(root @ root.mT, gram + raised * torch.eye(64, dtype=dtype), rtol=1e-4, atol=1e-4)
    kept = regularized_cholesky(torch.eye(64, dtype=dtype)[None], torch.full((1, 1), 0.1, dtype=dtype))[1]
    assert float(kept) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="positive"):
        regularized_cholesky(-torch.eye(4, dtype=dtype)[None], level)


def test_the_ridge_is_above_zero():
    assert ridge_level(torch.zeros(2, 3), 0.0).min() > 0
    torch.testing.assert_close(ridge_level(torch.tensor([[1.0, 3.0]]), 0.5), torch.tensor([[1.0]]))


@pytest.mark.parametrize("out", [40, EXACT_LIMIT + 6])
def test_leading_vectors_span_what_the_svd_spans(out):
    A = randn(1, out, 5) @ torch.diag(torch.tensor([5.0, 4, 3, 0.1, 0.01])) @ randn(5, 30, seed=1)
    found = leading_left_vectors(A, 3, SOLVER)
    U = torch.linalg.svd(A, full_matrices=False).U[..., :3]
    torch.testing.assert_close(found @ found.mT, U @ U.mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mT @ found, torch.eye(3)[None], rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found @ found.mT, U[..., :2] @ U[..., :2].mT, rtol=1e-3, atol=1e-3)


# -- output sensitivity


def steep(groups, out, seed=5):
    """A sensitivity with very different eigenvalues."""
    turn = torch.linalg.qr(randn(groups, out, out, seed=seed).double()).Q
    return (turn * 10.0 ** -torch.arange(out)) @ turn.mT


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
def test_factors_are_optimal_for_the_sensitivity(limit):
    _, xh, W, y = stream(2, 6)
    sensitivity = steep(2, 6)
    moments = gathered(xh, y, limit)
    plain = response_problem(W, moments)
    problem = response_problem(W, moments, sensitivity=sensitivity)
    torch.testing.assert_close(problem.target, plain.target)
    S = sensitivity_root(sensitivity).mT
    left, right = problem.factors(2, SOLVER)
    # left right = P M with a projection P, so its error is |S (I - P) A|; the best is the tail of S A's spectrum
    P = left.double() @ torch.linalg.lstsq(problem.target.mT.double(), right.mT.double()).solution.mT
    A = problem.whitened.double()
    found = float((S @ (A - P @ A)).square().sum())
    best = float(torch.linalg.svdvals(S @ A)[..., 2:].square().sum())
    assert found == pytest.approx(best, rel=1e-2)
    U = plain.factors(2, SOLVER)[0].double()
    assert float((S @ (A - U @ U.mT @ A)).square().sum()) > 1.2 * best


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_multiple_of_the_identity_changes_nothing(scale):
    _, xh, W, y = stream(2, 6)
    plain = response_problem(W, gathered(xh, y)).factors(3, SOLVER)
    alike = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    same = response_problem(W, gathered(xh, y), sensitivity=scale * alike).factors(3, SOLVER)
    torch.testing.assert_close(same[0] @ same[1], plain[0] @ plain[1])
    other = response_problem(W, gathered(xh, y), sensitivity=scale * steep(2, 6)).factors(3, SOLVER)
    assert not torch.allclose(other[0] @ other[1], plain[0] @ plain[1], rtol=1e-2)


def test_a_sensitivity_of_zeros_is_the_identity():
    S = sensitivity_root(torch.zeros(1, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(S, torch.eye(4, dtype=torch.float64)[None])


def test_the_root_includes_the_floor():
    sensitivity = steep(2, 5)
    S = sensitivity_root(7 * sensitivity)
    mean = sensitivity.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    expected = METRIC_FLOOR * torch.eye(5) + (1 - METRIC_FLOOR) * sensitivity / mean
    torch.testing.assert_close(S @ S.mT, expected)
    assert not torch.allclose(S, expected, rtol=1e-2)


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
def test_weighted_errors_are_those_of_the_factors(limit):
    x = correlated(2, 200, 12)
    W, sensitivity = randn(2, 6, 12, seed=3), steep(2, 6)
    moments = gathered(x, x @ W.mT, limit)
    problem = response_problem(W, moments, ridge=SMALL, sensitivity=sensitivity)
    curve = problem.errors()
    S = sensitivity_root(sensitivity)
    y = (x - x.mean(1, keepdim=True)).double() @ W.double().mT
    for rank in (1, 3, 5):
        left, right = problem.factors(rank, SOLVER)
        lost = y - (x - x.mean(1, keepdim=True)).double() @ (left @ right).double().mT
        expected = float((lost @ S).square().sum() / (y @ S).square().sum())
        assert dense_response_error(W, left @ right, moments, sensitivity) == pytest.approx(expected, rel=1e-3)
        assert float(curve[rank]) == pytest.approx(expected, rel=2e-2, abs=1e-6)
        plain = dense_response_error(W, left @ right, moments)
        assert plain == pytest.approx(response_error(left @ right, moments), rel=1e-3)
        assert plain > 1.2 * expected


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
def test_white_noise_on_the_inputs_makes_the_foreseen_error(limit, weighted):
    x = correlated(2, 200, 12)
    W, sensitivity = randn(2, 6, 12, seed=3), steep(2, 6) if weighted else None
    moments = gathered(x, x @ W.mT, limit)
    S = torch.eye(6).double() if sensitivity is None else sensitivity_root(sensitivity).double()
    noise = torch.randn(2, 60_000, 12, generator=torch.Generator().manual_seed(5)).double()
    response = (x - x.mean(1, keepdim=True)).double() @ W.double().mT @ S
    made = (noise @ W.double().mT @ S).square().mean(1).sum() / response.square().mean(1).sum()
    assert noise_response_error(W, moments, sensitivity) == pytest.approx(float(made), rel=2e-2)
    others = noise_response_error(W * torch.tensor([3.0] + 11 * [1.0]), moments, sensitivity)
    assert others != pytest.approx(float(made), rel=2e-2)


@pytest.mark.parametrize("limit", [10**6, 2], ids=["moments", "samples"])
def test_the_extra_ridge_affects_the_regression_only(limit):
    _, xh, W, y = stream(2, 6)
    moments = gathered(xh, y, limit)
    free, held, most = (response_problem(W, moments, extra_ridge=held) for held in (0.0, 0.5, 1e9))
    away = [float((problem.target - W).norm()) for problem in (free, held, most)]
    assert away[0] > away[1] > 1e3 * away[2]
    # what errors count is no more of the ridge than before: |(T - T') x|^2 plus RIDGE, whatever is held
    x = (xh - xh.mean(1, keepdim=True)).double()
    ridge = ridge_level(x.square().mean(1), RIDGE)
    size = (x @ most.target.mT.double()).square().sum() / x.shape[1] + (
        ridge * most.target.square().sum((1, 2))[:, None]
    ).sum()
    assert float(most.whitened.double().square().sum()) == pytest.approx(float(size), rel=1e-3)
    wrong = response_problem(W, moments, ridge=RIDGE + 0.5)
    assert float(wrong.whitened.double().square().sum()) > 1.05 * float(size)
