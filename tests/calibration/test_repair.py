"""A low-rank repair of a rounded weight: the response that rounding lost, in few bytes."""

import pytest
import torch

from rsi_deploy.calibration.repair import Repair, repair_bytes, repair_ranks, repairs
from rsi_deploy.calibration.rounding import rounded, rounded_weight
from rsi_deploy.linalg.solver import Solver

ROWS, COLUMNS = 48, 64


@pytest.fixture
def case():
    """A weight, its rounded numbers, and second moments that decay."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    x = torch.randn(500, COLUMNS, generator=generator) * 0.9 ** torch.arange(COLUMNS)
    x = x @ torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=generator)).Q
    return weight, rounded(weight, bits=3).weight(), (x.mT @ x / len(x)).double()


def lost(weight, other, second):
    difference = weight.double() - other.double()
    return float(((difference @ second) * difference).sum())


def test_a_larger_repair_loses_less(case):
    weight, near, second = case
    made = repairs(weight, near, second, [2, 4, 8, 16], Solver())
    assert [repair.rank for repair in made] == [2, 4, 8, 16]
    errors = [lost(weight, near + repair.product(), second) for repair in made]
    assert lost(weight, near, second) > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.4 * lost(weight, near, second)


@pytest.mark.parametrize("rank", [3, 12])
def test_the_repair_is_the_best_of_its_rank_up_to_its_own_rounding(case, rank):
    weight, near, second = case
    (made,) = repairs(weight, near, second, [rank], Solver())
    root = torch.linalg.cholesky(second + 1e-9 * torch.eye(COLUMNS))
    values = torch.linalg.svdvals((weight.double() - near.double()) @ root)
    least = float(values[rank:].square().sum())
    found = lost(weight, near + made.product(), second)
    assert least <= found <= 1.06 * least
    plain = (weight - near).double()
    U, s, V = torch.linalg.svd(plain, full_matrices=False)  # blind to the inputs
    assert lost(weight, near + (U[:, :rank] * s[:rank]) @ V[:rank], second) > 1.1 * found


def test_ranks_and_bytes():
    ranks = repair_ranks(384, 384)
    assert ranks == sorted(ranks)
    assert all(repair_bytes(rank, 384, 384) < 0.2 * 384 * 384 / 2 for rank in ranks)
    assert repair_ranks(8, 8) == []
    assert repairs(torch.ones(8, 8), torch.ones(8, 8), torch.eye(8), [], Solver()) == []
    assert repair_bytes(2, 10, 20) == 2 * 30 + 4 * 12


def test_the_product_is_that_of_the_stored_factors():
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(1, 10, 3, generator=generator), torch.randn(1, 3, 20, generator=generator)
    factors = [rounded_weight(factor, None, is_product=True, bits=8) for factor in (left, right)]
    made = Repair(left=factors[0], right=factors[1])
    assert torch.allclose(made.product(), (left @ right)[0], atol=0.1)
    assert not torch.equal(made.product(), (left @ right)[0])
