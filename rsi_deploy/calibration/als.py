"""Alternating least squares for Conv forms with a kernel in the second node: input (1x1, k x k), separable (kx1, 1xk).

Such a Conv is a sum over the points j of the second kernel, each reading the first node's output at another position:

    y = sum_j left_j right x_j        left_j (out, rank)    right (rank, m)    x_j (m)

where x_j is the part of the patch from which the first node computes its output at point j. The best product for the
weight is one SVD of the unfolded weight. It is not the best for the response, because the x_j of one patch are
correlated. For fixed `right`, `left` is a linear regression; for fixed `left`, `right` is one too, solved by conjugate
gradients on the normal equations. The two alternate from a response-aware start, and no step increases the response
error. If errors of y are weighted by an output sensitivity `S S^T`, the same is done for `S^T y`. The moments are those
of `rsi_deploy.calibration.moments` for whole patches; their columns have the order of the "channel" form.
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
    leading_left_vectors,
    regularized_cholesky,
    ridge_level,
    sensitivity_root,
)
from rsi_deploy.linalg.solver import Solver

STEPS = 4
GRADIENT_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class TwoKernelProblem:
    """The regression problem of a Conv in such a form, with columns sorted by the points of the second kernel.

    Attributes:
        kernel: kernel size of the Conv.
        first: number of kernel axes that belong to the first node (0: input, 1 of 2: separable).
        blocks: xx of each pair of points with the ridge added, `(groups, points j, points k, m of k, m of j)`,
            contiguous, so that every product of an iteration is one matrix product.
        yx: `(groups, out, points, m)` with the ridge added.
        moments: moments of the Conv, for means and errors.
        target: unfolded full-rank solution, `(groups, out * points, m)`.
        root: Cholesky factor of xx averaged over the points, `(groups, m, m)`.
        outer: lower triangular S `(groups, out, out)` with the output sensitivity `S S^T`; None for the identity.
            With S, `yx` and `target` are those of `S^T y`.
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
        """Number of points in the second kernel."""
        return self.blocks.shape[1]

    @property
    def xx(self) -> Tensor:
        """The blocks as `(groups, points, m, points, m)`."""
        return self.blocks.permute(0, 1, 4, 2, 3)

    def start(self, rank: int, solver: Solver, *, site: str = "") -> Tensor:
        """Return the `right (groups, rank, m)` that would be best if the x_j were independent."""
        if self.target.shape[-2] > EXACT_LIMIT:
            left = leading_left_vectors(self.whitened, rank, solver, site=site)
        else:
            left = self._basis[..., :rank]
        return left.mT @ self.target

    @property
    def whitened(self) -> Tensor:
        """The matrix whose leading left singular vectors are the start, `(groups, out * points, m)`."""
        return self.target @ self.root

    @property
    def _flat(self) -> Tensor:
        """The blocks as `(groups, points * points * m, m)`."""
        return self.blocks.flatten(1, 3)

    @functools.cached_property
    def _basis(self) -> Tensor:
        """All left singular vectors of the start, leading first: one decomposition serves every rank."""
        return leading_left_vectors(self.whitened, self.target.shape[-2], Solver())

    def normal(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normal equations of the response on what `right` makes at all points.

        Returns:
            Its moments `(groups, points * rank, points * rank)`, and those of the response and it, `(groups, out,
            points * rank)`.
        """
        gram, cross = self._normal(right)
        return gram, self._unweighted(cross)

    def _normal(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of `S^T y`."""
        groups, out, points, _ = self.yx.shape
        rank = right.shape[-2]
        half = self._flat @ right.mT  # (groups, points * points * m, rank)
        gram = half.reshape(groups, points * points, -1, rank).mT @ right.mT.unsqueeze(1)
        gram = gram.reshape(groups, points, points, rank, rank).transpose(2, 3)
        gram = gram.reshape(groups, points * rank, points * rank)
        cross = (self.yx @ right.mT.unsqueeze(1)).reshape(groups, out, points * rank)
        return (gram + gram.mT) / 2, cross

    def left_for(self, right: Tensor) -> Tensor:
        """Return the best `left (groups, out, points, rank)` for fixed `right`."""
        gram, cross = self._normal(right)
        # The rows of `right` may be linearly dependent. The shift must stay small beside its shortest row.
        shift = torch.finfo(gram.dtype).eps ** 0.75 * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        gram.diagonal(dim1=-2, dim2=-1).add_(shift.clamp_min(torch.finfo(gram.dtype).tiny))
        solved = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(gram)).mT
        return solved.reshape(*self.yx.shape[:3], right.shape[-2])

    def right_for(self, left: Tensor, right: Tensor, steps: int = GRADIENT_STEPS) -> Tensor:
        """Improve `right (groups, rank, m)` for fixed `left` by conjugate gradients."""
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

    def factors(
        self,
        rank: int,
        solver: Solver,
        *,
        site: str = "",
        steps: int = STEPS,
        gradient_steps: int = GRADIENT_STEPS,
    ) -> tuple[Tensor, Tensor]:
        """Return `left (groups, out * points, rank)`, `right (groups, rank, m)`, as in `graph_passes.SplitFactors`."""
        right = self.start(rank, solver, site=site)
        left = self.left_for(right)
        for _ in range(steps - 1):
            right = self.right_for(left, right, gradient_steps)
            left = self.left_for(right)
        groups, out, points, _ = left.shape
        return self._unweighted(left.flatten(2)).reshape(groups, out * points, rank), right

    def _unweighted(self, rows: Tensor) -> Tensor:
        """Return S^-T times the rows, which turns those of `S^T y` into those of y."""
        return rows if self.outer is None else torch.linalg.solve_triangular(self.outer.mT, rows, upper=True)

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the Conv weight that two factors make up, `(groups, out, in * prod(kernel))` in channel order."""
        groups, rows, _ = left.shape
        unfolded = (left @ right).reshape(groups, rows // self.points, self.points, -1)
        return _folded(unfolded, self.kernel, self.first)


def two_kernel_problem(
    weight: Tensor,
    moments: Moments,
    kernel: tuple[int, ...],
    first: int,
    *,
    ridge: float = RIDGE,
    sensitivity: Tensor | None = None,
) -> TwoKernelProblem:
    """Return the regression problem of a Conv with a kernel in its second node.

    Args:
        weight: `(groups, out, in * prod(kernel))`.
        moments: moments of whole patches, with columns in the same order.
        kernel: kernel size of the Conv.
        first: number of kernel axes that belong to the first node.
        ridge: ridge towards the weight, in mean input variances.
        sensitivity: output sensitivity G `(groups, out, out)` of any scale; None for the identity.
    """
    groups, out, columns = weight.shape
    order = _by_point(columns, kernel, first)
    points = math.prod(kernel[first:])
    m = columns // points
    level = ridge_level(moments.xx.diagonal(dim1=-2, dim2=-1), ridge)
    root, level = regularized_cholesky(moments.xx, level)
    yx = moments.stabilized(weight).yx + level[..., None] * weight.to(moments.xx.dtype)
    outer = None if sensitivity is None else sensitivity_root(sensitivity).to(yx)
    if outer is not None:
        yx = outer.mT @ yx
    target = torch.cholesky_solve(yx.mT, root).mT
    del root
    of_point = order.reshape(points, m)
    blocks = moments.xx[:, of_point[:, None, None, :], of_point[None, :, :, None]]
    own = blocks.diagonal(dim1=1, dim2=2)  # (groups, m, m, points)
    own.diagonal(dim1=1, dim2=2).add_(level[..., None])
    mean = own.mean(dim=-1).mT
    return TwoKernelProblem(
        kernel=kernel,
        first=first,
        blocks=blocks,
        yx=yx[..., order].reshape(groups, out, points, m),
        moments=moments,
        target=target[..., order].reshape(groups, out * points, m),
        root=regularized_cholesky(mean, level)[0],
        outer=outer,
    )


def product_of(site: CalibratedSite, replacement: Replacement) -> Tensor:
    """Return the weight that the factors of a replacement make up, `(groups, out, in)`."""
    product, first = replacement.left @ replacement.right, site.first_axes(replacement.form)
    if first == len(site.kernel):
        return product
    points = math.prod(site.kernel[first:])
    unfolded = product.reshape(site.groups, site.out_features, points, site.in_features // points)
    return _folded(unfolded, site.kernel, first)


def _by_point(columns: int, kernel: tuple[int, ...], first: int) -> Tensor:
    """Return the indices that sort columns `(in, *kernel)` to `(*second kernel, in, *first kernel)`."""
    axes = len(kernel)
    grid = torch.arange(columns).reshape(-1, *kernel)
    return grid.permute(*range(1 + first, 1 + axes), 0, *range(1, 1 + first)).reshape(-1)


def _folded(unfolded: Tensor, kernel: tuple[int, ...], first: int) -> Tensor:
    """Fold `(groups, out, points, m)` back to `(groups, out, in * prod(kernel))`."""
    groups, out, points, m = unfolded.shape
    flat = unfolded.reshape(groups, out, points * m)
    return flat[..., torch.argsort(_by_point(points * m, kernel, first)).to(flat.device)]
