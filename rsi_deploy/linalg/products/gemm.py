"""`A @ B`, by oneDNN where it is measured to be the faster at float32 (`kernel.rates`)."""

import torch
from torch import Tensor

from rsi_deploy.linalg.products.onednn import by_onednn, is_dense
from rsi_deploy.linalg.products.rates import rates

# Below so many flops nothing is gained: oneDNN writes a program for each new shape, which takes milliseconds.
LEAST_FLOPS = 3e8
# Of a matrix, for products with a few rows.
LEAST_NUMBERS = 1 << 17


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


def times(rows: Tensor, B: Tensor) -> Tensor:
    """`rows (..., few, k) @ B (..., k, n)`: oneDNN multiplies a few rows in hardly more time than one, MKL does not."""
    plain = rows.ndim == 2 and len(rows) > 1 and rows.dtype == torch.float32 and rows.device.type == "cpu"
    if plain and B.numel() >= LEAST_NUMBERS and is_dense(B) and rates(B.device).by_onednn:
        return by_onednn(rows, B)
    return rows @ B
