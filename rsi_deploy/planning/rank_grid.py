"""Candidate ranks of a site: multiples of a number below the break-even rank, optionally with geometric spacing."""

import math


def rank_grid(
    full_rank: int, break_even: float, *, min_rank: int = 1, multiple: int = 1, points: int | None = None
) -> tuple[int, ...]:
    """Return ascending multiples from `min_rank` to `full_rank` that lie strictly below `break_even`.

    The grid is empty if there are none, for example for multiples of 8 and a break-even rank of at most 8. Such a site
    stays dense.

    Args:
        full_rank: full rank of the site's form.
        break_even: smallest rank that saves nothing, e.g. `break_even_rank(out, in)`; need not be whole.
        min_rank: smallest candidate.
        multiple: number that divides every candidate.
        points: largest number of candidates, spaced geometrically up to the largest one; None for all.

    Raises:
        ValueError: an argument that is not positive.

    Examples:
        >>> rank_grid(64, 6.5), rank_grid(64, 32.0, multiple=8), rank_grid(64, 8.0, multiple=8)
        ((1, 2, 3, 4, 5, 6), (8, 16, 24), ())
        >>> rank_grid(512, 256.0, points=9)
        (1, 2, 4, 8, 16, 32, 64, 128, 255)
    """
    for name, value in (("full_rank", full_rank), ("min_rank", min_rank), ("multiple", multiple), ("points", points)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
    if not break_even > 0:
        raise ValueError(f"break_even must be above 0, but got {break_even}")
    largest = math.ceil(min(break_even, full_rank + 1)) - 1
    first, last = -(-min_rank // multiple), largest // multiple
    if first > last:
        return ()
    if points is None or points > last - first:
        return tuple(multiple * k for k in range(first, last + 1))
    return tuple(multiple * k for k in _geometric(first, last, points))


def _geometric(first: int, last: int, points: int) -> list[int]:
    """Return `points` different integers from `first` to `last`, both included (only `last` if `points` is 1)."""
    if points == 1:
        return [last]
    numbers = [first]
    for left in range(points - 1, 0, -1):
        here = numbers[-1]
        numbers.append(max(here + 1, round(here * (last / here) ** (1 / left))))  # equal ratios for the rest
    return numbers
