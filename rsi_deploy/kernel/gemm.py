"""`A @ B`, by oneDNN where it is measured to be the faster at float32 (`kernel.rates`)."""

import torch
from torch import Tensor

from rsi_deploy.kernel.onednn import by_onednn, is_dense
from rsi_deploy.kernel.rates import rates

# Below so many flops nothing is gained: oneDNN writes a program for each new shape, which takes milliseconds.
LEAST_FLOPS = 3e8


def product(A: Tensor, B: Tensor) -> Tensor:
    """`A (m, k) @ B (k, n)`, of one dtype; contiguous by rows, on a GPU by columns.

    Blocks have as many columns as the rank. By columns it is no stride between numbers: tensor cores take the odd ones
    at a third of their speed.
    """
    if A.is_cuda:
        return (B.mT @ A.mT).mT
    large = 2.0 * A.shape[0] * A.shape[1] * B.shape[1] >= LEAST_FLOPS
    plain = A.dtype == torch.float32 and A.device.type == "cpu" and is_dense(A) and is_dense(B)
    if large and plain and rates(A.device).by_onednn:
        return by_onednn(A, B)
    return A @ B
