"""Many equal small weights at once, in batched products: `W (batch, out, in)`, each with a sketch of its own.

A batched product gives every matrix the bytes that it has alone (as does all else here), so weights up to
`SMALL` numbers always come this way, one or many, and the bytes of a site do not depend on what was next to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsi_deploy.linalg.orthogonal import orthonormal_
from rsi_deploy.linalg.routes.chebyshev import MARGIN

SMALL = 1 << 18


def is_small(weight: Tensor) -> bool:
    """Whether a weight `(..., out, in)` is factorized in a batch."""
    return weight.shape[-2] * weight.shape[-1] <= SMALL


def iterate_batch(W: Tensor, Y: Tensor, fractions: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`X (batch, out, columns)` and `Y = W^T X (batch, in, columns)` by the paper's iteration, shifted.

    Args:
        W: `(batch, out, in)`.
        Y: the sketches `(batch, in, columns)`, used up.
        fractions: the shifts of all iterations after the first, as in `kernel.chebyshev`; zeros: the paper's.
    """
    largest = _largest(W)
    scale = 1 / largest  # `_largest` is never 0
    X = orthonormal_(W @ _unit_(Y).mul_(scale))
    for fraction in fractions:
        Y = W.mT @ X
        size = _largest(Y)
        least = torch.linalg.vector_norm(Y.div_(size), dim=-2, keepdim=True).amin(-1, keepdim=True)
        shift = (fraction * MARGIN) * (least * (size * scale)) * least  # of W^T times scale / size, as the product is
        X = orthonormal_((W @ Y.mul_(scale)).sub_(X * shift))
    return X, W.mT @ X


def _unit_(Y: Tensor) -> Tensor:
    """`Y` with a largest entry of 1 in each matrix: then the product with a scaled weight is near 1."""
    return Y.div_(_largest(Y))


def _largest(Y: Tensor) -> Tensor:
    low, high = Y.amin(dim=(-2, -1), keepdim=True), Y.amax(dim=(-2, -1), keepdim=True)
    return torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny)


def exact_batch(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`X (batch, out, rank)` and `Y = W^T X (batch, in, rank)`, the best of this rank, by SVDs."""
    X = torch.linalg.svd(W, full_matrices=False).U[..., :rank].contiguous()
    return X, W.mT @ X
