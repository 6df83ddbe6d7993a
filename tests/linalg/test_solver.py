import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.linalg.solver import (
    Factors,
    Solver,
    balanced,
    exact_svd,
    normalized_error,
    residual_norm,
    rounding_level,
    rsi,
    rsvd,
    singular_values,
    stream_seed,
)

SHAPES = [(40, 40), (24, 60), (60, 24), (3, 17, 31), (2, 3, 12, 9)]
SPECTRA = {
    "slow": torch.arange(1, 81, dtype=torch.float64) ** -0.4,
    "medium": torch.arange(1, 81, dtype=torch.float64) ** -1.0,
    "fast": 0.9 ** torch.arange(80, dtype=torch.float64),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def with_spectrum(values, out_features, in_features, seed=0):
    """A float64 matrix `(out, in)` with these singular values."""
    values = values[: min(out_features, in_features)]
    left = torch.linalg.qr(normal(out_features, len(values), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(normal(in_features, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return left * values @ right.T


def product(factors):
    return factors.left.double() @ factors.right.double()


def distance(weight, factors):
    """`||W - left right||_F / ||W||_F`, in float64."""
    return float((weight.double() - product(factors)).norm() / weight.double().norm())


# -- what comes back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
def test_shapes_dtypes_and_layout(method, dtype, shape):
    weight = normal(*shape, dtype=dtype)
    before = weight.clone()
    left, right = Solver(method=method)(weight, 5, site="a")
    assert left.shape == (*shape[:-1], 5)
    assert right.shape == (*shape[:-2], 5, shape[-1])
    assert left.dtype == right.dtype == dtype
    assert torch.equal(weight, before)


@pytest.mark.parametrize("oversampling", [0, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_left_is_orthonormal_for_32_and_64_bits(dtype, tolerance, oversampling):
    left, right = rsi(normal(3, 30, 50, dtype=dtype), 7, oversampling=oversampling)
    identity = torch.eye(7, dtype=dtype).expand(3, 7, 7)
    torch.testing.assert_close(left.mT @ left, identity, rtol=0, atol=tolerance)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(right @ right.mT, identity, rtol=0, atol=tolerance)


def test_right_is_the_projection_of_the_weight():
    weight = normal(30, 50, dtype=torch.float64)
    left, right = rsi(weight, 7)
    torch.testing.assert_close(right, left.T @ weight, rtol=0, atol=1e-12)


def test_a_batch_is_its_matrices_one_by_one():
    """Not the same sketch, so exactly low-rank: the product is then the weight itself, whatever the sketch."""
    weight = normal(3, 20, 4, dtype=torch.float64) @ normal(3, 4, 30, seed=1, dtype=torch.float64)
    whole = product(rsi(weight, 4))
    for index in range(3):
        torch.testing.assert_close(whole[index], product(rsi(weight[index], 4)), rtol=0, atol=1e-10)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(whole[index], product(rsi(weight[index - 1], 4)), rtol=0, atol=1e-10)


def test_a_weight_that_requires_grad_or_is_a_view_will_do():
    weight = torch.nn.Parameter(normal(20, 30))
    left, _ = rsi(weight, 4)
    assert not left.requires_grad
    view = normal(30, 20).T
    assert distance(view, exact_svd(view, 20)) < 1e-6


# -- how near it comes: the oracle is the exact SVD


@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 40),
    rank=st.integers(1, 40),
    q=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_weight_of_exactly_that_rank_is_recovered(out_features, in_features, rank, q, seed):
    rank = min(rank, out_features, in_features)
    weight = normal(out_features, rank, seed=seed) @ normal(rank, in_features, seed=seed + 1)
    assert distance(weight, rsi(weight, rank, power_iterations=q, seed=seed)) < 1e-3


@given(
    out_features=st.integers(2, 30), in_features=st.integers(2, 30), rank=st.integers(1, 30), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_nothing_beats_the_optimum_and_nothing_exceeds_the_weight(out_features, in_features, rank, seed):
    rank = min(rank, out_features, in_features)
    weight = normal(out_features, in_features, seed=seed, dtype=torch.float64)
    s = torch.linalg.svdvals(weight)
    tail = float(s[rank:].norm())
    error = float((weight - product(rsi(weight, rank, seed=seed))).norm())
    assert tail * (1 - 1e-9) - 1e-9 <= error <= float(s.norm()) * (1 + 1e-9)


@pytest.mark.parametrize("rank", [1, 6, 19, 20])
@pytest.mark.parametrize("shape", [(20, 33), (33, 20)])
def test_exact_svd_is_optimal_in_both_norms(shape, rank):
    weight = normal(*shape, dtype=torch.float64)
    s = torch.linalg.svdvals(weight)
    residual = weight - product(exact_svd(weight, rank))
    spectral = float(s[rank]) if rank < 20 else 0.0
    assert float(torch.linalg.matrix_norm(residual, 2)) == pytest.approx(spectral, rel=1e-10, abs=1e-12)
    assert float(residual.norm()) == pytest.approx(float(s[rank:].norm()), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_falls_with_q_towards_the_optimum(spectrum):
    weight = with_spectrum(SPECTRA[spectrum], 80, 120)
    means = [
        np.mean([normalized_error(weight, rsi(weight, 16, power_iterations=q, seed=seed)) for seed in range(6)])
        for q in (1, 2, 4, 8, 32)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(means)), means
    assert 1 <= means[-1] < 1.02


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(80, 120), (120, 80)])
def test_four_iterations_are_near_optimal_and_rsvd_is_not(shape, spectrum):
    weight = with_spectrum(SPECTRA[spectrum], *shape).float()
    four = [normalized_error(weight, rsi(weight, 16, power_iterations=4, seed=seed)) for seed in range(4)]
    one = [normalized_error(weight, rsvd(weight, 16, seed=seed)) for seed in range(4)]
    assert max(four) < 1.25
    assert min(one) > 1.35


def test_one_iteration_is_rsvd():
    weight = normal(30, 40)
    for other in (rsvd(weight, 6, seed=3, site="a"), Solver(method="rsvd", seed=3)(weight, 6, site="a")):
        assert torch.equal(product(rsi(weight, 6, power_iterations=1, seed=3, site="a")), product(other))
    assert not torch.equal(product(rsi(weight, 6, power_iterations=2, seed=3, site="a")), product(other))


def test_the_transpose_has_the_same_error():
    """The paper's iteration is not symmetric in W and W^T, its quality is."""
    weight = with_spectrum(SPECTRA["medium"], 40, 80)
    straight, turned = (
        np.mean([normalized_error(w, rsi(w, 10, seed=seed)) for seed in range(12)]) for w in (weight, weight.T)
    )
    assert straight == pytest.approx(turned, rel=0.1)
    exact = product(exact_svd(weight, 10))
    torch.testing.assert_close(product(exact_svd(weight.T, 10)), exact.T, rtol=0, atol=1e-12)


def test_oversampling_helps_and_is_cut_away():
    weight = with_spectrum(SPECTRA["slow"], 60, 80)
    means = []
    for oversampling in (0, 5, 20):
        factors = [rsi(weight, 8, power_iterations=2, oversampling=oversampling, seed=seed) for seed in range(8)]
        assert all(f.left.shape == (60, 8) and f.right.shape == (8, 80) for f in factors)
        means.append(np.mean([normalized_error(weight, f) for f in factors]))
    assert means[0] > means[1] > means[2] >= 1
    capped = rsi(weight, 8, oversampling=10_000)  # a sketch of full rank: the exact SVD
    torch.testing.assert_close(product(capped), product(exact_svd(weight, 8)), rtol=0, atol=1e-9)


# -- edges


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (25, 25), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
def test_full_rank_reproduces_the_weight(method, shape):
    weight = normal(*shape, dtype=torch.float64)
    assert distance(weight, Solver(method=method)(weight, min(shape))) < 1e-12


@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_weight_has_zero_factors_and_no_nan(method, dtype):
    weight = torch.zeros(12, 9, dtype=dtype)
    factors = Solver(method=method)(weight, 4)
    assert torch.equal(factors.left @ factors.right, weight)
    assert normalized_error(weight, factors) == 1.0
    assert float(residual_norm(weight, factors).norm) == 0.0


def test_a_rank_above_the_weights_own_still_reproduces_it():
    weight = normal(30, 3) @ normal(3, 40, seed=1)
    factors = rsi(weight, 10)
    assert distance(weight, factors) < 1e-5
    assert normalized_error(weight, factors) == 1.0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30])
def test_the_scale_of_the_weight_does_not_matter(scale):
    """The iteration multiplies by W W^T, so a naive one leaves the floats at 1e+-19."""
    weight = with_spectrum(SPECTRA["fast"], 40, 60).float()
    expected = distance(weight, rsi(weight, 12))
    assert distance(weight * scale, rsi(weight * scale, 12)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 2e4])
def test_float16_factors_are_balanced(scale):
    weight = (with_spectrum(SPECTRA["fast"], 40, 60) * scale).half()
    left, right = rsi(weight, 12)
    assert torch.isfinite(left).all()
    assert torch.isfinite(right).all()
    torch.testing.assert_close(left.float().norm(dim=0), right.float().norm(dim=1), rtol=2e-2, atol=0)
    optimum = distance(weight, exact_svd(weight.double(), 12))
    assert distance(weight, Factors(left, right)) < 1.05 * optimum + 2e-3


def test_a_large_float16_weight_needs_the_balance():
    """The control: orthonormal `left` beside the whole scale in `right` overflows float16."""
    weight = torch.full((64, 64), 3e4, dtype=torch.float16)
    assert distance(weight, rsi(weight, 1)) < 2e-3
    _left, right = rsi(weight.float(), 1)
    assert not torch.isfinite(right.half()).all()


def test_balanced_keeps_the_product():
    left, right = normal(3, 10, 4, dtype=torch.float64), 1e4 * normal(3, 4, 12, seed=1, dtype=torch.float64)
    right[:, 2] = 0
    even = balanced(left, right)
    torch.testing.assert_close(even.left @ even.right, left @ right, rtol=1e-12, atol=1e-9)
    assert float((even.left.norm(dim=-2) - even.right.norm(dim=-1))[:, [0, 1, 3]].abs().max()) < 1e-9


# -- the random stream


def test_seed_and_site_determine_the_bits_and_the_global_seed_does_not():
    weight = normal(30, 40)
    torch.manual_seed(1)
    first = rsi(weight, 6, seed=5, site="layer.3")
    state = torch.manual_seed(2).get_state()
    rsi(normal(9, 9), 3, seed=5, site="layer.2")
    second = rsi(weight, 6, seed=5, site="layer.3")
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.right, second.right)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("other", [{"seed": 6, "site": "layer.3"}, {"seed": 5, "site": "layer.4"}, {"seed": 5}])
def test_another_seed_or_site_gives_other_factors(other):
    weight = normal(30, 40)
    assert not torch.equal(rsi(weight, 6, seed=5, site="layer.3").left, rsi(weight, 6, **other).left)


def test_streams_do_not_collide():
    seeds = {stream_seed(seed, site) for seed in range(-3, 50) for site in ("", "a", "b", "1", "\0")}
    assert len(seeds) == 53 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)


# -- measuring errors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values(shape):
    weight = normal(*shape)
    s = singular_values(weight)
    assert s.dtype == torch.float64
    torch.testing.assert_close(s, torch.linalg.svdvals(weight.double()), rtol=1e-10, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(s.flip(-1), torch.linalg.svdvals(weight.double()), rtol=1e-10, atol=1e-7)


def test_normalized_error_of_the_optimum_is_one():
    weight = with_spectrum(SPECTRA["medium"], 40, 60)
    for rank in (1, 10, 39, 40):
        assert normalized_error(weight, exact_svd(weight, rank)) == pytest.approx(1.0, rel=1e-9)


def test_normalized_error_of_worse_factors():
    weight = with_spectrum(SPECTRA["medium"], 40, 60)
    s = torch.linalg.svdvals(weight)
    left, right = exact_svd(weight, 10)
    assert normalized_error(weight, Factors(left * 2, right)) == pytest.approx(float(s[0] / s[10]), rel=1e-9)
    keep = torch.arange(10) != 4  # without the fifth direction, at a rank of nine
    assert normalized_error(weight, Factors(left[:, keep], right[keep])) == pytest.approx(float(s[4] / s[9]), rel=1e-9)
    assert normalized_error(weight, Factors(-left, right)) > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_is_not_called_optimal_for_its_type(dtype):
    """Nearly all of the spectrum of a 16-bit weight lies below 20 of its roundings."""
    values = torch.full((40,), 3 * torch.finfo(dtype).eps, dtype=torch.float64)
    values[:8] = 1
    weight = with_spectrum(values, 40, 40).to(dtype)
    left, right = exact_svd(weight, 8)
    assert normalized_error(weight, Factors(left, right)) < 1.5
    left[:, 0] *= 1 + 10 * torch.finfo(dtype).eps
    assert normalized_error(weight, Factors(left, right)) > 2
    assert rounding_level(dtype) == torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
def test_residual_norm_is_a_close_lower_bound(method, spectrum, dtype):
    weight = torch.stack([with_spectrum(SPECTRA[spectrum], 70, 90, seed=seed) for seed in (0, 5)]).to(dtype)
    factors = Solver(method=method)(weight, 12)
    truth = torch.linalg.matrix_norm(weight.double() - product(factors), 2)
    found = residual_norm(weight, factors)
    assert found.norm.shape == (2,)
    assert found.norm.dtype == dtype
    assert (found.norm.double() <= truth * (1 + 1e-5)).all()
    assert (found.norm.double() >= truth * 0.9).all()
    torch.testing.assert_close(found.u.norm(dim=-1), torch.ones(2, dtype=dtype), rtol=1e-5, atol=0)
    reached = ((weight.double() - product(factors)).mT @ found.u.double()[..., None]).norm(dim=(-2, -1))
    torch.testing.assert_close(reached, found.norm.double(), rtol=1e-2, atol=0)


def test_residual_norm_of_tiny_matrices_is_exact():
    for shape in ((1, 1), (1, 7), (7, 1), (3, 3)):
        weight = normal(*shape, dtype=torch.float64)
        nothing = Factors(torch.zeros(shape[0], 1, dtype=torch.float64), torch.zeros(1, shape[1], dtype=torch.float64))
        truth = float(torch.linalg.matrix_norm(weight, 2))
        assert float(residual_norm(weight, nothing).norm) == pytest.approx(truth, rel=1e-6)


# -- refusals


@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
@pytest.mark.parametrize("rank", [0, -1])
def test_ranks_out_of_range(method, rank):
    with pytest.raises(ValueError, match=rf"site 'conv\.1': rank must be between 1 and .* = 12, but got {rank}"):
        Solver(method=method)(normal(12, 20), rank, site="conv.1")


@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
@pytest.mark.parametrize("rank", [13, 10**9])
def test_a_rank_above_full_gives_exact_factors_with_a_note(method, rank):
    weight = normal(12, 20, dtype=torch.float64)
    solution = Solver(method=method).solve(weight, rank, site="conv.1")
    assert solution.factors.left.shape == (12, 12)
    assert distance(weight, solution.factors) < 1e-12
    assert solution.note == f"rank {rank} is above full rank: exact factors of rank 12"
    assert Solver(method=method).solve(weight, 12).note == ""


@pytest.mark.parametrize("method", ["rsi", "svd"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(method, value):
    weight = normal(12, 20)
    weight[3, 4] = weight[5, 6] = value
    with pytest.raises(ValueError, match=r"site 'fc': the weight has 2 NaN or infinite values of 240"):
        Solver(method=method)(weight, 4, site="fc")


def test_a_finite_weight_whose_sum_overflows_is_not_refused():
    weight = torch.full((200, 200), 1e34)
    assert not torch.isfinite(weight.sum())
    assert distance(weight, rsi(weight, 1)) < 1e-5


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.int64), r"real and floating, but got torch.int64 \(4, 4\); pass weight.float"),
        (torch.zeros(4, 4, dtype=torch.complex64), "real and floating, but got torch.complex64 .*; split it into real"),
        (torch.zeros(4), r"a matrix \(..., out, in\), but got torch.float32 \(4,\)"),
        (torch.zeros(4, 0), r"no empty dimension, but got torch.float32 \(4, 0\); exclude it"),
        (torch.zeros(0, 3, 4), r"no empty dimension, but got torch.float32 \(0, 3, 4\)"),
    ],
    ids=["integer", "complex", "vector", "empty", "empty batch"],
)
@pytest.mark.parametrize("method", ["rsi", "rsvd", "svd"])
def test_weights_that_cannot_be_factorized(method, weight, message):
    with pytest.raises(ValueError, match=f"site 'fc': a weight must (be|have) {message}"):
        Solver(method=method).solve(weight, 1, site="fc")


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="power_iterations must be at least 1"):
        rsi(normal(5, 5), 2, power_iterations=0)
    with pytest.raises(ValueError, match="oversampling must not be negative"):
        rsi(normal(5, 5), 2, oversampling=-1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cuda_is_as_near_as_the_cpu_and_the_same_each_time(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weight = with_spectrum(SPECTRA["medium"], 80, 120).to(dtype)
    here, there = rsi(weight, 16, seed=1), rsi(weight.cuda(), 16, seed=1)
    assert there.left.is_cuda
    assert there.left.dtype == dtype
    near, plain = (normalized_error(weight, Factors(*(f.cpu() for f in factors))) for factors in (there, here))
    assert near < 1.02 * plain
    again, other = rsi(weight.cuda(), 16, seed=1), rsi(weight.cuda(), 16, power_iterations=1, seed=2)
    assert all(torch.equal(one, two) for one, two in zip(there, again, strict=True))
    assert not torch.equal(there.left, other.left)
