"""The Chebyshev route: fewer iterations, each shifted so that the unwanted end of the spectrum grows least.

    A = W W^T  (W^T W for a tall weight),   B = basis(W Z), Z the sketch;   then   B = basis((A - c_j) B)

Plain iteration multiplies the directions next to the last wanted one by `s^2`, hardly less than that one. A polynomial
`p` in `A` with Chebyshev zeros among the unwanted eigenvalues `[0, e]` is equally small on all of them and grows
fastest above (Zhou, Saad, Tiago and Chelikowsky 2006, "Chebyshev-filtered subspace iteration", and, with a single
shift, Feng, Yu, Xie and Tang 2024, dashSVD). Here `s p(s^2)` is like `T_{2d-1}(s / sqrt(e))` for `d` iterations:

    c_j = cos^2((2j - 1) pi / (4 d - 2)) e,  smallest first, the first of them 0;   e = MARGIN (least |W^T b|^2, b in B)

The least Rayleigh quotient of a basis after one iteration is within a fifth of the first eigenvalue beyond it. `e` may
be 40 % too small at little loss, but hardly too large; so there is a margin, and no shift before that. Measured on slow
to fast spectra, `d` iterations do at least as well as `2 (d - 1)` plain ones: 3 for q = 4, 5 for 8.

All blocks are on the shorter side. For a tall weight `left @ right = W V V^T`, as good as `X X^T W` by symmetry:
`W V = X R` gives `left = X`, `right = R V^T`.

In bfloat16 four roundings could do harm. With `u = 2^-9/sqrt(3)`, the root mean square of a relative rounding:

    of the weight   |E|_2 ~ u (largest row norm + largest column norm) tilts the span by |E| / s_k
    of the last B   u s_j in its column j, which no later product damps
    of the first B  as large as the distance of its columns from depending on each other: hides the last directions
    of a basis      u / sqrt(m) along each leading direction comes out of two products (s_1/s_k)^2 times larger beside
                    the last one, and the rounding of that covers it

The first two add to the residual like independent noise, so a tilt of 0.1 costs half a percent. If the first is too
large, the iteration continues in float32, which removes a tilt of up to 0.3, or starts again beyond that. Columns for
which the second is too large are computed in float32. If the third is too large, the first block is computed in
float32; if a later block is more than `HIDDEN` too close to dependent columns, the iteration continues in float32,
already with the second block if the first one shows it (the second is closer by `SHRINKS` or more). Columns for which
the fourth exceeds `COVERED` are removed from the others between the two products. Bases are computed in float32 and
then rounded.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rsi_deploy.linalg.operand import Operand
from rsi_deploy.linalg.orthogonal import (
    INDEPENDENT,
    basis_and_triangle_,
    deflate_,
    near_basis_,
    orthonormal_,
    rough_basis_,
)

Draw = Callable[[int], Tensor]
MARGIN = 0.75
ROUNDING = 2.0**-9 / 3**0.5
TILT = 0.1
TURNED = 0.3
HIDDEN = 0.2
SHRINKS = 0.35
COVERED = 0.01
NORM_ROWS = 1024


def steps(q: int) -> int:
    """Return the number of shifted iterations that is as good as `q` plain ones.

    Example:
        >>> [steps(q) for q in (1, 2, 3, 4, 6, 8, 16)]
        [1, 2, 3, 3, 4, 5, 9]
    """
    return min(q, math.ceil(q / 2) + 1)


def shifts(d: int) -> list[float]:
    """Return `c_j / e` for each of `d - 1` iterations, ascending, the first 0."""
    return [0.0, *sorted(math.cos((2 * j - 1) * math.pi / (4 * d - 2)) ** 2 for j in range(1, d - 1))][: d - 1]


def iterate(operand: Operand, draw: Draw, fractions: list[float], *, mixed: bool) -> tuple[Tensor, Tensor]:
    """Compute `X (out, columns)`, orthonormal, and `Y (in, columns)` with `W ~ X Y^T`.

    Args:
        operand: weight.
        draw: returns a sketch `(side, columns)` of the longer side in the working precision, the same each time.
        fractions: shift of each iteration after the first product, as a fraction of `e`; see `shifts`.
        mixed: whether to use bfloat16 where it does no harm.
    """
    found = _low(operand, draw, fractions) if mixed and fractions else None
    operand.forget()
    if found is None:
        found = _exact(operand, operand.to_short(draw(operand.longer)), fractions)
    return orthonormal_result(operand, found)


def orthonormal_result(operand: Operand, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return `X (out, columns)`, orthonormal, and `Y (in, columns)` from a block `(shorter side, columns)`."""
    B = orthonormal_(B)
    if not operand.tall:
        return B, operand.adjoint(B)
    X, R = basis_and_triangle_(operand.forward(B))
    return X, B @ R.mT


