"""Products `A @ B`, by oneDNN where it is measured to be faster for float32 (`products.rates`)."""

import torch
from torch import Tensor

from rsi_deploy.linalg.products.onednn import by_onednn, is_dense
from rsi_deploy.linalg.products.rates import rates

# Smaller products gain nothing: oneDNN generates code for each new shape, which takes milliseconds.
LEAST_FLOPS = 3e8
# Least size of the matrix in products with a few rows.
LEAST_NUMBERS = 1 << 17


def product(A: Tensor, B: Tensor) -> Tensor:
    """Return `A (m, k) @ B (k, n)`, of one dtype; contiguous by rows, on a GPU by columns.

    Blocks have as many columns as the rank. Stored by columns, the rank is not a stride; tensor cores handle odd
    strides at a third of their speed.
    """
    if A.is_cuda:
        return (B.mT @ A.mT).mT
    large = 2.0 * A.shape[0] * A.shape[1] * B.shape[1] >= LEAST_FLOPS
    plain = A.dtype == torch.float32 and A.device.type == "cpu" and is_dense(A) and is_dense(B)
    if large and plain and rates(A.device).by_onednn:
        return by_onednn(A, B)
    return A @ B


def times(rows: Tensor, B: Tensor) -> Tensor:
    """Return `rows (..., few, k) @ B (..., k, n)`; oneDNN multiplies a few rows almost as fast as one, MKL does not."""
    plain = rows.ndim == 2 and len(rows) > 1 and rows.dtype == torch.float32 and rows.device.type == "cpu"
    if plain and B.numel() >= LEAST_NUMBERS and is_dense(B) and rates(B.device).by_onednn:
        return by_onednn(rows, B)
    return rows @ B
