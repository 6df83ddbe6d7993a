"""Alternating least squares against torch's convolutions, and step by step."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from graph_passes import forms
from rsi_deploy.calibration.als import two_kernel_problem
from rsi_deploy.calibration.moments import MomentAccumulator, Moments
from rsi_deploy.calibration.reduced_rank_regression import dense_response_error, response_error, response_problem
from rsi_deploy.linalg.solver import Solver

SOLVER = Solver(power_iterations=6)
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# kernel, groups, stride, dilation, padding, first
SHAPES = {
    "1d input": ((3,), 1, (1,), (1,), (1,), 0),
    "1d input strided": ((4,), 2, (3,), (2,), (2,), 0),
    "2d input": ((3, 3), 1, (1, 1), (1, 1), (1, 1), 0),
    "2d input grouped": ((3, 2), 2, (2, 1), (1, 2), (1, 0), 0),
    "2d separable": ((3, 3), 1, (1, 1), (1, 1), (1, 1), 1),
    "2d separable strided": ((2, 3), 2, (2, 3), (2, 1), (1, 2), 1),
    "3d input": ((2, 1, 3), 1, (1, 2, 1), (1, 1, 2), (0, 0, 1), 0),
    "3d input grouped": ((2, 2, 2), 2, (1, 1, 1), (1, 1, 1), (1, 0, 1), 0),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(channels, axes, samples=6, size=7, seed=0):
    """Smooth inputs with correlated neighbours, as a Conv has them."""
    x = randn(samples, channels, *[size] * axes, seed=seed)
    for axis in range(2, 2 + axes):
        x = x + 0.8 * x.roll(1, axis)
    return x


def patches(x, kernel, groups, stride, dilation, padding):
    """`(groups, rows, in * prod(kernel))` by unfolding everything."""
    x = F.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    axes = len(kernel)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))
    order = (1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))
    return x.permute(order).reshape(groups, -1, x.shape[2] * math.prod(kernel))


def moments_of(x, y):
    gathering = MomentAccumulator(x.shape[-1])
    gathering.add(x, y)
    return gathering.result()


def problem_of(shape, *, out=4, into=3, ridge=1e-2, seed=0, compressed=True):
    kernel, groups, stride, dilation, padding, first = shape
    x = images(groups * into, len(kernel), seed=seed)
    xh = x + 0.3 * images(groups * into, len(kernel), seed=seed + 1) if compressed else x
    W = randn(groups, out, into * math.prod(kernel), seed=seed + 2)
    y = patches(x, kernel, groups, stride, dilation, padding) @ W.mT
    moments = moments_of(patches(xh, kernel, groups, stride, dilation, padding), y)
    return two_kernel_problem(W, moments, kernel, first, ridge=ridge), W, moments


def two_convs(x, left, right, shape, out, into):
    """The two nodes of the split, as real convolutions."""
    kernel, groups, stride, dilation, padding, first = shape
    axes, rank = len(kernel), right.shape[1]

    def part(values, inside, outside=1):
        return tuple(v if (axis < first) == inside else outside for axis, v in enumerate(values))

    one = right.reshape(groups * rank, into, *part(kernel, True))
    two = left.reshape(groups, out, *part(kernel, False), rank)
    two = two.movedim(-1, 2).reshape(groups * out, rank, *part(kernel, False))
    conv = CONV[axes]
    inner = conv(x, one, None, part(stride, True), part(padding, True, 0), part(dilation, True), groups)
    return conv(inner, two, None, part(stride, False), part(padding, False, 0), part(dilation, False), groups)


@each_shape
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_product_is_the_convolution_of_both_kernels(shape, rank):
    kernel, groups, stride, dilation, padding, _ = shape
    out, into = 4, 3
    problem, W, _ = problem_of(shape, out=out, into=into)
    left, right = (t.double() for t in problem.factors(rank, SOLVER))
    x = images(groups * into, len(kernel), seed=9).double()
    product = problem.product(left, right)
    assert product.shape == W.shape

    def conv(weight):
        weight = weight.reshape(groups * out, into, *kernel)
        return CONV[len(kernel)](x, weight, None, stride, padding, dilation, groups)

    found = two_convs(x, left, right, shape, out, into)
    torch.testing.assert_close(found, conv(product), rtol=1e-8, atol=1e-8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, conv(product.flip(-1)), rtol=1e-2, atol=1e-2)


@each_shape
def test_the_factors_are_those_of_graph_passes(shape):
    kernel, groups, _, _, _, first = shape
    problem, W, _ = problem_of(shape)
    form = "separable" if first else "input"
    unfolded = torch.from_numpy(forms.unfold(W.reshape(groups, 4, 3, *kernel).numpy(), form).copy())
    torch.testing.assert_close(problem.product(unfolded, torch.eye(unfolded.shape[-1])), W)
    left, right = problem.factors(2, SOLVER)
    assert left.shape == (groups, unfolded.shape[1], 2)
    assert right.shape == (groups, 2, unfolded.shape[2])


def objective(problem, left, right):
    """The objective of each step up to a constant: response error plus ridge."""
    T = torch.einsum("gojr,grm->gojm", left, right)
    return float(torch.einsum("gojm,gjmkn,gokn->", T, problem.xx, T) - 2 * (T * problem.yx).sum())


@each_shape
@pytest.mark.parametrize("rank", [1, 2])
def test_no_step_makes_the_response_error_larger(shape, rank):
    problem, _, moments = problem_of(shape, ridge=1e-9)
    right = problem.start(rank, SOLVER)
    left = problem.left_for(right)
    values, errors = [objective(problem, left, right)], []
    for _ in range(6):
        for count in (1, 5):
            right = problem.right_for(left, right, steps=count)
            values.append(objective(problem, left, right))
        left = problem.left_for(right)
        values.append(objective(problem, left, right))
        errors.append(response_error(problem.product(left.flatten(1, 2), right), moments))
    scale = abs(values[-1]) * 1e-9
    assert all(after <= before + scale for before, after in itertools.pairwise(values))
    assert values[-1] < values[0] - scale
    assert all(after <= before + 1e-7 for before, after in itertools.pairwise(errors))
    assert objective(problem, left, 1.01 * right) > values[-1]


@each_shape
def test_alternating_beats_the_svd_of_the_weight_and_its_own_start(shape):
    kernel, groups, _, _, _, first = shape
    problem, W, moments = problem_of(shape)

    def error(left, right):
        return response_error(problem.product(left, right), moments)

    form = "separable" if first else "input"
    unfolded = torch.from_numpy(forms.unfold(W.reshape(groups, 4, 3, *kernel).numpy(), form).copy())
    best = error(*problem.factors(1, SOLVER, steps=4))
    assert best < error(*Solver(method="svd")(unfolded, 1))
    assert best <= error(*problem.factors(1, SOLVER, steps=1)) + 1e-9


@each_shape
def test_full_rank_is_exact(shape):
    problem, W, moments = problem_of(shape)
    rows, columns = problem.target.shape[-2:]
    left, right = problem.factors(min(rows, columns), SOLVER)
    exact = response_problem(W, moments).target
    torch.testing.assert_close(problem.product(left, right), exact, rtol=1e-6, atol=1e-6)
    left, right = problem.factors(1, SOLVER)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(problem.product(left, right), exact, rtol=1e-2, atol=1e-2)


def test_conjugate_gradients_converge():
    problem, _, _ = problem_of(SHAPES["2d input"])
    right = problem.start(2, SOLVER)
    left = problem.left_for(right)
    found = problem.right_for(left, right, steps=500)
    direct = torch.autograd.functional.jacobian(
        lambda R: torch.einsum("gojr,grm,gjmkn,goks->gsn", left, R, problem.xx, left), torch.zeros_like(right)
    )
    goal = torch.einsum("gojr,gojm->grm", left, problem.yx).flatten()
    exact = torch.linalg.solve(direct.reshape(goal.numel(), -1), goal)
    torch.testing.assert_close(found.flatten(), exact, rtol=1e-6, atol=1e-6)
    again = problem.right_for(left, found, steps=500)
    torch.testing.assert_close(again, found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("inputs", ["zero", "constant", "zero weight", "few rows", "low rank weight", "one channel"])
@pytest.mark.parametrize("first", [0, 1])
def test_poor_data_have_finite_factors(inputs, first):
    kernel = (3, 3)
    x = patches(images(3, 2), kernel, 1, (1, 1), (1, 1), (1, 1))
    W = randn(1, 4, 27)
    if inputs in ("zero", "constant"):
        x = torch.full_like(x, 0.0 if inputs == "zero" else 2 / 3)
    elif inputs == "zero weight":
        W = 0 * W
    elif inputs == "few rows":
        x = x[:, :3]
    elif inputs == "low rank weight":
        W = randn(1, 4, 1) @ randn(1, 1, 27)
    else:
        x = x * (torch.arange(27) < 9)
    moments = moments_of(x, x @ W.mT)
    problem = two_kernel_problem(W, moments, kernel, first)
    for rank in (1, 3):
        left, right = problem.factors(rank, SOLVER)
        assert torch.isfinite(left).all()
        assert torch.isfinite(right).all()
        assert problem.product(left, right).abs().max() <= 50 * W.abs().max()


@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scales_and_precisions(scale, dtype):
    shape = SHAPES["2d separable"]
    _, W, moments = problem_of(shape)
    W = W.to(dtype)
    expected = two_kernel_problem(W, moments, shape[0], 1)
    scaled = Moments(
        rows=moments.rows,
        mass=moments.mass,
        mean_x=moments.mean_x * scale,
        mean_y=moments.mean_y * scale,
        xx=moments.xx * scale**2,
        yx=moments.yx * scale**2,
        yy=moments.yy * scale**2,
    )
    found = two_kernel_problem(W, scaled, shape[0], 1)
    products = [problem.product(*problem.factors(2, SOLVER)) for problem in (found, expected)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=1e-6)


def test_float32_moments_do_as_well():
    shape = SHAPES["2d input"]
    problem, W, moments = problem_of(shape)
    single = {name: getattr(moments, name).float() for name in ("mean_x", "mean_y", "xx", "yx", "yy")}
    other = two_kernel_problem(W, Moments(rows=moments.rows, mass=moments.mass, **single), shape[0], 0)
    a, b = (response_error(p.product(*p.factors(2, SOLVER)), moments) for p in (problem, other))
    assert b == pytest.approx(a, rel=1e-2)


@each_shape
def test_a_sensitivity_reduces_the_weighted_error(shape):
    kernel, groups, _, _, _, first = shape
    plain, W, moments = problem_of(shape)
    turn = torch.linalg.qr(randn(groups, 4, 4, seed=9).double()).Q
    sensitivity = (turn * 30.0 ** -torch.arange(4)) @ turn.mT
    problem = two_kernel_problem(W, moments, kernel, first, sensitivity=sensitivity)

    def cost(problem):
        return dense_response_error(W, problem.product(*problem.factors(1, SOLVER)), moments, sensitivity)

    assert cost(problem) < 0.95 * cost(plain)
    alike = two_kernel_problem(W, moments, kernel, first, sensitivity=5 * torch.eye(4).expand(groups, 4, 4))
    torch.testing.assert_close(
        alike.product(*alike.factors(1, SOLVER)), plain.product(*plain.factors(1, SOLVER)), rtol=1e-6, atol=1e-6
    )


@each_shape
def test_full_rank_with_a_sensitivity_is_exact(shape):
    kernel, groups, _, _, _, first = shape
    _, W, moments = problem_of(shape)
    sensitivity = torch.diag_embed(torch.tensor([1.0, 0.3, 0.1, 0.0])).expand(groups, 4, 4)
    problem = two_kernel_problem(W, moments, kernel, first, sensitivity=sensitivity)
    left, right = problem.factors(min(problem.target.shape[-2:]), SOLVER)
    torch.testing.assert_close(problem.product(left, right), response_problem(W, moments).target, rtol=1e-6, atol=1e-6)
