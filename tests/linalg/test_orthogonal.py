import math

import pytest
import torch
from spectra import normal, values, weight_with

from rsi_deploy.linalg import orthogonal
from rsi_deploy.linalg.orthogonal import (
    INDEPENDENT,
    inverse,
    inverse_in_batches,
    near_basis_,
    orthonormal_,
    rough_basis_,
)

BLOCKS = {
    "random": lambda: normal(90, 20),
    "square": lambda: normal(30, 30),
    "one column": lambda: normal(50, 1),
    "graded": lambda: normal(90, 20) * 10.0 ** -torch.arange(20),
    "graded past squares": lambda: normal(90, 20) * 10.0 ** (-1.5 * torch.arange(20)),
    "condition 1e3": lambda: weight_with(torch.logspace(0, -3, 20, dtype=torch.float64), 90, 20).float(),
    "condition 1e6": lambda: weight_with(torch.logspace(0, -6, 20, dtype=torch.float64), 90, 20).float(),
    "rank 7": lambda: normal(90, 7) @ normal(7, 20, seed=1),
    "equal columns": lambda: normal(90, 1).expand(90, 20).clone(),
    "a zero column": lambda: normal(90, 20) * (torch.arange(20) != 4),
    "zero": lambda: torch.zeros(90, 20),
    "tiny": lambda: normal(90, 20) * 1e-25,
}


def off(Q):
    """`max |Q^T Q - I|`."""
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=torch.float64)).abs().max())


def missed(Q, X):
    """How far `X`, columns scaled, is from the span of `Q`: the sine of the largest angle."""
    X = X.double() / X.double().norm(dim=-2, keepdim=True).clamp_min(1e-300)
    Q = torch.linalg.qr(Q.double()).Q
    return float(torch.linalg.matrix_norm(X - Q @ (Q.mT @ X), 2))


@pytest.mark.parametrize("name", BLOCKS)
def test_an_orthonormal_basis_of_the_span_whatever_the_block(name):
    X = BLOCKS[name]()
    Q = orthonormal_(X.clone())
    assert Q.shape == X.shape
    assert off(Q) < 1e-5
    assert missed(Q, X) < 1e-4
    assert missed(Q, X + 0.1 * normal(*X.shape, seed=9) * X.norm(dim=0).clamp_min(1)) > 1e-3 or X.shape[0] == X.shape[1]


@pytest.mark.parametrize("name", BLOCKS)
def test_in_float64_to_its_rounding(name):
    X = BLOCKS[name]().double()
    Q = orthonormal_(X.clone())
    assert off(Q) < 1e-13
    assert missed(Q, X) < 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_near_to_a_percent(name):
    X = BLOCKS[name]()
    Q = near_basis_(X.clone())
    assert off(Q) < 0.02
    assert missed(Q, X) < 1e-4


def test_each_of_a_batch_has_the_bytes_it_has_alone():
    batch = torch.stack([BLOCKS[name]() for name in ("random", "condition 1e6", "rank 7", "zero", "graded", "tiny")])
    together = orthonormal_(batch.clone())
    assert off(together) < 1e-5
    for index in range(len(batch)):
        assert torch.equal(together[index], orthonormal_(batch[index : index + 1].clone())[0])
        assert torch.equal(together[index:], orthonormal_(batch[index:].clone()))
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "square"])
def test_rough_bases_are_well_conditioned_and_say_what_they_resolved(name):
    X = BLOCKS[name]().bfloat16()
    Q, least = rough_basis_(X.clone())
    assert Q.dtype == torch.bfloat16
    assert torch.isfinite(Q).all()
    assert (least > INDEPENDENT) == (name in ("random", "one column", "graded")), least
    if name in ("random", "graded", "condition 1e3"):
        assert float(torch.linalg.cond(Q.double())) < 30
        scaled = X / X.norm(dim=0)
        assert missed(Q, scaled @ torch.linalg.svd(scaled.float()).Vh[:5].mT.bfloat16()) < 0.05


@pytest.mark.parametrize("invert", [inverse, inverse_in_batches])
@pytest.mark.parametrize("k", [1, 2, 127, 128, 129, 300, 512])
def test_the_inverse_of_a_triangle(k, invert):
    R = torch.triu(normal(k, k, dtype=torch.float64)) / k + 2 * torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(invert(R) @ R, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(invert(R), torch.triu(invert(R)))


@pytest.mark.parametrize("condition", [60.0, 300.0, 3e4])
def test_a_second_pass_with_and_without_a_factor(condition, monkeypatch):
    """One pass leaves such a block off by 1e-5 and more, and both kinds of second pass take it away."""
    # Columns of one norm, which no scaling mends.
    X = weight_with(torch.logspace(0, -math.log10(condition), 60, dtype=torch.float64), 400, 60).float()
    X /= X.norm(dim=0)
    assert off(orthonormal_(X.clone())) < 3e-6
    monkeypatch.setattr(orthogonal, "NEARLY", 0.0)
    assert off(orthonormal_(X.clone())) < 3e-6
    monkeypatch.setattr(orthogonal, "NEARLY", math.inf)
    monkeypatch.setattr(orthogonal, "_one_pass", lambda X: (X, math.inf))
    assert off(orthonormal_(X.clone())) > 1e-3  # far from orthonormal, a series alone is none


def test_spectra_of_the_helper():
    singular = values("fast", 30)
    torch.testing.assert_close(torch.linalg.svdvals(weight_with(singular, 40, 30)), singular, rtol=1e-9, atol=1e-12)
