"""Many equal small weights at once, in batched products: `W (batch, out, in)`, each with a sketch of its own.

A batched product gives every matrix the bytes that it has alone (as does all else here), so weights up to
`SMALL` numbers always come this way, one or many, and the bytes of a site do not depend on what was next to it.
"""

import torch
from torch import Tensor

from rsi_deploy.kernel.orthogonal import orthonormal_

SMALL = 1 << 18


def is_small(weight: Tensor) -> bool:
    """Whether a weight `(..., out, in)` is factorized in a batch."""
    return weight.shape[-2] * weight.shape[-1] <= SMALL


def direct_batch(W: Tensor, Y: Tensor, q: int) -> tuple[Tensor, Tensor]:
    """`X (batch, out, columns)` and `Y = W^T X (batch, in, columns)` by the paper's iteration from `Y`, used up."""
    largest = W.abs().amax(dim=(-2, -1), keepdim=True)
    tiny = torch.finfo(W.dtype).tiny
    scale = torch.where(largest > 0, 1 / largest.clamp_min(tiny), 1)
    for _ in range(q):
        low, high = Y.amin(dim=(-2, -1), keepdim=True), Y.amax(dim=(-2, -1), keepdim=True)
        Y = Y.div_(torch.maximum(high, -low).clamp_min(tiny)).mul_(scale)  # X near 1, whatever the size of W
        X = orthonormal_(W @ Y)
        Y = W.mT @ X
    return X, Y


def exact_batch(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`X (batch, out, rank)` and `Y = W^T X (batch, in, rank)`, the best of this rank, by SVDs."""
    X = torch.linalg.svd(W, full_matrices=False).U[..., :rank].contiguous()
    return X, W.mT @ X
