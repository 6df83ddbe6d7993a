"""The exact route: leading singular vectors by `eigh` of the smaller Gram matrix in float64, or by an SVD.

    wide or square   W W^T = U S^2 U^T,  X = U_k                   Y = W^T X
    tall             W^T W = V S^2 V^T,  X = orth(W V_k)           Y = W^T X

A Gram matrix in float64 keeps singular values down to 1e-8 of the largest, the rounding of a float32 weight; float64
weights use an SVD. For `min(out, in)` up to some hundreds this is faster than iterating, and optimal.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import orthonormal_


def exact(operand: Operand, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best `X (out, rank)`, orthonormal, and `Y = W^T X (in, rank)` of this rank (Eckart-Young)."""
    W = operand.weight
    if operand.working == torch.float64:
        X = torch.linalg.svd(W, full_matrices=False).U[:, :rank].contiguous()
        return X, operand.adjoint(X)
    tall = W.shape[0] > W.shape[1]
    _, vectors = torch.linalg.eigh(operand.gram(tall=tall, dtype=torch.float64))
    leading = vectors[:, -rank:].flip(-1).to(operand.working).contiguous()
    X = orthonormal_(operand.forward(leading * operand.scale) if tall else leading)
    return X, operand.adjoint(X)
