"""The hidden units that are kept, and the weight that is refitted to them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graph_passes import Units
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.unit_selection import eliminated, unit_counts, unit_factors, unit_readers

SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def moments(columns: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((200, rank or columns)))
    if rank is not None:
        x = x @ torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((rank, columns)))
    return x.T @ x / len(x)


def error(W: torch.Tensor, near: torch.Tensor, xx: torch.Tensor, G: torch.Tensor | None = None) -> float:
    difference = W - near
    moved = difference @ xx @ difference.T
    return float(moved.trace() if G is None else (moved @ G).trace())


def least_error(W: torch.Tensor, xx: torch.Tensor, places: np.ndarray, G: torch.Tensor | None = None) -> float:
    """The error of the least squares solution on some columns."""
    best = torch.zeros_like(W)
    best[:, places] = torch.linalg.solve(xx[places][:, places], xx[places] @ W.T).T
    return error(W, best, xx, G)


def test_the_weight_is_the_least_squares_solution_on_the_kept_columns():
    W = torch.from_numpy(np.random.default_rng(4).standard_normal((5, 12)))
    xx = moments(12, rank=6) + 0.1 * torch.eye(12)
    for units, near in eliminated(W, xx, 12, [9, 4, 1], ridge=1e-9):
        assert error(W, near, xx) == pytest.approx(least_error(W, xx, units.numpy()), rel=1e-5)
        others = np.setdiff1d(np.arange(12), units.numpy())
        assert not near[:, others].any()
        assert error(W, W * (near != 0), xx) > 1.01 * error(W, near, xx)  # without a refit


@pytest.mark.parametrize("run", [1, 3])
def test_the_units_are_near_the_best_of_all_subsets(run):
    count, kept = 8, 5
    ratios = []
    for seed in range(6):
        W = torch.from_numpy(np.random.default_rng(seed).standard_normal((4, count * run)))
        xx = moments(count * run, seed, rank=count * run // 2 + 3) + 0.01 * torch.eye(count * run)
        ((units, near),) = eliminated(W, xx, count, [kept], ridge=1e-9)
        assert len(units) == kept
        every = [
            least_error(W, xx, (np.array(s)[:, None] * run + np.arange(run)).reshape(-1))
            for s in itertools.combinations(range(count), kept)
        ]
        ratios.append((error(W, near, xx) - min(every)) / (np.median(every) - min(every)))
    assert np.mean(ratios) < 0.25  # 1 is a subset by chance


def test_units_that_repeat_others_cost_nothing_and_go_first():
    W, half = torch.from_numpy(np.random.default_rng(3).standard_normal((6, 8))), moments(4)
    double = torch.cat([torch.eye(4), 2 * torch.eye(4)]).double()  # unit 4 + i is twice unit i
    xx = double @ half @ double.T
    ((units, near),) = eliminated(W, xx, 8, [4], ridge=1e-8)
    assert sorted(int(unit) % 4 for unit in units) == [0, 1, 2, 3]
    assert error(W, near, xx) < 1e-6 * error(W, torch.zeros_like(W), xx)


def test_the_sensitivity_decides_which_units_stay():
    xx, W = torch.eye(2).double(), torch.diag(torch.tensor([1.0, 2.0])).double()
    kept = {}
    for name, weights in (("none", None), ("first", torch.diag(torch.tensor([100.0, 1.0])).double())):
        ((units, _),) = eliminated(W, xx, 2, [1], ridge=1e-9, sensitivity=weights)
        kept[name] = int(units[0])
    assert kept == {"none": 1, "first": 0}


@settings(max_examples=30, **SETTINGS)
@given(out=st.integers(1, 4), count=st.integers(2, 6), run=st.integers(1, 3), points=st.sampled_from([1, 4]))
def test_factors_multiply_to_the_weight(out, count, run, points):
    """`right` selects inputs, and the product of a Conv, folded back, is the refitted weight."""
    columns = count * run * points
    W = torch.from_numpy(np.random.default_rng(columns).standard_normal((out, columns)))
    for units, near in eliminated(W, moments(columns), count, range(count - 1, 0, -1), ridge=1e-6):
        left, right = unit_factors(units, near, count, points)
        assert left.shape == (1, out * points, len(units) * run)
        assert (right.sum(dim=-1) == 1).all()
        assert ((right == 0) | (right == 1)).all()
        product = (left @ right).reshape(out, points, count * run).mT.reshape(out, columns)
        assert torch.equal(product, near)


def test_counts_are_multiples_that_suit_kernels():
    assert unit_counts(1536) == list(range(1440, 0, -96))
    assert all(count % 16 == 0 for count in unit_counts(512))
    assert unit_counts(2) == [1]
    assert all(count % 12 == 0 for count in unit_counts(300, multiple=12))
    assert max(len(unit_counts(count)) for count in range(2, 3000, 7)) <= 16


def site(name: str, *makers: str, count: int = 8) -> CalibratedSite:
    units = Units(count=count, run=1, makers=makers, nodes=makers, numbers=4, beside=0) if makers else None
    load = lambda: torch.zeros(1, 4, count)  # noqa: E731
    return CalibratedSite(
        name=name, kind="MatMul", groups=1, out_features=4, in_features=count, forms=("matmul",), load=load, units=units
    )


def test_every_site_is_in_one_pair_and_large_pairs_come_first():
    chain = [site("a"), site("b", "a"), site("c", "b", count=99), site("d", "c")]
    assert unit_readers(chain) == {"c": ("b",)}
    assert unit_readers([*chain[:2], site("e", "x")]) == {"b": ("a",)}  # x is no site
    assert unit_readers([site("g"), site("u"), site("d", "g", "u")]) == {"d": ("g", "u")}
