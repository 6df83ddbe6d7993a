"""Pivoted factors: the same product, with some rows of the left factor equal to those of the identity.

    left right = P [I; K] (left[pivots] right)        |K| <= BOUND

The pivots are found by an LU factorization with partial pivoting, then by exchanges: while an entry of K is above the
bound, its row takes the place of its pivot, which multiplies the volume of the pivot rows by that entry (Goreinov et
al., "How to find a good submatrix", 2010).

Outputs in another order cost time wherever the order cannot be folded into what follows. So the first or the last rows
are the pivots where K stays below a larger bound with them, which the dtype must bear.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BOUND = 2.0
"""Largest entry of K; small ones keep rounding in few bits harmless."""
RUN_BOUND = 64.0
"""The same for pivots in one run, in float32: the product of MiniLM's sites is then exact to about 1e-5."""


class PivotedFactors(NamedTuple):
    """`left (groups, out, rank)`, `right (groups, rank, in)`, and `pivots (groups, rank)`, int64, rows of `left`."""

    left: Tensor
    right: Tensor
    pivots: Tensor


def pivoted(left: Tensor, right: Tensor, *, run_bound: float = 0.0) -> PivotedFactors:
    """Return factors of the same product whose `left` has the rows of the identity at the pivots.

    Args:
        left: `(groups, out, rank)` with `rank <= out`, of any rank.
        right: `(groups, rank, in)`.
        run_bound: largest entry of K with the first or the last rows as pivots; 0 to ignore their order. With several
            groups, it is ignored anyway.

    Returns:
        Factors in the dtype of `left`; the arithmetic is float64.

    Example:
        >>> left, right = torch.tensor([[[1.0], [4.0], [2.0]]]), torch.ones(1, 1, 2)
        >>> [t.tolist() for t in pivoted(left, right)]
        [[[[0.25], [1.0], [0.5]]], [[[4.0, 4.0]]], [[1]]]
        >>> pivoted(left, right, run_bound=64).pivots.tolist()
        [[2]]
    """
    run_bound = run_bound if len(left) == 1 else 0.0
    parts = [
        _in_a_run(one, other, run_bound) or _pivoted(one, other)
        for one, other in zip(left.double(), right.double(), strict=True)
    ]
    new, rows, pivots = (torch.stack(each) for each in zip(*parts, strict=True))
    return PivotedFactors(new.to(left.dtype), rows.to(right.dtype), pivots)


def _in_a_run(left: Tensor, right: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the factors with the first or the last rows as pivots, or None if both have entries above the bound."""
    rows, rank = left.shape
    found = []
    for start in (0, rows - rank) if bound else ():
        pivots = torch.arange(start, start + rank, device=left.device)
        coefficients, singular = torch.linalg.solve_ex(left[pivots], left, left=False)
        largest = float(coefficients.abs().max())
        if not singular and largest <= bound:
            coefficients[pivots] = torch.eye(rank, dtype=left.dtype, device=left.device)
            found.append((largest, (coefficients, left[pivots] @ right, pivots)))
    return min(found, key=lambda each: each[0])[1] if found else None


def _pivoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rank = left.shape[1]
    permutation, lower, _ = torch.linalg.lu(left)
    order = permutation.argmax(dim=0)
    pivots = order[:rank].clone()
    coefficients = torch.empty_like(left)
    coefficients[order] = torch.linalg.solve_triangular(
        lower[:rank], lower, upper=False, left=False, unitriangular=True
    )
    for _ in range(10 * len(left)):  # each exchange doubles the volume, so few are needed
        row, column = divmod(int(coefficients.abs().argmax()), rank)
        largest = coefficients[row, column]
        if largest.abs() <= BOUND:
            break
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients -= torch.outer(coefficients[:, column] / largest, change)
        pivots[column] = row
    coefficients[pivots] = torch.eye(rank, dtype=left.dtype, device=left.device)
    return coefficients, left[pivots] @ right, pivots
