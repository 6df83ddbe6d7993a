"""The Chebyshev route: fewer iterations, each with the end of the unwanted spectrum shifted to where it grows least.

    A = W W^T  (W^T W for a tall weight),   B = basis(W Z), Z the sketch;   then   B = basis((A - c_j) B)

Plain iteration multiplies the directions beside the least wanted one by `s^2`, hardly less than that one. A polynomial
`p` in `A` with its zeros among the unwanted eigenvalues `[0, e]`, at Chebyshev's places, is as small on all of them and
grows fastest above (Zhou, Saad, Tiago and Chelikowsky 2006, "Chebyshev-filtered subspace iteration", and, with a single
shift, Feng, Yu, Xie and Tang 2024, dashSVD). Here `s p(s^2)` is like `T_{2d-1}(s / sqrt(e))` for `d` iterations:

    c_j = cos^2((2j - 1) pi / (4 d - 2)) e,  smallest first, the first of them 0;   e = MARGIN (least |W^T b|^2, b in B)

The least Rayleigh quotient of a basis that has been iterated once is within a fifth of the first eigenvalue beyond it,
and `e` may be 40 % too small at little loss, and hardly too large: hence the margin, and no shift before that.
Measured on slow to fast spectra, `d` iterations do at least what `2 (d - 1)` plain ones do: 3 for q = 4, 5 for 8.

Everything lives on the shorter side. For a tall weight `left @ right = W V V^T`, as good as `X X^T W` by symmetry:
`W V = X R` gives `left = X`, `right = R V^T`.

In bfloat16 four roundings could harm. With `u = 2^-9/sqrt(3)`, the root mean square of a relative rounding:

    of the weight   |E|_2 ~ u (largest row norm + largest column norm) tilts the span by |E| / s_k
    of the last B   u s_j in its column j, which no later product damps
    of the first B  as large as the distance of its columns from depending on each other: hides the last directions
    of a basis      u / sqrt(m) along each leading direction comes out of two products (s_1/s_k)^2 times larger beside
                    the last one, and the rounding of that covers it

The first two add to the residual like independent noise, so a tilt of 0.1 costs half a percent. Columns for which the
second is too large are made in float32, and columns that the fourth lets pass `COVERED` are taken out of the others
between the two products. Where the third is, a few directions outweigh the others: they are found in float32 and
multiplied in it (`Leading`), and only the rest of the weight is rounded, which makes all four smaller; where the third
is too large even so, the first block is made in float32. Where the first or the fourth is, the iteration starts anew in
float32. Bases are made in float32, and rounded.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsi_deploy.kernel.orthogonal import TOLD, basis_and_triangle_, deflate_, near_basis_, orthonormal_, rough_basis_
from rsi_deploy.kernel.products import Operand

Draw = Callable[[int], Tensor]
MARGIN = 0.75
ROUNDING = 2.0**-9 / 3**0.5
TILT = 0.1
COVERED = 0.01
# With a leading part apart: how much of the last column a rounding may cover, and how much smaller than in the rest the
# singular values of the leading part count there, being multiplied in float32.
COVERS, DEEP = 0.5, 0.04
# Columns of the leading part: at least, and one in so many.
LEAST, PART = 8, 16


@dataclass(frozen=True, kw_only=True)
class Leading:
    """A few directions in which the weight is large, kept in the working precision while the rest of it is rounded.

    With `W = first image^T + W'` on the shorter side and `Z = W'^T B`:

        W W^T B = W' Z + first (gram C + image^T Z) + cross C,   C = first^T B

    Attributes:
        first: `(shorter, few)`, orthonormal.
        image: `(longer, few)`, `W^T first`.
        gram: `(few, few)`, `image^T image`.
        cross: `(shorter, few)`, `W' image`: nothing, were `first` singular vectors.
    """

    first: Tensor
    image: Tensor
    gram: Tensor
    cross: Tensor

    def without(self, operand: Operand) -> Operand:
        """The operand of `W'`."""
        image = self.image / operand.scale
        return replace(operand, taken=(image, self.first) if operand.tall else (self.first, image))

    def norms(self, B: Tensor) -> Tensor:
        """Of the columns of `image first^T B`."""
        C = self.first.mT @ B.to(self.first.dtype)
        norms: Tensor = torch.linalg.vecdot(C, self.gram @ C, dim=0).clamp_min(0).sqrt()
        return norms

    def image_of(self, B: Tensor, Z: Tensor) -> Tensor:
        """`W W^T B` but for `W' Z`."""
        C = self.first.mT @ B.to(self.first.dtype)
        inner = self.gram @ C + (self.image.to(Z.dtype).mT @ Z).to(C.dtype)
        return (self.first @ inner).addmm_(self.cross, C)


def steps(q: int) -> int:
    """The number of filtered iterations that does what `q` plain ones do.

    Example:
        >>> [steps(q) for q in (1, 2, 3, 4, 6, 8, 16)]
        [1, 2, 3, 3, 4, 5, 9]
    """
    return min(q, math.ceil(q / 2) + 1)


def shifts(d: int) -> list[float]:
    """What `c_j / e` is in each of `d - 1` iterations, ascending, the first 0."""
    return [0.0, *sorted(math.cos((2 * j - 1) * math.pi / (4 * d - 2)) ** 2 for j in range(1, d - 1))][: d - 1]


def chebyshev(operand: Operand, draw: Draw, d: int, *, mixed: bool) -> tuple[Tensor, Tensor]:
    """`X (out, columns)`, orthonormal, and `Y (in, columns)` with `W ~ X Y^T` after `d` iterations."""
    return iterate(operand, draw, shifts(d), mixed=mixed)


def iterate(operand: Operand, draw: Draw, fractions: list[float], *, mixed: bool) -> tuple[Tensor, Tensor]:
    """As `chebyshev`, with the shifts of all iterations as fractions of `e`.

    Args:
        operand: the weight.
        draw: makes a sketch `(side, columns)` in the working precision, here of the longer side, the same each time.
        fractions: one for each iteration after the first product.
        mixed: bfloat16 where it does no harm.
    """
    found = _low(operand, draw, fractions) if mixed and fractions else None
    if found is None:
        operand.forget()
        found = _exact(operand, draw, fractions)
    operand.forget()
    return finished(operand, found)


def finished(operand: Operand, B: Tensor) -> tuple[Tensor, Tensor]:
    """`X (out, columns)`, orthonormal, and `Y (in, columns)` from a block `(shorter side, columns)`, used up."""
    B = orthonormal_(B)
    if not operand.tall:
        return B, operand.adjoint(B)
    X, R = basis_and_triangle_(operand.forward(B))
    return X, B @ R.mT


def _exact(operand: Operand, draw: Draw, fractions: list[float]) -> Tensor:
    """A block `(shorter side, columns)`, not yet orthonormal, in the working precision."""
    B = operand.to_short(draw(operand.longer))
    for fraction in fractions:
        B = near_basis_(B)
        Z = operand.to_long(B)
        shift = fraction * MARGIN * float(column_norms(Z).min()) ** 2
        B = operand.to_short(Z).sub_(B, alpha=shift)
    return B


def _low(operand: Operand, draw: Draw, fractions: list[float]) -> Tensor | None:
    """The same, of products in bfloat16; None where they would do harm."""
    low = torch.bfloat16
    B, told, noise = _begun(operand, draw)
    leading, rest = None, operand
    if told < TOLD:
        leading = _leading(operand, draw, fractions, max(LEAST, B.shape[1] // PART))
        rest = leading.without(operand)
        B, told, noise = _begun(rest, draw, leading)
    if told < TOLD:
        B = near_basis_(operand.to_short(draw(operand.longer)))
    B = B.to(low)
    for index, fraction in enumerate(fractions):
        B = rough_basis_(B)[0].to(low) if index else B
        Z = rest.low_to_long(B)
        among = column_norms(Z)
        norms = among if leading is None else torch.hypot(among, leading.norms(B))
        least = float(norms.min())
        if index < 2 and not noise <= TILT * least:  # the first `least` is too large, so this may show only later
            return None
        if leading is None:
            Z = deflate_(Z, covering(among, least, ROUNDING, len(B)))
        elif not _may_cover(among, norms, len(B)):
            return None
        shift = fraction * MARGIN * least**2
        exact = None if leading is None else leading.image_of(B, Z)
        image = rest.low_to_short(Z)
        del Z  # before the next one is made
        image = image if exact is None else exact.add_(image)
        if index < len(fractions) - 1:
            B = image.sub_(B, alpha=shift)
            del image, exact
    found = image.to(operand.working).sub_(B, alpha=shift)
    large = (ROUNDING * among > TILT / 2 * least).nonzero()[:, 0]
    if len(large):
        some = B[:, large].to(operand.working)
        found[:, large] = operand.to_short(operand.to_long(some)).sub_(some, alpha=shift)
    return found


def _may_cover(among: Tensor, norms: Tensor, length: int) -> bool:
    """Whether what roundings of a basis bring up stays small: of the rest in bfloat16, and of all in float32."""
    most = norms.min() * (COVERS * length**0.5 / ROUNDING) ** 0.5
    return bool((among.max() <= most) & (DEEP * norms.max() <= most))


def _begun(operand: Operand, draw: Draw, leading: Leading | None = None) -> tuple[Tensor, float, float]:
    """A first basis, how well its columns are told apart, and about the 2-norm of the weight's rounding."""
    Z = draw(operand.longer)
    exact = None if leading is None else leading.first @ (leading.image.mT @ Z)
    Z = Z.to(torch.bfloat16)
    B = operand.low_to_short(Z)
    noise = operand.rounding(ROUNDING, B, Z)
    del Z
    if exact is None:
        return *rough_basis_(B, passes=0), noise
    exact.add_(B)
    _, told = rough_basis_(B, passes=0)
    return near_basis_(exact), told, noise


