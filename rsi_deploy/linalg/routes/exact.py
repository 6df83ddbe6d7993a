"""The exact route: the leading singular vectors, by `eigh` of the smaller Gram matrix in float64, or by an SVD.

    wide or square   W W^T = U S^2 U^T,  X = U_k                   Y = W^T X
    tall             W^T W = V S^2 V^T,  X = orth(W V_k)           Y = W^T X

A Gram matrix in float64 keeps singular values down to 1e-8 of the largest, the rounding of a float32 weight; float64
weights go through an SVD. For `min(out, in)` up to some hundreds this is cheaper than to iterate, and optimal.
"""

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import orthonormal_


def exact(operand: Operand, rank: int) -> tuple[Tensor, Tensor]:
    """`X (out, rank)`, orthonormal, and `Y = W^T X (in, rank)`: the best of this rank (Eckart-Young)."""
    W = operand.weight
    if operand.working == torch.float64:
        X = torch.linalg.svd(W, full_matrices=False).U[:, :rank].contiguous()
        return X, operand.adjoint(X)
    tall = W.shape[0] > W.shape[1]
    _, vectors = torch.linalg.eigh(operand.gram(tall=tall, dtype=torch.float64))
    leading = vectors[:, -rank:].flip(-1).to(operand.working).contiguous()
    X = orthonormal_(operand.forward(leading * operand.scale) if tall else leading)
    return X, operand.adjoint(X)
