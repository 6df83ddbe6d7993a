"""As many power iterations as pay, and the smallest rank that is good enough: stopping by error.

    q:     X, Y after 2 iterations; then one at a time while |W - X Y^T| falls by more than a percent
    rank:  the least r with |W - left_r right_r| <= E |W|  (or E s_{r+1}): bracketed by doubling, then bisected

Each iteration gains less than the one before it, so the next one after a gain below a percent would gain less still.
The norms come from a few steps of block power iteration with the same start every time, so their errors nearly cancel
in the comparison.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import orthonormal_
from rsi_deploy.linalg.routes.chebyshev import Draw
from rsi_deploy.linalg.routes.direct import direct, unit_

GAIN = 0.01
MOST = 64


def until_settled(operand: Operand, draw: Draw, *, mixed: bool) -> tuple[Tensor, Tensor, int]:
    """`X (out, columns)`, `Y = W^T X (in, columns)`, and the number of iterations it took."""
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
    """`||W - X Y^T||_2` from below, and the block `V (in, few)` that found it, to start the next one from."""
    for _ in range(steps):
        V = unit_(torch.linalg.qr(V).Q, operand.scale)
        U = operand.forward(V) - X @ (Y.mT @ V)
        Q = torch.linalg.qr(U).Q
        V = operand.adjoint(Q) - Y @ (X.mT @ Q)
    return float(torch.linalg.svdvals(V)[0]), V
