"""Round the two factors of a split to few bits so that each step is fitted to what the steps before it have made.

    left, right  -->  left T, T^T right         T orthogonal: every row of `right` gets a like share of the response
    right        -->  rounded, each error compensated by the inputs that follow (`rounding`)
    left         -->  least squares for the rounded `right`:   left + (K - left G)(G + s I)^-1
    left         -->  rounded, compensated by the moments G of what the rounded `right` makes

    G = right (xx + l I) right^T     K = (yx + l W) right^T

All moments are centred: the bias corrects what rounding does to the mean. The rounded factors lie on a grid that
rounding finds again, so that lowering stores these very numbers.

Without T the components of the response are uncorrelated and of very different sizes. The errors of one could not
compensate those of another, and all would share one step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import ridge_level
from rsi_deploy.calibration.rounding import rounded_weight

SHRINKAGE = 1e-4
"""Ridge s of the refit towards the unrounded `left`, in mean variances of what `right` makes."""

NormalEquations = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function from `right` to G and K."""


def rounded_factors(
    left: Tensor, right: Tensor, second: Tensor, normal: NormalEquations, *, is_product: bool, bits: int
) -> tuple[Tensor, Tensor]:
    """Return the factors on the grid of so few bits, in the dtype of `right`.

    Args:
        left: `(groups, out * points, rank)`.
        right: `(groups, rank, in)`.
        second: moments of the inputs of `right`, `(groups, in, in)`.
        normal: the regression of the response on what `right` makes at all points: G `(groups, points * rank,
            points * rank)` and K `(groups, out, points * rank)`.
        is_product: see `rounded_weight`.
        bits: key of `CODES`.
    """

    def on_grid(weight: Tensor, moments: Tensor) -> Tensor:
        near = rounded_weight(weight.float(), moments, is_product=is_product, bits=bits).weight()
        return near.reshape(weight.shape).to(right.dtype)

    T = cosines(right.shape[-2]).to(right)
    right = on_grid(T.mT @ right, second)
    gram, cross = normal(right)
    fitted = refit((left @ T).reshape(cross.shape), gram, cross)
    return on_grid(fitted, gram).reshape(left.shape), right


def refit(left: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """Return the left factor of least squares for normal equations G, K; no worse than `left` for any ridge."""
    variances = gram.diagonal(dim1=-2, dim2=-1)
    regular = gram + torch.diag_embed(ridge_level(variances, SHRINKAGE).expand(variances.shape))
    step: Tensor = torch.linalg.solve(regular, (cross - left @ gram).mT).mT
    return left + step


def normal_equations(weight: Tensor, moments: Moments | Samples, right: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return G and K of a plain form.

    Args:
        weight: W `(groups, out, in)`.
        moments: moments of the site.
        right: `(groups, rank, in)`.
        ridge: ridge l towards the weight, in mean input variances.
    """
    moments = moments.stabilized(weight)
    if isinstance(moments, Samples):
        x, y = moments.x - moments.mean_x.unsqueeze(-2), moments.y - moments.mean_y.unsqueeze(-2)
        z, variances = x @ right.mT, x.square().mean(dim=-2)
        gram, cross = z.mT @ z / len(x[0]), y.mT @ z / len(x[0])
    else:
        variances = moments.xx.diagonal(dim1=-2, dim2=-1)
        gram, cross = right @ moments.xx @ right.mT, moments.yx @ right.mT
    level = ridge_level(variances, ridge)[..., None]
    return gram + level * (right @ right.mT), cross + level * (weight.to(right) @ right.mT)


def cosines(rank: int) -> Tensor:
    """Return the orthogonal matrix `(rank, rank)` of the discrete cosine transform (II), a frequency a row."""
    at = torch.arange(rank, dtype=torch.float64)
    T = math.sqrt(2 / rank) * torch.cos(math.pi / rank * at[:, None] * (at + 0.5))
    T[0] /= math.sqrt(2)
    return T
