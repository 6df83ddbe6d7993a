"""The block Krylov route: all blocks of the iteration are kept, and the best `rank` directions of their span are used.

    X_1 = W Y,  X_{j+1} = W W^T X_j;  Q = orth [X_1 ... X_d],  B = Q^T W,  left = Q U_k(B)

(Musco and Musco 2015, algorithm 2). Its polynomials in `W W^T` are Chebyshev's: near the top of the spectrum `d` blocks
separate as `(2d - 1)^2` factors of a gap, where `q` power iterations separate as `2q - 1`. With a margin that was
measured on slow, medium and fast spectra, `d` blocks replace `q` iterations once `(2d - 1)^2 >= 3 (2q - 1)`, which pays
from about `q = 8` on. The route needs `d * columns <= min(out, in)`, and as it holds `d` blocks, more memory than the
others.
"""

import math

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import near_basis_, orthonormal_
from rsi_deploy.linalg.routes.direct import unit_


def depth(q: int) -> int:
    """Return the number of blocks that is as good as `q` power iterations.

    Example:
        >>> [depth(q) for q in (1, 2, 4, 8, 16)]
        [1, 2, 3, 4, 6]
    """
    return 1 if q == 1 else math.ceil((math.sqrt(3 * (2 * q - 1)) + 1) / 2 - 1e-9)


def krylov(operand: Operand, Y: Tensor, q: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return `X (out, rank)`, orthonormal, and `Y = W^T X (in, rank)`, as good as `q` iterations from the sketch `Y`.

    Args:
        operand: weight.
        Y: sketch `(in, columns)` in the working precision; overwritten.
        q: number of power iterations that the blocks replace.
        rank: rank of the result.
    """
    blocks = [near_basis_(operand.forward(unit_(Y, operand.scale)))]
    for _ in range(depth(q) - 1):
        X = operand.forward(unit_(operand.adjoint(blocks[-1]), operand.scale))
        for _twice in range(2):
            for other in blocks:
                X -= other @ (other.mT @ X)
        blocks.append(near_basis_(X))
    Q = orthonormal_(torch.cat(blocks, dim=1))
    del blocks
    B = unit_(operand.adjoint(Q))
    small = B.double().mT @ B.double()
    _, vectors = torch.linalg.eigh(small)
    X = orthonormal_(Q @ vectors[:, -rank:].flip(-1).to(Q.dtype))
    return X, operand.adjoint(X)
