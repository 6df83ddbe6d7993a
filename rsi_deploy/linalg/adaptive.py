"""Stop power iterations when the error hardly decreases.

    q:     X, Y after 2 iterations; then one more while |W - X Y^T| decreases by more than a percent

Each iteration gains less than the one before. So after a gain below a percent, the next gain would be smaller still.
The norms come from a few steps of block power iteration with the same start, so their errors nearly cancel in the
comparison.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import orthonormal_
from rsi_deploy.linalg.routes.chebyshev import Draw
from rsi_deploy.linalg.routes.direct import direct, unit_

GAIN = 0.01
MOST = 64


def iterate_until_converged(operand: Operand, draw: Draw, *, mixed: bool) -> tuple[Tensor, Tensor, int]:
    """Return `X (out, columns)`, `Y = W^T X (in, columns)`, and the number of iterations."""
    X, Y = direct(operand, draw, 2, mixed=mixed)
    start = torch.randn(
        operand.weight.shape[1], 4, generator=torch.Generator().manual_seed(1), dtype=operand.working
    ).to(X.device)
    known, probe = residual_estimate(operand, X, Y, start)
    done = 2
    while done < MOST:
        done += 1
        X = orthonormal_(operand.forward(unit_(Y, operand.scale)))
        Y = operand.adjoint(X)
        found, probe = residual_estimate(operand, X, Y, probe)
        if not found < (1 - GAIN) * known:
            break
        known = found
    return X, Y, done


def residual_estimate(operand: Operand, X: Tensor, Y: Tensor, V: Tensor, *, steps: int = 4) -> tuple[float, Tensor]:
    """Estimate `||W - X Y^T||_2` from below; return also the block `V (in, few)`, the start for the next estimate."""
    for _ in range(steps):
        V = unit_(torch.linalg.qr(V).Q, operand.scale)
        U = operand.forward(V) - X @ (Y.mT @ V)
        Q = torch.linalg.qr(U).Q
        V = operand.adjoint(Q) - Y @ (X.mT @ Q)
    return float(torch.linalg.svdvals(V)[0]), V
