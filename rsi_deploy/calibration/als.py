"""Factors of a Conv in the forms whose second node has a kernel too: input (1x1, then k x k) and separable (kx1, 1xk).

Such a Conv is a sum over the points j of the second node's kernel, each seeing the first node's output elsewhere:

    y = sum_j left_j right x_j        left_j (out, rank)    right (rank, m)    x_j (m)

with x_j the part of the patch that the first node reads to make the output at point j. The best product for the weight
is one SVD of the unfolded weight; the best for the response is not, because the x_j of one patch are correlated. Given
`right`, `left` is a linear regression; given `left`, `right` is one too (normal equations by conjugate gradients). The
two alternate from the response-aware start, and no step makes the response error larger. Where errors of y count by a
metric `S S^T`, all of this is done for `S^T y`. Moments as in `rsi_deploy.calibration.moments`, of whole patches; all
in the columns' order of `graph_passes.unfold(weight, "channel")`.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite, Replacement
from rsi_deploy.calibration.moments import Moments
from rsi_deploy.calibration.reduced_rank_regression import (
    EXACT_LIMIT,
    RIDGE,
    held_root,
    leading,
    metric_root,
    ridge_level,
)
from rsi_deploy.linalg.solver import Solver

STEPS = 4
GRADIENT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class TwoKernels:
    """The response problem of a Conv in such a form, its columns sorted by the second kernel's points.

    Attributes:
        kernel: of the Conv.
        first: how many of its axes belong to the first node (0: input, 1 of 2: separable).
        blocks: xx of each pair of points, ridge added: `(groups, points j, points k, m of k, m of j)`, contiguous, so
            that every product of an iteration is one matrix product.
        yx: `(groups, out, points, m)`, ridge added.
        moments: as gathered, for means and errors.
        target: the unrestricted answer, unfolded: `(groups, out * points, m)`.
        root: Cholesky factor of the mean over the points of xx, `(groups, m, m)`.
        outer: S `(groups, out, out)`, lower, where `S S^T` is what errors of the response cost; None for the identity.
            `yx` and `target` are those of `S^T y` then.
    """

    kernel: tuple[int, ...]
    first: int
    blocks: Tensor
    yx: Tensor
    moments: Moments
    target: Tensor
    root: Tensor
    outer: Tensor | None = None

    @property
    def points(self) -> int:
        """Points of the second node's kernel."""
        return self.blocks.shape[1]

    @property
    def xx(self) -> Tensor:
        """The same as `(groups, points, m, points, m)`."""
        return self.blocks.permute(0, 1, 4, 2, 3)

    def start(self, rank: int, solver: Solver, *, site: str = "") -> Tensor:
        """`right (groups, rank, m)` that is best if the x_j were independent."""
        if self.target.shape[-2] > EXACT_LIMIT:
            left = leading(self.whitened, rank, solver, site=site)
        else:
            left = self._basis[..., :rank]
        return left.mT @ self.target

    @property
    def whitened(self) -> Tensor:
        """Whose leading left singular vectors the start keeps, `(groups, out * points, m)`."""
        return self.target @ self.root

    @property
    def _flat(self) -> Tensor:
        """`(groups, points * points * m, m)`."""
        return self.blocks.flatten(1, 3)

    @functools.cached_property
    def _basis(self) -> Tensor:
        """All of the start's left singular vectors, leading first: one decomposition serves every rank."""
        return leading(self.whitened, self.target.shape[-2], Solver())

    def left_for(self, right: Tensor) -> Tensor:
        """The best `left (groups, out, points, rank)` for a given `right`."""
        groups, out, points, _ = self.yx.shape
        rank = right.shape[-2]
        half = self._flat @ right.mT  # (groups, points * points * m, rank)
        gram = half.reshape(groups, points * points, -1, rank).mT @ right.mT.unsqueeze(1)
        gram = gram.reshape(groups, points, points, rank, rank).transpose(2, 3)
        gram = gram.reshape(groups, points * rank, points * rank)
        gram = (gram + gram.mT) / 2
        # `right` may have fewer directions than rows; what is added must not outweigh its shortest row.
        held = torch.finfo(gram.dtype).eps ** 0.75 * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        gram.diagonal(dim1=-2, dim2=-1).add_(held.clamp_min(torch.finfo(gram.dtype).tiny))
        cross = (self.yx @ right.mT.unsqueeze(1)).reshape(groups, out, points * rank)
        solved = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(gram)).mT
        return solved.reshape(groups, out, points, rank)

    def right_for(self, left: Tensor, right: Tensor, steps: int = GRADIENT_STEPS) -> Tensor:
        """A better `right (groups, rank, m)` for a given `left`, from `right`: conjugate gradients."""
        groups, out, points, rank = left.shape
        flat = left.reshape(groups, out, points * rank)
        weights = (flat.mT @ flat).reshape(groups, points, rank, points, rank).transpose(1, 2)
        weights = weights.reshape(groups, rank * points * points, rank)
        goal = left.reshape(groups, out * points, rank).mT @ self.yx.reshape(groups, out * points, -1)

        def normal(R: Tensor) -> Tensor:
            return (weights @ R).reshape(groups, rank, -1) @ self._flat

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum(dim=(-2, -1), keepdim=True)

        R, residual = right, goal - normal(right)
        direction, size = residual, dot(residual, residual)
        enough = 1e-24 * dot(goal, goal)
        tiny = torch.finfo(size.dtype).tiny
        for _ in range(steps):
            image = normal(direction)
            step = torch.where(size > enough, size / dot(direction, image).clamp_min(tiny), 0)
            R, residual = R + step * direction, residual - step * image
            size, before = dot(residual, residual), size
            if bool((size <= enough).all()):
                break
            direction = residual + size / before.clamp_min(tiny) * direction
        return R

    def factors(self, rank: int, solver: Solver, *, site: str = "", steps: int = STEPS) -> tuple[Tensor, Tensor]:
        """`left (groups, out * points, rank)`, `right (groups, rank, m)`, as `graph_passes.Factors` wants them."""
        right = self.start(rank, solver, site=site)
        left = self.left_for(right)
        for _ in range(steps - 1):
            right = self.right_for(left, right)
            left = self.left_for(right)
        groups, out, points, _ = left.shape
        if self.outer is not None:
            flat = left.reshape(groups, out, points * rank)
            left = torch.linalg.solve_triangular(self.outer.mT, flat, upper=True)
        return left.reshape(groups, out * points, rank), right

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """The Conv's weight that two factors amount to, `(groups, out, in * prod(kernel))` in the channel order."""
        groups, rows, _ = left.shape
        unfolded = (left @ right).reshape(groups, rows // self.points, self.points, -1)
        return _folded(unfolded, self.kernel, self.first)


def two_kernels(
    weight: Tensor,
    moments: Moments,
    kernel: tuple[int, ...],
    first: int,
    *,
    ridge: float = RIDGE,
    metric: Tensor | None = None,
) -> TwoKernels:
    """The response problem of a Conv with a kernel in its second node.

    Args:
        weight: `(groups, out, in * prod(kernel))`.
        moments: of whole patches, in the same order of columns.
        kernel: of the Conv.
        first: how many of the kernel's axes the first node takes.
        ridge: as for `response.respond`.
        metric: the same.
    """
    groups, out, columns = weight.shape
    order = _by_point(columns, kernel, first)
    points = math.prod(kernel[first:])
    m = columns // points
    level = ridge_level(moments.xx.diagonal(dim1=-2, dim2=-1), ridge)
    root, level = held_root(moments.xx, level)
    yx = moments.steadied(weight).yx + level[..., None] * weight.to(moments.xx.dtype)
    outer = None if metric is None else metric_root(metric).to(yx)
    if outer is not None:
        yx = outer.mT @ yx
    target = torch.cholesky_solve(yx.mT, root).mT
    del root
    of_point = order.reshape(points, m)
    blocks = moments.xx[:, of_point[:, None, None, :], of_point[None, :, :, None]]
    own = blocks.diagonal(dim1=1, dim2=2)  # (groups, m, m, points)
    own.diagonal(dim1=1, dim2=2).add_(level[..., None])
    mean = own.mean(dim=-1).mT
    return TwoKernels(
        kernel=kernel,
        first=first,
        blocks=blocks,
        yx=yx[..., order].reshape(groups, out, points, m),
        moments=moments,
        target=target[..., order].reshape(groups, out * points, m),
        root=held_root(mean, level)[0],
        outer=outer,
    )


def product_of(site: CalibratedSite, replacement: Replacement) -> Tensor:
    """The weight that a site's replacement amounts to, `(groups, out, in)`."""
    product, first = replacement.left @ replacement.right, site.first_axes(replacement.form)
    if first == len(site.kernel):
        return product
    points = math.prod(site.kernel[first:])
    unfolded = product.reshape(site.groups, site.out_features, points, site.in_features // points)
    return _folded(unfolded, site.kernel, first)


def _by_point(columns: int, kernel: tuple[int, ...], first: int) -> Tensor:
    """Positions of the columns `(in, *kernel)`, sorted to `(*second kernel, in, *first kernel)`."""
    axes = len(kernel)
    grid = torch.arange(columns).reshape(-1, *kernel)
    return grid.permute(*range(1 + first, 1 + axes), 0, *range(1, 1 + first)).reshape(-1)


def _folded(unfolded: Tensor, kernel: tuple[int, ...], first: int) -> Tensor:
    """`(groups, out, points, m)` back to `(groups, out, in * prod(kernel))`."""
    groups, out, points, m = unfolded.shape
    flat = unfolded.reshape(groups, out, points * m)
    return flat[..., torch.argsort(_by_point(points * m, kernel, first)).to(flat.device)]