def _exact(operand: Operand, B: Tensor, fractions: list[float], *, based: bool = False) -> Tensor:
    """Iterate a block `(shorter side, columns)` in the working precision; the result is not orthonormal yet.

    Overwrites `B`, which is already a basis if `based`.
    """
    for index, fraction in enumerate(fractions):
        B = B if based and not index else near_basis_(B)
        Z = operand.to_long(B)
        shift = fraction * MARGIN * float(column_norms(Z).min()) ** 2
        B = operand.to_short(Z).sub_(B, alpha=shift)
        del Z  # free it before the next one is computed
    return B


def _low(operand: Operand, draw: Draw, fractions: list[float]) -> Tensor | None:
    """Iterate with products in bfloat16; return None where these would do harm."""
    low = torch.bfloat16
    Z = draw(operand.longer).to(low)
    B = operand.low_to_short(Z)
    noise = operand.rounding(ROUNDING, B, Z)
    del Z
    B, independence = rough_basis_(B, passes=0)
    full: Tensor | None = None
    if independence < INDEPENDENT:
        del B  # free it before it is computed again
        full = near_basis_(operand.to_short(draw(operand.longer)))
        B = full.to(low)
    for index, fraction in enumerate(fractions):
        if index:
            B, independence = rough_basis_(B)
            if HIDDEN * independence < ROUNDING:
                return _exact(operand, B.to(operand.working), fractions[index:])
        Z = operand.low_to_long(B)
        norms = column_norms(Z)
        least = float(norms.min())
        if (
            index < 2 and not noise <= TILT * least
        ):  # the first `least` is too large, so check again in the next iteration
            del Z
            if full is not None:
                return _exact(operand, full, fractions, based=True)
            if not index or not noise <= TURNED * least:
                return None
            return _exact(operand, B.to(operand.working), fractions[index:])
        deep = full is not None and HIDDEN * SHRINKS * independence < ROUNDING
        full = None
        Z = deflate_(Z, covering(norms, ROUNDING, len(B)))
        shift = fraction * MARGIN * least**2
        if deep:
            exact = operand.to_short(Z.to(operand.working)).sub_(B.to(operand.working), alpha=shift)
            return _exact(operand, exact, fractions[1:])
        if index < len(fractions) - 1:
            B = operand.low_to_short(Z).sub_(B, alpha=shift)
            del Z  # free it before the next one is computed
    large = (ROUNDING * norms > TILT / 2 * least).nonzero()[:, 0]
    if 2 * len(large) > len(norms):
        return operand.to_short(Z.to(operand.working)).sub_(B.to(operand.working), alpha=shift)
    found = operand.low_to_short(Z).sub_(B, alpha=shift).to(operand.working)
    if len(large):
        some = operand.to_short(Z[:, large].to(operand.working))
        found[:, large] = some.sub_(B[:, large].to(operand.working), alpha=shift)
    return found


def covering(norms: Tensor, rounding: float, length: int) -> int:
    """Return the number of leading columns whose rounding, after two products, would cover the last column.

    Args:
        norms: `(columns,)`, estimates of the singular values of the columns.
        rounding: root mean square of a relative rounding.
        length: length of a column.
    """
    limit = (COVERED * length**0.5 / rounding) ** 0.5
    found = (norms > limit * norms.min()).nonzero()
    return int(found[-1]) + 1 if len(found) else 0


def column_norms(Z: Tensor) -> Tensor:
    """Return the norms of the columns `(columns,)` in float32, or in float64 if `Z` is."""
    dtype = torch.float64 if Z.dtype == torch.float64 else torch.float32
    if Z.device.type != "cpu":
        norms: Tensor = torch.linalg.vector_norm(Z, dim=0, dtype=dtype)
        return norms
    # torch's column norms take ten times as long for a large block, and three times for a small one.
    squares = torch.zeros(Z.shape[1], dtype=dtype)
    for rows in torch.split(Z, NORM_ROWS):
        squares.addmv_((rows.to(dtype, copy=True).square_()).mT, torch.ones(len(rows), dtype=dtype))
    return squares.sqrt_()
