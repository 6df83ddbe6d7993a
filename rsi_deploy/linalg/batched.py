"""Factorize many small weights of one shape with batched products: `W (batch, out, in)`, each with its own sketch.

A batched product gives every matrix the same bytes as a batch of one. Weights up to `SMALL` numbers always use this
path, even a single one, so that the bytes of a site do not depend on the other sites.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsi_deploy.linalg.orthogonal import orthonormal_
from rsi_deploy.linalg.routes.chebyshev import MARGIN

SMALL = 1 << 18


def is_small(weight: Tensor) -> bool:
    """Return whether a weight `(..., out, in)` is factorized in a batch."""
    return weight.shape[-2] * weight.shape[-1] <= SMALL


def iterate_batch(W: Tensor, Y: Tensor, fractions: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return `X (batch, out, columns)` and `Y = W^T X (batch, in, columns)` by the paper's iteration with shifts.

    Args:
        W: weights `(batch, out, in)`.
        Y: sketches `(batch, in, columns)`; overwritten.
        fractions: shifts of all iterations after the first, as in `routes.chebyshev`; zeros for the paper's iteration.
    """
    largest = _largest(W)
    scale = 1 / largest  # `_largest` is never 0
    X = orthonormal_(W @ _unit_(Y).mul_(scale))
    for fraction in fractions:
        Y = W.mT @ X
        size = _largest(Y)
        least = torch.linalg.vector_norm(Y.div_(size), dim=-2, keepdim=True).amin(-1, keepdim=True)
        shift = (fraction * MARGIN) * (least * (size * scale)) * least  # for W^T times scale / size, like the product
        X = orthonormal_((W @ Y.mul_(scale)).sub_(X * shift))
    return X, W.mT @ X


def _unit_(Y: Tensor) -> Tensor:
    """Scale each matrix to a largest entry of 1, so that its product with a scaled weight is near 1."""
    return Y.div_(_largest(Y))


def _largest(Y: Tensor) -> Tensor:
    low, high = Y.amin(dim=(-2, -1), keepdim=True), Y.amax(dim=(-2, -1), keepdim=True)
    return torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny)


def exact_batch(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best `X (batch, out, rank)` and `Y = W^T X (batch, in, rank)` of this rank, by SVDs."""
    X = torch.linalg.svd(W, full_matrices=False).U[..., :rank].contiguous()
    return X, W.mT @ X