def _leading(operand: Operand, draw: Draw, fractions: list[float], count: int) -> Leading:
    """The part of the weight in about its first singular vectors, found in the working precision."""
    operand.forget()
    first = orthonormal_(_exact(operand, lambda side: draw(side)[:, :count].contiguous(), fractions))
    image = operand.to_long(first)
    gram = image.mT @ image
    cross = operand.to_short(image.clone()).sub_(first @ gram)
    return Leading(first=first, image=image, gram=gram, cross=cross)


def covering(norms: Tensor, least: float, rounding: float, length: int) -> Tensor:
    """Which columns, after two products, would lie in the rounding of the last too deep: indices, ascending.

    Args:
        norms: `(columns,)`, about the singular values that the columns stand for.
        least: about the least singular value in the block.
        rounding: root mean square of a relative rounding.
        length: of a column.
    """
    limit = (COVERED * length**0.5 / rounding) ** 0.5
    found: Tensor = (norms > limit * least).nonzero()[:, 0]
    return found


def column_norms(Z: Tensor) -> Tensor:
    """Of the columns, `(columns,)`, float32 or the dtype of `Z`."""
    dtype = torch.float64 if Z.dtype == torch.float64 else torch.float32
    norms: Tensor = torch.linalg.vector_norm(Z, dim=0, dtype=dtype)
    return norms
