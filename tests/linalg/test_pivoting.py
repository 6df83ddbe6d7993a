"""Pivoted factors: the same product, rows of the identity at the pivots, and bounded entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsi_deploy.linalg.pivoting import BOUND, RUN_BOUND, pivoted


def drawn(groups, rows, rank, columns, seed=0, decay=1.0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(groups, rows, rank, generator=generator, dtype=torch.float64) * decay ** torch.arange(rank)
    return left, torch.randn(groups, rank, columns, generator=generator, dtype=torch.float64)


def distance(left, right, made):
    product = left @ right
    return float((made.left @ made.right - product).norm() / product.norm().clamp_min(1e-300))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 30),
    groups=st.integers(1, 3),
    seed=st.integers(0, 5),
    decay=st.sampled_from([1.0, 0.5]),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_the_product_stays_and_no_entry_is_large(rows, columns, groups, seed, decay, data):
    rank = data.draw(st.integers(1, rows))
    left, right = drawn(groups, rows, rank, columns, seed, decay)
    made = pivoted(left, right)
    assert distance(left, right, made) < 1e-9
    assert made.left.abs().max() <= max(BOUND, 1) + 1e-9
    for own, pivots in zip(made.left, made.pivots, strict=True):
        assert torch.equal(own[pivots], torch.eye(rank, dtype=torch.float64))
        assert len(set(pivots.tolist())) == rank


@pytest.mark.parametrize("at", ["first", "last", "neither"])
def test_pivots_in_a_run_where_their_rows_allow_it(at):
    left, right = drawn(1, 30, 8, 5)
    bad = {"first": [], "last": range(8), "neither": [0, 29]}[at]
    for row in bad:  # a row of zeros among the pivots makes them singular
        left[0, row] = 0
    made = pivoted(left, right, run_bound=RUN_BOUND)
    runs = {"first": list(range(8)), "last": list(range(22, 30))}
    assert distance(left, right, made) < 1e-9
    if at == "first":
        assert made.pivots[0].tolist() in runs.values()
    elif at == "last":
        assert made.pivots[0].tolist() == runs["last"]
    else:
        assert made.pivots[0].tolist() not in runs.values()
    assert made.left.abs().max() <= (RUN_BOUND if at != "neither" else BOUND) + 1e-9


def test_a_run_is_refused_above_its_bound_and_for_groups():
    left, right = drawn(1, 30, 8, 5)
    left[0, 0] = left[0, 1] * (1 + 1e-6)
    left[0, -1] = left[0, -2] * (1 + 1e-6)
    made = pivoted(left, right, run_bound=RUN_BOUND)
    assert made.left.abs().max() <= BOUND + 1e-9
    two, others = drawn(2, 30, 8, 5)
    assert pivoted(two, others, run_bound=1e9).left.abs().max() <= BOUND + 1e-9


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_of_lower_rank(rank):
    left = torch.zeros(1, 8, rank)
    made = pivoted(left, torch.ones(1, rank, 4))
    assert torch.isfinite(made.left).all()
    assert not (made.left @ made.right).any()
    left, right = torch.randn(1, 8, 1) @ torch.ones(1, 1, rank), torch.randn(1, rank, 4)
    assert distance(left, right, pivoted(left, right)) < 1e-5


def test_the_dtype_stays_and_a_wrong_pivot_shows():
    left, right = (t.float() for t in drawn(1, 12, 5, 7))
    made = pivoted(left, right)
    assert made.left.dtype == made.right.dtype == torch.float32
    assert distance(left, right, made) < 1e-5
    assert distance(left, right, made._replace(right=made.right.flip(1))) > 0.1


def test_the_identity_is_a_run_at_both_ends():
    eye = torch.eye(6, dtype=torch.float64)[None]
    made = pivoted(eye, torch.randn(1, 6, 4, dtype=torch.float64), run_bound=RUN_BOUND)
    assert torch.equal(made.left, eye)
