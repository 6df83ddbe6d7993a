"""The direct route: the paper's iteration, in float32 or mostly in bfloat16.

    X = basis(W Y),  Y = W^T X      q times; the last basis orthonormal, the last Y in float32

Three roundings could harm in bfloat16. With `e = 2^-9/sqrt(3)`, the root mean square of a relative rounding:

    of the weight   |E|_2 ~ e (largest row norm + largest column norm), which tilts the span by |E| / s_k
    of the last X   e (s_1 + |S|_F / sqrt(out)) / s_k                   likewise, and no later product damps it
    of the first X  as large as the distance of its columns from depending on each other: hides the last directions

The first two add to the residual like independent noise, so a tilt of 0.1 costs half a percent. All are read off the
first iteration. Where the first is too large the iteration starts anew in float32; where the second is, the last `W Y`
is made in float32; where the third is, the first two are: from then on the columns are in order of their singular
values, and a rounding relative to a column hurts nobody else's.
"""

import torch
from torch import Tensor

from rsi_deploy.kernel.orthogonal import near_basis_, orthonormal_, rough_basis
from rsi_deploy.kernel.products import Operand

ROUNDING = 2.0**-9 / 3**0.5
TILT = 0.1
RESOLVED = 3.0
# Numbers in a weight from which two iterations in float32 and the rest in bfloat16 are faster than all in float32.
LARGE = 1 << 22


def direct(operand: Operand, Y: Tensor, q: int, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """`X (out, columns)`, orthonormal, and `Y = W^T X (in, columns)` from the sketch `Y (in, columns)`.

    Args:
        operand: the weight.
        Y: the sketch, in the working precision; used up.
        q: iterations, at least 1.
        mixed: bfloat16 where it does no harm.
    """
    Y, in_full = _mixed(operand, Y, q) if mixed and q > 1 else (_exact(operand, Y, q - 1), True)
    X = operand.forward(unit_(Y, operand.scale)) if in_full else operand.low_forward(Y).to(operand.working)
    del Y
    operand.forget()
    X = orthonormal_(X)
    return X, operand.adjoint(X)


def _exact(operand: Operand, Y: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        X = near_basis_(operand.forward(unit_(Y, operand.scale)))
        del Y  # before the next one is made: at most one block of the input's width lives
        Y = operand.adjoint(X)
    return Y


def _mixed(operand: Operand, sketch: Tensor, q: int) -> tuple[Tensor, bool]:
    """`Y` after `q - 1` iterations, and whether the last `W Y` must be made in float32."""
    Y = unit_(sketch, operand.scale).to(torch.bfloat16)
    X = operand.low_forward(Y)
    noise = operand.rounding(ROUNDING, X, Y)
    X, resolved = rough_basis(X)
    in_full = 0
    if resolved < RESOLVED and operand.weight.numel() < LARGE:
        operand.forget()
        return _exact(operand, sketch, q - 1), True
    if resolved < RESOLVED:
        X = near_basis_(operand.forward(sketch)).to(torch.bfloat16)
        in_full = 2
    Y = operand.low_adjoint(X)
    norms = torch.linalg.vector_norm(Y, dim=0, dtype=torch.float32)
    least, most, all_ = float(norms.min()), float(norms.max()), float(norms.norm())
    if not noise <= TILT * least:
        operand.forget()
        return _exact(operand, sketch, q - 1), True
    del sketch
    for index in range(1, q - 1):
        if index < in_full:
            X = near_basis_(operand.forward(unit_(Y, operand.scale).float())).to(torch.bfloat16)
        else:
            X, _ = rough_basis(operand.low_forward(unit_(Y, operand.scale).to(torch.bfloat16)))
        Y = operand.low_adjoint(X)
    if ROUNDING * (most + all_ / X.shape[0] ** 0.5) <= TILT * least:
        return unit_(Y, operand.scale).to(torch.bfloat16), False
    return Y.float(), True


def unit_(Y: Tensor, scale: float = 1.0) -> Tensor:
    """`Y` with a largest entry of `scale`: only its span matters, and iterating squares its size past what floats hold.

    `scale` is the operand's, so that the product with the weight comes out near 1 too.
    """
    low, high = torch.aminmax(Y)
    Y = Y.div_(torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny))
    return Y if scale == 1.0 else Y.mul_(scale)
