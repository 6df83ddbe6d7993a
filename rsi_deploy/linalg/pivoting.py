"""Pivoted factors: the same product, with some rows of the left factor equal to those of the identity.

    left right = P [I; K] (left[pivots] right)        |K| <= BOUND

The pivots are found by an LU factorization with partial pivoting, then by exchanges: while an entry of K is above the
bound, its row takes the place of its pivot, which multiplies the volume of the pivot rows by that entry (Goreinov et
al., "How to find a good submatrix", 2010).
"""

from typing import NamedTuple

import torch
from torch import Tensor

BOUND = 2.0
"""Largest entry of K; small ones keep rounding in few bits harmless."""


class PivotedFactors(NamedTuple):
    """`left (groups, out, rank)`, `right (groups, rank, in)`, and `pivots (groups, rank)`, int64, rows of `left`."""

    left: Tensor
    right: Tensor
    pivots: Tensor


def pivoted(left: Tensor, right: Tensor) -> PivotedFactors:
    """Return factors of the same product whose `left` has the rows of the identity at the pivots.

    Args:
        left: `(groups, out, rank)` with `rank <= out`, of any rank.
        right: `(groups, rank, in)`.

    Returns:
        Factors in the dtype of `left`; the arithmetic is float64.

    Example:
        >>> left, right = torch.tensor([[[1.0], [4.0], [2.0]]]), torch.ones(1, 1, 2)
        >>> [t.tolist() for t in pivoted(left, right)]
        [[[[0.25], [1.0], [0.5]]], [[[4.0, 4.0]]], [[1]]]
    """
    parts = [_pivoted(one, other) for one, other in zip(left.double(), right.double(), strict=True)]
    new, rows, pivots = (torch.stack(each) for each in zip(*parts, strict=True))
    return PivotedFactors(new.to(left.dtype), rows.to(right.dtype), pivots)


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
