"""The direct route: the paper's iteration, in float32 or mostly in bfloat16.

    X = basis(W Y),  Y = W^T X      q times; the last basis orthonormal, the last Y in float32

Three roundings could harm in bfloat16. With `e = 2^-9/sqrt(3)`, the root mean square of a relative rounding:

    of the weight   |E|_2 ~ e (largest row norm + largest column norm), which tilts the span by |E| / s_k
    of the last X   e s_j in its column j, which no later product damps
    of the first X  as large as the distance of its columns from depending on each other: hides the last directions

The first two add to the residual like independent noise, so a tilt of 0.1 costs half a percent. Where the first is too
large (read off the first iteration) the iteration starts anew in float32; columns for which the second is are made in
float32. Where the third is, the first block is made in float32 instead.

Where bases are made. A basis costs as much as a product where the block is half as wide as it is long, so one an
iteration is made, of the shorter of `X` and `Y` (the first of `X`, as no sketch of `W^T W` should be needed). Roundings
of one basis lie `e / sqrt(m)` along each leading direction and come out of two products `(s_1/s_k)^2` times larger
beside the last one. Where that would pass `DROWNED`, the leading columns for which it would are taken out of the others
on the longer side too; the last `Y` is made a basis of as a whole.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rsi_deploy.kernel.orthogonal import TOLD, deflate_, near_basis_, orthonormal_, rough_basis_
from rsi_deploy.kernel.products import Operand

Draw = Callable[[], Tensor]
ROUNDING = 2.0**-9 / 3**0.5
TILT = 0.1
DROWNED = 0.03


def direct(operand: Operand, draw: Draw, q: int, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """`X (out, columns)`, orthonormal, and `Y = W^T X (in, columns)` from the sketch.

    Args:
        operand: the weight.
        draw: makes the sketch `(in, columns)` in the working precision, the same each time: so nobody need keep it.
        q: iterations, at least 1.
        mixed: bfloat16 where it does no harm.
    """
    found = _low(operand, draw, q) if mixed and q > 1 else None
    if found is None:
        operand.forget()
        X = operand.forward(unit_(_exact(operand, draw, q - 1), operand.scale))
    else:
        Y, norms = found
        del found
        X = _last(operand, Y, norms)
        del Y
    operand.forget()
    X = orthonormal_(X)
    return X, operand.adjoint(X)


def _last(operand: Operand, Y: Tensor, norms: Tensor) -> Tensor:
    """`W @ Y` in bfloat16, but in float32 for those columns whose rounding would show beside the least.

    Args:
        operand: the weight.
        Y: `(in, columns)` in bfloat16.
        norms: `(columns,)`, about the singular values that the columns stand for.
    """
    large = (ROUNDING * norms > TILT / 2 * norms.min()).nonzero()[:, 0]
    if len(large) > Y.shape[1] // 2:
        return operand.forward(Y.to(operand.working))
    X = operand.low_forward(Y)
    some = Y[:, large].to(operand.working)
    del Y
    X = X.to(operand.working)
    if len(large):
        X[:, large] = operand.forward(some)
    return X


def _exact(operand: Operand, draw: Draw, iterations: int) -> Tensor:
    """`Y (in, columns)` after so many iterations in the working precision."""
    Y, tall = draw(), operand.weight.shape[0] > operand.weight.shape[1]
    leading = 0
    for index in range(iterations):
        X = operand.forward(unit_(Y, operand.scale))
        del Y  # before the next one is made: at most one block of the input's width lives
        X = unit_(X) if index and tall and not leading else near_basis_(X)
        Y = operand.adjoint(X)
        del X
        if tall:
            leading = drowning(_norms(Y), torch.finfo(operand.working).eps, len(Y))
            Y = near_basis_(Y)
    return Y


def _low(operand: Operand, draw: Draw, q: int) -> tuple[Tensor, Tensor] | None:
    """`Y (in, columns)` after `q - 1` iterations, all in bfloat16, and the norms its columns had.

    None where bfloat16 would do harm, or nothing for a single iteration.
    """
    tall, low = operand.weight.shape[0] > operand.weight.shape[1], torch.bfloat16
    Y = unit_(draw(), operand.scale).to(low)
    X = operand.low_forward(Y)
    noise = operand.rounding(ROUNDING, X, Y)
    del Y
    X, least = rough_basis_(X, passes=0)
    if least < TOLD:
        del X
        X = rough_basis_(operand.forward(unit_(draw(), operand.scale)))[0].to(low)
    for index in range(q - 1):
        Y = operand.low_adjoint(X)
        del X
        norms = _norms(Y)
        if not index and not noise <= TILT * float(norms.min()):
            return None
        leading = drowning(norms, ROUNDING, len(Y))
        Y = unit_(Y, operand.scale).to(low)
        last = index == q - 2  # nothing damps what is lost from here on: better a whole basis
        if tall or leading:
            Y = unit_(_basis(Y, leading, whole=tall or last), operand.scale)
        if last:
            return Y, norms
        X = operand.low_forward(Y)
        del Y
        X = _basis(unit_(X), leading, whole=not tall)
    return None  # a single iteration is not worth a cast


def _basis(X: Tensor, leading: int, *, whole: bool) -> Tensor:
    """A rough basis, or only the leading columns taken out of the others; `X` is used up."""
    if whole or 2 * leading > X.shape[1]:
        return rough_basis_(X)[0]
    return deflate_(X, leading) if leading else X


def drowning(norms: Tensor, rounding: float, length: int) -> int:
    """How many columns come first that, after two products, would lie in the rounding of the last more than it does.

    Args:
        norms: `(columns,)`, about the singular values that the columns stand for.
        rounding: root mean square of a relative rounding.
        length: of a column.
    """
    limit = (DROWNED * length**0.5 / rounding) ** 0.5
    found = (norms > limit * norms.min()).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def _norms(Y: Tensor) -> Tensor:
    """Of the columns, `(columns,)`, float32 or the dtype of `Y`."""
    dtype = torch.float64 if Y.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(Y, dim=0, dtype=dtype)
    return norms


def unit_(Y: Tensor, scale: float = 1.0) -> Tensor:
    """`Y` with a largest entry of `scale`: only its span matters, and iterating squares its size past what floats hold.

    `scale` is the operand's, so that the product with the weight comes out near 1 too.
    """
    low, high = torch.aminmax(Y)
    Y = Y.div_(torch.maximum(high, -low).clamp_min(torch.finfo(Y.dtype).tiny))
    return Y if scale == 1.0 else Y.mul_(scale)
