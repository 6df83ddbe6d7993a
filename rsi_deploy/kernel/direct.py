"""The direct route: the paper's iteration, in float32 or mostly in bfloat16.

    X = basis(W Y),  Y = W^T X      q times; the last basis orthonormal, the last Y in float32

Three roundings could harm in bfloat16. With `e = 2^-9/sqrt(3)`, the root mean square of a relative rounding:

    of the weight   |E|_2 ~ e (largest row norm + largest column norm), which tilts the span by |E| / s_k
    of the last X   e s_j in its column j, which no later product damps
    of the first X  as large as the distance of its columns from depending on each other: hides the last directions

The first two add to the residual like independent noise, so a tilt of 0.1 costs half a percent. Where the first is too
large (read off the first iteration) the iteration starts anew in float32; columns for which the second is are made in
float32. Where the third is, the last directions of the block begin as noise instead of as a sketch of the weight, half
an iteration behind: one more iteration in bfloat16, of two cheap products, makes up for it.
"""

import torch
from torch import Tensor

from rsi_deploy.kernel.orthogonal import RESOLVED, near_basis_, orthonormal_, rough_basis
from rsi_deploy.kernel.products import Operand

ROUNDING = 2.0**-9 / 3**0.5
TILT = 0.1


def direct(operand: Operand, Y: Tensor, q: int, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """`X (out, columns)`, orthonormal, and `Y = W^T X (in, columns)` from the sketch `Y (in, columns)`.

    Args:
        operand: the weight.
        Y: the sketch, in the working precision; used up.
        q: iterations, at least 1.
        mixed: bfloat16 where it does no harm.
    """
    Y, mixed = _mixed(operand, Y, q) if mixed and q > 1 else (_exact(operand, Y, q - 1), False)
    X = _last(operand, Y) if mixed else operand.forward(unit_(Y, operand.scale))
    del Y
    operand.forget()
    X = orthonormal_(X)
    return X, operand.adjoint(X)


def _last(operand: Operand, Y: Tensor) -> Tensor:
    """`W @ Y` in bfloat16, but in float32 for those columns whose rounding would show beside the least."""
    norms = torch.linalg.vector_norm(Y, dim=0, dtype=torch.float32)
    large = (ROUNDING * norms > TILT / 2 * norms.min()).nonzero()[:, 0]
    Y = unit_(Y, operand.scale)
    if len(large) > Y.shape[1] // 2:
        return operand.forward(Y.to(operand.working))
    X = operand.low_forward(Y.to(torch.bfloat16)).to(operand.working)
    if len(large):
        X[:, large] = operand.forward(Y[:, large].to(operand.working))
    return X


def _exact(operand: Operand, Y: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        X = near_basis_(operand.forward(unit_(Y, operand.scale)))
        del Y  # before the next one is made: at most one block of the input's width lives
        Y = operand.adjoint(X)
    return Y


def _mixed(operand: Operand, sketch: Tensor, q: int) -> tuple[Tensor, bool]:
    """`Y` after `q - 1` iterations, and whether bfloat16 did no harm: else they were made anew in float32."""
    Y = unit_(sketch, operand.scale).to(torch.bfloat16)
    X = operand.low_forward(Y)
    noise = operand.rounding(ROUNDING, X, Y)
    X, resolved = rough_basis(X)
    Y = operand.low_adjoint(X)
    least = float(torch.linalg.vector_norm(Y, dim=0, dtype=torch.float32).min())
    if not noise <= TILT * least:
        operand.forget()
        return _exact(operand, sketch, q - 1), False
    del sketch
    for _ in range(q - 2 + (resolved < RESOLVED)):
        X, _resolved = rough_basis(operand.low_forward(unit_(Y, operand.scale).to(torch.bfloat16)))
        Y = operand.low_adjoint(X)
    return Y, True


def unit_(Y: Tensor, scale: float = 1.0) -> Tensor:
    """`Y` with a largest entry of `scale`: only its span matters, and iterating squares its size past what floats hold.

    `scale` is the operand's, so that the product with the weight comes out near 1 too.
    """
    low, high = torch.aminmax(Y)
    Y = Y.div_(torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny))
    return Y if scale == 1.0 else Y.mul_(scale)
