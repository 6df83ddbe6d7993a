"""A shared right factor against exact SVDs of the stack in float64."""

import pytest
import torch
from joint_weights import related, unrelated

from rsi_deploy.linalg.factor_errors import EXACT_SPECTRUM_LIMIT
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.shared_right import factorize_with_shared_right, largest_cheaper_rank

WIDTH, RANK = 32, 7
SVD = Solver(method="svd")


def alone(weights, rank=RANK, solver=SVD):
    return [
        factorize_site(w, rank, solver, name=name, kind="MatMul")[1] for name, w in zip("qkv", weights, strict=False)
    ]


def error(weight, left, right):
    W = weight.double()
    return float((W - left.double() @ right.double()).norm() / W.norm())


def smallest_rank(weights, records):
    """Oracle: the error of every rank from an exact SVD of the normalized stack, in float64."""
    norms = [w.double().norm() for w in weights]
    U, S, Vh = torch.linalg.svd(torch.cat([w.double() / n for w, n in zip(weights, norms, strict=True)], dim=1))
    for rank in range(1, largest_cheaper_rank(records) + 1):
        parts = (U[..., :rank] * S[..., :rank]).split([w.shape[1] for w in weights], dim=1)
        errors = [error(w / n, p, Vh[:, :rank]) for w, n, p in zip(weights, norms, parts, strict=True)]
        if all(e <= r.frobenius_error for e, r in zip(errors, records, strict=True)):
            return rank
    return None


@pytest.mark.parametrize("outs", [(32, 32, 32), (32, 8, 8), (80, 80), (200, 150)])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_the_smallest_rank_with_no_larger_error(outs, noise):
    width = 160 if 200 in outs else WIDTH
    weights = related(*outs, width=width, noise=noise)
    records = alone(weights)
    rank = smallest_rank(weights, records)
    result = factorize_with_shared_right(weights, records, SVD)
    assert (result is None) == (rank is None)
    if result is None:
        return
    (left, right), joint = result
    assert right.shape == (1, rank, width)
    assert left.numel() + right.numel() < sum(record.params_compressed for record in records)
    for weight, part, before, after in zip(weights, left.split(outs, dim=1), records, joint, strict=True):
        assert error(weight, part, right) <= before.frobenius_error * (1 + 1e-4)
        assert after.frobenius_error == pytest.approx(error(weight, part, right), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("size", [60, EXACT_SPECTRUM_LIMIT + 40])
def test_each_record_has_its_own_error(size):
    weights = related(size, size, width=size, rank=30, noise=0.02)
    (left, right), records = factorize_with_shared_right(weights, alone(weights, 20, Solver()), Solver())
    for weight, part, record in zip(weights, left.split(size, dim=1), records, strict=True):
        s = torch.linalg.svdvals(weight[0].double())
        norm = float(torch.linalg.matrix_norm((weight - part @ right)[0].double(), 2))
        assert record.normalized_error_kind == ("exact" if size <= EXACT_SPECTRUM_LIMIT else "upper bound")
        assert record.spectral_error == pytest.approx(norm / float(s[0]), rel=0.06)
        # power iterations are inexact; for shared factors the bound is useful within a factor of 2
        assert 0.93 * norm <= record.normalized_error * float(s[right.shape[1]]) <= 2 * norm


def test_the_shared_factor_is_counted_once():
    weights = related(32, 16, 24)
    before = alone(weights)
    (left, right), records = factorize_with_shared_right(weights, before, SVD)
    rank = right.shape[1]
    assert [r.params_compressed for r in records] == [rank * (32 + WIDTH), rank * 16, rank * 24]
    assert sum(r.params_compressed for r in records) == left.numel() + right.numel()
    assert sum(r.params_dense for r in records) == 72 * WIDTH
    assert [r.joint for r in records] == [("q", "k", "v")] * 3
    assert [r.reason for r in records] == ["jointly with k, v", "jointly with q, v", "jointly with q, k"]
    assert all(a.seconds >= b.seconds for a, b in zip(records, before, strict=True))


def test_the_largest_cheaper_rank():
    records = alone(related(32, 16, 24), 5)
    cost = sum(5 * (out + WIDTH) for out in (32, 16, 24))
    rank = largest_cheaper_rank(records)
    assert rank * (72 + WIDTH) < cost <= (rank + 1) * (72 + WIDTH)


def test_unrelated_weights_are_split_separately():
    weights = unrelated(32, 32, 32)
    assert factorize_with_shared_right(weights, alone(weights), SVD) is None
    assert (
        factorize_with_shared_right(related(32, 32, 32), alone(weights), SVD) is not None
    )  # the same errors, other weights


def test_a_small_weight_is_not_sacrificed():
    """Without normalization `v` is negligible beside `q` and `k` in the stack."""
    q, k, v = related(32, 32, 32, noise=0.02)
    weights = [q, k, v * 1e-3]
    (_, right), records = factorize_with_shared_right(weights, alone(weights), SVD)
    assert [r.frobenius_error for r in records] == pytest.approx([r.frobenius_error for r in alone(weights)], rel=0.5)
    assert right.shape[1] == smallest_rank(weights, alone(weights))
    other = [q, k, unrelated(32, 32, 32)[2] * 1e-3]
    assert factorize_with_shared_right(other, alone(other), SVD) is None


def test_a_rank_above_the_full_rank_of_one_weight():
    weights = related(64, 4, 4, rank=12)
    before = [
        factorize_site(w, r, SVD, name=n, kind="MatMul")[1] for n, w, r in zip("qkv", weights, (11, 3, 3), strict=True)
    ]
    (_, right), records = factorize_with_shared_right(weights, before, SVD)
    assert right.shape[1] > 4
    assert [r.normalized_error is None for r in records] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype):
    weights = [w.to(dtype) for w in related(32, 32, noise=0.02)]
    before = alone(weights)
    (left, right), records = factorize_with_shared_right(weights, before, SVD)
    assert left.dtype == right.dtype == dtype
    slack = {torch.float64: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]  # rounding of the stored factors
    for weight, part, b, a in zip(weights, left.split(32, dim=1), before, records, strict=True):
        assert a.frobenius_error == pytest.approx(error(weight, part, right), rel=1e-3)
        assert a.frobenius_error <= b.frobenius_error + slack


def test_a_zero_weight_and_extreme_scales():
    zero = [related(32)[0], torch.zeros(1, 32, WIDTH)]
    (left, right), records = factorize_with_shared_right(zero, alone(zero), SVD)
    assert records[1].frobenius_error == 0
    assert torch.isfinite(left).all()
    weights = [w * scale for w, scale in zip(related(32, 32), (1e-12, 1e12), strict=True)]
    (left, right), _ = factorize_with_shared_right(weights, alone(weights, 9), SVD)
    for weight, part in zip(weights, left.split(32, dim=1), strict=True):
        assert error(weight, part, right) < 1e-5  # the weights have rank 9
