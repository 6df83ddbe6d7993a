"""The direct route: the paper's iteration.

    X = basis(W Y),  Y = W^T X      q times from the sketch Y; the last basis orthonormal

A basis costs as much as a product if the block is half as wide as it is long. So each iteration makes one basis, of the
shorter of `X` and `Y` (the first of `X`, so that no sketch of `W^T W` is needed). Roundings of a basis lie
`eps / sqrt(m)` along each leading direction and grow by `(s_1/s_k)^2` in two products beside the last direction
(`routes.chebyshev`); if that would be visible, both bases are made.

With bfloat16 this is the Chebyshev route without its shifts.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import near_basis_, orthonormal_
from rsi_deploy.linalg.routes.chebyshev import Draw, column_norms, covering, iterate


def direct(operand: Operand, draw: Draw, q: int, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """Return `X (out, columns)`, orthonormal, and `Y (in, columns)` with `W ~ X Y^T`.

    Args:
        operand: weight.
        draw: returns the sketch `(side, columns)` in the working precision, the same each time.
        q: number of iterations, at least 1.
        mixed: whether to use bfloat16 where it does no harm.
    """
    if mixed and q > 1:
        return iterate(operand, draw, [0.0] * (q - 1), mixed=True)
    X = orthonormal_(operand.forward(unit_(_iterated(operand, draw, q - 1), operand.scale)))
    return X, operand.adjoint(X)


def _iterated(operand: Operand, draw: Draw, iterations: int) -> Tensor:
    """Return `Y (in, columns)` after this many iterations."""
    Y, leading = draw(operand.weight.shape[1]), 0
    for index in range(iterations):
        X = operand.forward(unit_(Y, operand.scale))
        del Y  # free it first, so that only one block of the input's width exists
        X = unit_(X) if index and operand.tall and not leading else near_basis_(X)
        Y = operand.adjoint(X)
        del X
        if operand.tall:
            leading = covering(column_norms(Y), torch.finfo(operand.working).eps, len(Y))
            Y = near_basis_(Y)
    return Y


def unit_(Y: Tensor, scale: float = 1.0) -> Tensor:
    """Scale `Y` to a largest entry of `scale`: only its span matters, and iterations would square its size to overflow.

    With the operand's `scale` the product with the weight is near 1 too.
    """
    low, high = torch.aminmax(Y)
    Y = Y.div_(torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny))
    return Y if scale == 1.0 else Y.mul_(scale)
