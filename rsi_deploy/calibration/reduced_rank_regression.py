"""Factors that keep a site's response on calibration data, instead of its weight.

With the centred moments of `rsi_deploy.calibration.moments`, a ridge `r = ridge * mean(diag(xx))`, and a larger one,
`l`, towards the weight for the regression, which is what few rows are too few for:

    M = (yx + l W)(xx + l I)^-1             the best full-rank answer (sequential response regression)
    A = M (xx + r I)^1/2                    its response, in a metric where errors count as on the data
    left = U_k of A by RSI,  right = left^T M
    bias = E y - left right E x             the change of the bias

In the dense network `yx = W xx`, hence `M = W`: response-aware RSI. Rank k leaves `|A - left left^T A|_F^2` of the
response, so one spectrum of A tells the response error of every rank: the least one there is, in the metric of the
ridge, which adds at most `r |W - left right|_F^2` to what `response_error` finds on the data.

Where it is known what errors of y do to the outputs, `E e^T G e` counts and not `E e^T e`. With `G = S S^T`:

    left = S^-T U_k,  right = U_k^T S^T M       U_k of S^T A

so M stays what it is, and the rank is spent on the directions of y that what comes after listens to.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.linalg.solver import Solver

RIDGE = 1e-2
EXACT_LIMIT = 1024
METRIC_FLOOR = 0.1
"""Share of a metric that counts all directions alike: it comes from few samples, and what moves nothing there may
elsewhere. On held-out texts 0.1 and 0.02 did the same for a sentence encoder."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a site should become, before a rank is chosen; one dtype, float64 or float32.

    Attributes:
        target: `M (groups, out, in)`.
        whitened: `A (groups, out, m)`, whose left singular vectors are looked for.
        floor: the response error of M itself, times `variance`.
        variance: total variance of the response.
        mean_x: `(groups, in)`.
        mean_y: `(groups, out)`.
        metric: G `(groups, out, out)`, what errors of the response cost, of any scale; None for the identity.
    """

    target: Tensor
    whitened: Tensor
    floor: float
    variance: float
    mean_x: Tensor
    mean_y: Tensor
    metric: Tensor | None = None

    def errors(self) -> Tensor:
        """Response error at ranks 0 (nothing but the bias) to full rank, relative, float64 `(full rank + 1,)`.

        As `factors` with exact singular vectors leave it, errors where the data say nothing counted by the ridge; in
        the metric, where there is one.
        """
        A = self.whitened.double()
        if self.metric is not None:
            A = metric_root(self.metric).to(A).mT @ A
        gram = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
        energy = torch.linalg.eigvalsh(gram).clamp_min(0).sum(dim=0).cpu()  # ascending, groups added up
        tails = torch.cat([energy.new_zeros(1), energy.cumsum(0)]).flip(0)[: min(self.target.shape[-2:]) + 1]
        floor = self.floor / max(self.variance, 1e-300)
        if self.metric is None:
            return tails / max(self.variance, 1e-300) + floor
        return tails / max(float(tails[0]), 1e-300) + floor

    def factors(self, rank: int, solver: Solver, *, site: str = "") -> tuple[Tensor, Tensor]:
        """`left (groups, out, rank)` and `right (groups, rank, in)`, in the dtype of `target`."""
        if self.metric is None:
            left = leading(self.whitened, rank, solver, site=site)
            return left, left.mT @ self.target
        S = metric_root(self.metric).to(self.target)
        U = leading(S.mT @ self.whitened, rank, solver, site=site)
        return torch.linalg.solve_triangular(S.mT, U, upper=True), U.mT @ (S.mT @ self.target)

    def bias(self, product: Tensor) -> Tensor:
        """What a site with the weight `product (groups, out, in)` must add to its bias, `(groups, out)`."""
        return self.mean_y - (product @ self.mean_x.unsqueeze(-1)).squeeze(-1)


def respond(
    weight: Tensor,
    moments: Moments | Samples,
    *,
    ridge: float = RIDGE,
    held: float = 0.0,
    metric: Tensor | None = None,
) -> Response:
    """The response problem of a site with `weight (groups, out, in)`.

    Args:
        weight: floating, any precision.
        moments: as gathered.
        ridge: what errors count where the data say little; in mean input variances.
        held: how much more strongly than that the regression is held to the weight; in the same unit.
        metric: what errors of the response cost, see `Response`.
    """
    moments = moments.steadied(weight)
    if isinstance(moments, Samples):
        return replace(_from_samples(weight, moments, ridge, held), metric=metric)
    xx, yx = moments.xx, moments.yx
    W = weight.to(xx.dtype)
    variances = xx.diagonal(dim1=-2, dim2=-1)
    root, level = held_root(xx, ridge_level(variances, ridge + held))
    M = torch.cholesky_solve((yx + level[..., None] * W).mT, root).mT
    if held:
        root, _ = held_root(xx, ridge_level(variances, ridge))
    # E|y - M x|^2 = yy - 2 <M, yx> + <M xx, M>
    floor = moments.yy.sum() - 2 * (M * yx).sum() + ((M @ xx) * M).sum()
    return Response(
        target=M,
        whitened=M @ root,
        floor=max(float(floor), 0.0),
        variance=float(moments.yy.sum()),
        mean_x=moments.mean_x,
        mean_y=moments.mean_y,
        metric=metric,
    )


def metric_root(metric: Tensor) -> Tensor:
    """S `(groups, out, out)`, float64, lower triangular: `S S^T` is the metric of mean eigenvalue 1, floor added.

    Args:
        metric: `(groups, out, out)`, symmetric, positive but for rounding; of zeros where nothing is known: the
            identity then.
    """
    metric = metric.double()
    size = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    eye = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    share = torch.where(size > 0, metric / size.clamp_min(torch.finfo(size.dtype).tiny), eye)
    root: Tensor = torch.linalg.cholesky(METRIC_FLOOR * eye + (1 - METRIC_FLOOR) * share)
    return root


def response_error(product: Tensor, moments: Moments | Samples) -> float:
    """`E|y - product x|^2 / E|y|^2`, centred, of a site that became `product (groups, out, in)`."""
    if isinstance(moments, Samples):
        x, y = moments.x - moments.x.mean(dim=-2, keepdim=True), moments.y - moments.y.mean(dim=-2, keepdim=True)
        return float((y - x @ product.to(x.dtype).mT).square().sum() / y.square().sum().clamp_min(1e-30))
    T = product.to(moments.xx.dtype)
    error = moments.yy.sum() - 2 * (T * moments.yx).sum() + ((T @ moments.xx) * T).sum()
    return max(float(error / moments.yy.sum().clamp_min(1e-300)), 0.0)


def lost_response(weight: Tensor, product: Tensor, moments: Moments | Samples, metric: Tensor | None = None) -> float:
    """`response_error` in the dense network, where `y = W x`, in a metric.

    Args:
        weight: W `(groups, out, in)`.
        product: what it became.
        moments: of the dense network.
        metric: what errors of the response cost; None for the identity.
    """

    def size(T: Tensor) -> float:
        T = T if metric is None else metric_root(metric).to(T).mT @ T
        if isinstance(moments, Samples):
            x = moments.x - moments.x.mean(dim=-2, keepdim=True)
            return float((x @ T.mT).square().sum())
        return float(((T @ moments.xx) * T).sum())

    dtype = moments.x.dtype if isinstance(moments, Samples) else moments.xx.dtype
    W = weight.to(dtype)
    return max(size(W - product.to(dtype)) / max(size(W), 1e-300), 0.0)


def _from_samples(weight: Tensor, samples: Samples, ridge: float, held: float) -> Response:
    """The same through the rows: `M = W + (Y - X W^T)^T X (X X^T + n l I)^-1`, never an `(in, in)` matrix."""
    mean_x, mean_y = samples.x.mean(dim=-2), samples.y.mean(dim=-2)
    X, Y, W = samples.x - mean_x.unsqueeze(-2), samples.y - mean_y.unsqueeze(-2), weight.float()
    rows = samples.rows
    variances = X.square().mean(dim=-2)
    level = ridge_level(variances, ridge)  # (groups, 1)
    gram = (X @ X.mT).double()
    root, _ = held_root(gram, rows * ridge_level(variances, ridge + held).double())
    M = W + torch.cholesky_solve((Y - X @ W.mT).double(), root).float().mT @ X
    Z = X @ M.mT
    return Response(
        target=M,
        whitened=torch.cat([Z.mT / rows**0.5, level.sqrt()[..., None] * M], dim=-1),
        floor=float((Y - Z).square().sum()) / rows,
        variance=float(Y.square().sum()) / rows,
        mean_x=mean_x,
        mean_y=mean_y,
    )


def held_root(gram: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of `gram + level I`, and the level `(groups, 1)`: raised where rounding makes it fail.

    Args:
        gram: `(groups, n, n)`, symmetric, positive but for rounding.
        level: `(groups, 1)`, above zero.
    """
    most = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1, keepdim=True)
    level = torch.maximum(level, torch.finfo(gram.dtype).eps * most)
    for _ in range(8):
        held = gram + torch.diag_embed(level.expand(gram.shape[:-1]))
        root, failed = torch.linalg.cholesky_ex(held)
        if not failed.any():
            break
        level = torch.where(failed[:, None] > 0, 10 * level, level)
    else:
        raise ValueError("the moments of its inputs are no moments: not positive")
    return root, level


def ridge_level(variances: Tensor, ridge: float) -> Tensor:
    """The ridge in units of the inputs' mean variance, `(groups, 1)`; above zero even for constant inputs."""
    mean = variances.mean(dim=-1, keepdim=True)
    return (ridge * mean).clamp_min(torch.finfo(mean.dtype).tiny ** 0.5)


def leading(matrix: Tensor, rank: int, solver: Solver, *, site: str = "") -> Tensor:
    """Orthonormal `(groups, out, rank)` that span the leading left singular vectors of `matrix (groups, out, m)`.

    Up to `EXACT_LIMIT` rows from the exact eigenvectors of `matrix matrix^T`, which the moments have made small; above
    it by RSI.
    """
    if matrix.shape[-2] > EXACT_LIMIT:
        return solver(matrix, rank, site=site).left
    A = matrix.double()
    vectors: Tensor = torch.linalg.eigh(A @ A.mT).eigenvectors
    return vectors[..., -rank:].flip(-1).to(matrix.dtype).contiguous()
