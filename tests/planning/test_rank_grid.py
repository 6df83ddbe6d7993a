import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rsi_deploy.core.sites import break_even_rank
from rsi_deploy.planning.rank_grid import rank_grid

FULL, BREAK_EVEN = st.integers(1, 600), st.floats(0.1, 700)
MIN_RANK, MULTIPLE, POINTS = st.integers(1, 40), st.integers(1, 20), st.integers(1, 50)


def every_rank(full_rank, break_even, min_rank, multiple):
    return tuple(r for r in range(1, full_rank + 1) if min_rank <= r < break_even and r % multiple == 0)


@given(FULL, BREAK_EVEN, MIN_RANK, MULTIPLE)
def test_the_full_grid_has_every_rank_below_break_even(full_rank, break_even, min_rank, multiple):
    grid = rank_grid(full_rank, break_even, min_rank=min_rank, multiple=multiple)
    assert grid == every_rank(full_rank, break_even, min_rank, multiple)


@pytest.mark.parametrize(
    ("full_rank", "break_even", "options", "grid"),
    [
        (64, 5.0, {}, (1, 2, 3, 4)),  # at the break-even rank nothing is saved
        (64, 5.0000001, {}, (1, 2, 3, 4, 5)),
        (4, 100.0, {}, (1, 2, 3, 4)),
        (4, math.inf, {}, (1, 2, 3, 4)),
        (64, 1.0, {}, ()),
        (64, 0.5, {}, ()),
        (64, 8.0, {"multiple": 8}, ()),
        (64, 8.5, {"multiple": 8}, (8,)),
        (7, 30.0, {"multiple": 8}, ()),
        (64, 32.0, {"multiple": 8, "min_rank": 9}, (16, 24)),
        (64, 32.0, {"min_rank": 32}, ()),
        (64, 32.0, {"min_rank": 31}, (31,)),
    ],
)
def test_edges(full_rank, break_even, options, grid):
    assert rank_grid(full_rank, break_even, **options) == grid


@given(FULL, BREAK_EVEN, MIN_RANK, MULTIPLE, POINTS)
def test_a_grid_with_a_number_of_points(full_rank, break_even, min_rank, multiple, points):
    whole = every_rank(full_rank, break_even, min_rank, multiple)
    grid = rank_grid(full_rank, break_even, min_rank=min_rank, multiple=multiple, points=points)
    assert len(grid) == min(points, len(whole))
    assert set(grid) <= set(whole)
    assert list(grid) == sorted(set(grid))
    if grid:
        assert grid[-1] == whole[-1]
    if points > 1:
        assert grid[:1] == whole[:1]


def is_geometric(grid, *, multiple=1):
    """Whether all ratios of neighbours are equal up to rounding."""
    ratio = (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
    steps = itertools.pairwise(grid)
    return all(b - a == multiple or abs(b - a * ratio) <= 0.15 * b + multiple for a, b in steps)


@given(st.integers(2, 40), st.integers(1, 8))
def test_points_are_spaced_geometrically(points, multiple):
    assume(points < 600 // multiple)
    grid = rank_grid(600, 601.0, multiple=multiple, points=points)
    # The first points may be consecutive integers; only the part beyond them has equal ratios.
    start = next((i for i, (a, b) in enumerate(itertools.pairwise(grid)) if b - a > multiple), len(grid) - 2)
    assert is_geometric(grid[start:], multiple=multiple)


def test_even_spacing_is_not_geometric():
    assert is_geometric((1, 2, 4, 8, 16, 32))
    assert not is_geometric(tuple(range(1, 600, 60)))
    assert not is_geometric((1, 2, 3, 4, 5, 600))


def test_it_fits_the_planners_break_even():
    for out, in_ in ((10, 10), (64, 27), (512, 4608)):
        grid = rank_grid(min(out, in_), break_even_rank(out, in_))
        assert all(rank * (out + in_) < out * in_ for rank in grid)
        assert (grid[-1] + 1) * (out + in_) >= out * in_


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"full_rank": 0}, "full_rank must be at least 1, but got 0"),
        ({"min_rank": 0}, "min_rank must be at least 1, but got 0"),
        ({"multiple": 0}, "multiple must be at least 1, but got 0"),
        ({"points": 0}, "points must be at least 1, but got 0"),
        ({"break_even": 0.0}, "break_even must be above 0, but got 0.0"),
        ({"break_even": math.nan}, "break_even must be above 0, but got nan"),
    ],
)
def test_arguments_that_are_invalid(arguments, words):
    with pytest.raises(ValueError, match=words):
        rank_grid(**{"full_rank": 8, "break_even": 4.0} | arguments)
