"""Let each attention head pass on fewer numbers: bases of its values, and the refitted weight that reads them.

    y = sum_h W_h x_h ~ sum_h L_h R_h x_h       x_h (d) values of head h, R_h (k, d), L_h (out, k), k the same for all h

One head alone is a reduced-rank regression: with C = xx_hh + r I = c c^T, the best R_h x_h are the k leading directions
of c^-1 x_h by the eigenvalues of c^T W_h^T W_h c. Heads are correlated, so the heads take turns: each is fitted to what
the others leave, which never raises the error. Finally all L_h together are the best weight for the bases:

    L = W xx R^T (R xx R^T)^-1

With an output sensitivity `S S^T` errors are those of `S^T y`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rsi_deploy.calibration.reduced_rank_regression import ridge_level, sensitivity_root

TURNS = 4
"""Times that each head is fitted again. On MiniLM 16 turns leave the same held-out errors."""


def head_counts(count: int, heads: int, multiple: int = 1) -> list[int]:
    """Return the numbers of values of a head that are tried, in falling order: multiples of 8 in heads of 32 or more.

    Args:
        count: number of values of a head.
        heads: number of heads.
        multiple: number that divides `heads` times each.

    Examples:
        >>> head_counts(32, 12), head_counts(16, 6), head_counts(8, 4)
        ([24, 16, 8], [12, 8, 4], [6, 4, 2])
    """
    step = next((step for step in (8, 4, 2) if count >= 4 * step), 1)
    return [kept for kept in range((count - 1) // step * step, 0, -step) if heads * kept % multiple == 0]


def head_factors(
    weight: Tensor, xx: Tensor, heads: int, kept: Sequence[int], *, ridge: float, sensitivity: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the factors for each number of values that a head passes on.

    Args:
        weight: W `(out, heads * d)`.
        xx: centred second moments of the input, `(heads * d, heads * d)`.
        heads: number of heads.
        kept: numbers k, each from 1 to d.
        ridge: ridge in mean input variances.
        sensitivity: output sensitivity `(out, out)`; None for the identity.

    Yields:
        `left (out, heads * k)`, and `right (heads * k, heads * d)` with an orthonormal block for each head, in the
        dtype of `xx`.
    """
    size = len(xx) // heads
    X = xx + torch.diag_embed(ridge_level(xx.diagonal()[None], ridge)[0].expand(len(xx)))
    W = weight.to(X.dtype)
    V = W if sensitivity is None else sensitivity_root(sensitivity).to(X).mT @ W
    WX, VX = W @ X, V @ X
    ends = [slice(size * head, size * (head + 1)) for head in range(heads)]
    roots = [torch.linalg.cholesky(X[own, own]) for own in ends]
    for number in kept:
        mine = [slice(number * head, number * (head + 1)) for head in range(heads)]
        right = X.new_zeros(heads * number, len(X))
        for block, own, root in zip(mine, ends, roots, strict=True):
            right[block, own] = _basis(V[:, own] @ X[own, own], root, number)
        left = _refitted(VX, X, right)
        for _ in range(TURNS if number < size else 0):
            for block, own, root in zip(mine, ends, roots, strict=True):
                left[:, block] = 0
                rest = VX[:, own] - left @ (right @ X[:, own])
                right[block, own] = _basis(rest, root, number)
                left[:, block] = _refitted(rest, X[own, own], right[block, own])
        yield _refitted(WX, X, right), right


def _basis(yx: Tensor, root: Tensor, number: int) -> Tensor:
    """Return an orthonormal basis `(number, d)` of the values from which y is predicted best.

    Args:
        yx: second moments of y and the values, `(out, d)`.
        root: Cholesky factor of those of the values.
        number: number of values to keep.
    """
    whitened = torch.linalg.solve_triangular(root, yx.mT, upper=False)
    directions = torch.linalg.eigh(whitened @ whitened.mT).eigenvectors[:, -number:]
    basis: Tensor = torch.linalg.qr(torch.linalg.solve_triangular(root.mT, directions, upper=True)).Q
    return basis.mT


def _refitted(yx: Tensor, xx: Tensor, right: Tensor) -> Tensor:
    """Return the best weight `(out, rank)` for `right` times the inputs."""
    root = torch.linalg.cholesky(right @ xx @ right.mT)
    return torch.cholesky_solve(right @ yx.mT, root).mT
