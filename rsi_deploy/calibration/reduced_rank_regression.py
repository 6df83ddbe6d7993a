"""Reduced-rank regression: factors that keep a site's response on calibration data instead of its weight.

With the centred moments of `rsi_deploy.calibration.moments`, a ridge `r = ridge * mean(diag(xx))`, and a larger ridge
`l` towards the weight for the regression, which needs more rows than the subspace:

    M = (yx + l W)(xx + l I)^-1             the best full-rank weight (sequential response regression)
    A = M (xx + r I)^1/2                    the response whitened: Frobenius errors of A are response errors
    left = U_k of A by RSI,  right = left^T M
    bias = E y - left right E x             the change of the bias

In the dense network `yx = W xx`, hence `M = W`: response-aware RSI. Rank k leaves `|A - left left^T A|_F^2` of the
response, so one spectrum of A gives the smallest response error of every rank. The ridge adds at most
`r |W - left right|_F^2` to the error that `response_error` measures on the data.

With an output sensitivity `G = S S^T`, the error is `E e^T G e` instead of `E e^T e`:

    left = S^-T U_k,  right = U_k^T S^T M       U_k of S^T A

M is the same, and the rank goes to the directions of y that move the outputs most.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.linalg.solver import Solver

RIDGE = 1e-2
EXACT_LIMIT = 1024
METRIC_FLOOR = 0.1
"""Share of the identity in an output sensitivity, which is estimated from few samples: directions without effect on
these may have one on others. On held-out texts 0.1 and 0.02 did the same for a sentence encoder."""


@dataclass(frozen=True, kw_only=True)
class ResponseProblem:
    """The regression problem of a site before a rank is chosen, in float64 or float32 throughout.

    Attributes:
        target: `M (groups, out, in)`.
        whitened: `A (groups, out, m)`, the matrix whose left singular vectors are computed.
        floor: response error of M itself, times `variance`.
        variance: total variance of the response.
        mean_x: `(groups, in)`.
        mean_y: `(groups, out)`.
        sensitivity: output sensitivity G `(groups, out, out)` of any scale; None for the identity.
    """

    target: Tensor
    whitened: Tensor
    floor: float
    variance: float
    mean_x: Tensor
    mean_y: Tensor
    sensitivity: Tensor | None = None

    def errors(self) -> Tensor:
        """Return the relative response error at rank 0 (bias only) to full rank, float64 `(full rank + 1,)`.

        The errors are those of `factors` with exact singular vectors. They include the ridge and are weighted by the
        sensitivity.
        """
        A = self.whitened.double()
        if self.sensitivity is not None:
            A = sensitivity_root(self.sensitivity).to(A).mT @ A
        gram = A @ A.mT if A.shape[-2] <= A.shape[-1] else A.mT @ A
        energy = torch.linalg.eigvalsh(gram).clamp_min(0).sum(dim=0).cpu()  # ascending, summed over groups
        tails = torch.cat([energy.new_zeros(1), energy.cumsum(0)]).flip(0)[: min(self.target.shape[-2:]) + 1]
        floor = self.floor / max(self.variance, 1e-300)
        if self.sensitivity is None:
            return tails / max(self.variance, 1e-300) + floor
        return tails / max(float(tails[0]), 1e-300) + floor

    def factors(self, rank: int, solver: Solver, *, site: str = "") -> tuple[Tensor, Tensor]:
        """Return `left (groups, out, rank)` and `right (groups, rank, in)` in the dtype of `target`."""
        if self.sensitivity is None:
            left = leading_left_vectors(self.whitened, rank, solver, site=site)
            return left, left.mT @ self.target
        S = sensitivity_root(self.sensitivity).to(self.target)
        U = leading_left_vectors(S.mT @ self.whitened, rank, solver, site=site)
        return torch.linalg.solve_triangular(S.mT, U, upper=True), U.mT @ (S.mT @ self.target)

    def bias(self, product: Tensor) -> Tensor:
        """Return the change of the bias `(groups, out)` for a site with weight `product (groups, out, in)`."""
        return self.mean_y - (product @ self.mean_x.unsqueeze(-1)).squeeze(-1)


def response_problem(
    weight: Tensor,
    moments: Moments | Samples,
    *,
    ridge: float = RIDGE,
    extra_ridge: float = 0.0,
    sensitivity: Tensor | None = None,
) -> ResponseProblem:
    """Return the regression problem of a site.

    Args:
        weight: `(groups, out, in)`, any floating dtype.
        moments: moments of the site.
        ridge: ridge `r` in mean input variances.
        extra_ridge: `l - r` in mean input variances: the additional ridge of the regression towards the weight.
        sensitivity: output sensitivity, see `ResponseProblem`.
    """
    moments = moments.stabilized(weight)
    if isinstance(moments, Samples):
        return replace(_from_samples(weight, moments, ridge, extra_ridge), sensitivity=sensitivity)
    xx, yx = moments.xx, moments.yx
    W = weight.to(xx.dtype)
    variances = xx.diagonal(dim1=-2, dim2=-1)
    root, level = regularized_cholesky(xx, ridge_level(variances, ridge + extra_ridge))
    M = torch.cholesky_solve((yx + level[..., None] * W).mT, root).mT
    if extra_ridge:
        root, _ = regularized_cholesky(xx, ridge_level(variances, ridge))
    # E|y - M x|^2 = yy - 2 <M, yx> + <M xx, M>
    floor = moments.yy.sum() - 2 * (M * yx).sum() + ((M @ xx) * M).sum()
    return ResponseProblem(
        target=M,
        whitened=M @ root,
        floor=max(float(floor), 0.0),
        variance=float(moments.yy.sum()),
        mean_x=moments.mean_x,
        mean_y=moments.mean_y,
        sensitivity=sensitivity,
    )


def sensitivity_root(sensitivity: Tensor) -> Tensor:
    """Return S `(groups, out, out)`, float64, lower triangular: `S S^T` is the sensitivity scaled to mean eigenvalue 1,
    mixed with the identity.

    Args:
        sensitivity: `(groups, out, out)`, symmetric and positive semidefinite up to rounding; zeros for an unknown
            sensitivity, which counts as the identity.
    """
    sensitivity = sensitivity.double()
    size = sensitivity.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    eye = torch.eye(sensitivity.shape[-1], dtype=sensitivity.dtype, device=sensitivity.device)
    share = torch.where(size > 0, sensitivity / size.clamp_min(torch.finfo(size.dtype).tiny), eye)
    root: Tensor = torch.linalg.cholesky(METRIC_FLOOR * eye + (1 - METRIC_FLOOR) * share)
    return root


def response_error(product: Tensor, moments: Moments | Samples) -> float:
    """Return `E|y - product x|^2 / E|y|^2`, centred, for a site with the new weight `product (groups, out, in)`."""
    if isinstance(moments, Samples):
        x, y = moments.x - moments.x.mean(dim=-2, keepdim=True), moments.y - moments.y.mean(dim=-2, keepdim=True)
        return float((y - x @ product.to(x.dtype).mT).square().sum() / y.square().sum().clamp_min(1e-30))
    T = product.to(moments.xx.dtype)
    error = moments.yy.sum() - 2 * (T * moments.yx).sum() + ((T @ moments.xx) * T).sum()
    return max(float(error / moments.yy.sum().clamp_min(1e-300)), 0.0)


def dense_response_error(
    weight: Tensor, product: Tensor, moments: Moments | Samples, sensitivity: Tensor | None = None
) -> float:
    """Return the response error in the dense network, where `y = W x`, weighted by an output sensitivity.

    Args:
        weight: W `(groups, out, in)`.
        product: the new weight, of the same shape.
        moments: moments in the dense network.
        sensitivity: output sensitivity; None for the identity.
    """
    return dense_errors(weight, moments, sensitivity)(product)


def dense_errors(
    weight: Tensor, moments: Moments | Samples, sensitivity: Tensor | None = None
) -> Callable[[Tensor], float]:
    """Return the function from a new weight to its `dense_response_error`."""
    dtype = moments.x.dtype if isinstance(moments, Samples) else moments.xx.dtype
    root = None if sensitivity is None else sensitivity_root(sensitivity).to(dtype)
    W = weight.to(dtype)

    def energy(T: Tensor) -> float:
        return _energy(T if root is None else root.mT @ T, moments)

    size = max(energy(W), 1e-300)
    return lambda product: max(energy(W - product.to(dtype)) / size, 0.0)


def noise_response_error(weight: Tensor, moments: Moments | Samples, sensitivity: Tensor | None = None) -> float:
    """Return the response error in the dense network that white noise of variance 1 on the inputs causes.

    Args:
        weight: W `(groups, out, in)`.
        moments: moments in the dense network.
        sensitivity: output sensitivity; None for the identity.
    """
    W = weight.to(moments.x.dtype if isinstance(moments, Samples) else moments.xx.dtype)
    W = W if sensitivity is None else sensitivity_root(sensitivity).to(W).mT @ W
    return float(W.square().sum()) / max(_energy(W, moments), 1e-300)


def _energy(T: Tensor, moments: Moments | Samples) -> float:
    """Return the mean energy of the responses `T x` of centred inputs."""
    if isinstance(moments, Samples):
        x = moments.x - moments.x.mean(dim=-2, keepdim=True)
        return float((x @ T.mT).square().sum()) / x.shape[-2]
    return float(((T @ moments.xx) * T).sum())


def _from_samples(weight: Tensor, samples: Samples, ridge: float, extra_ridge: float) -> ResponseProblem:
    """Solve through the rows, without an `(in, in)` matrix: `M = W + (Y - X W^T)^T (X X^T + n l I)^-1 X`."""
    mean_x, mean_y = samples.x.mean(dim=-2), samples.y.mean(dim=-2)
    X, Y, W = samples.x - mean_x.unsqueeze(-2), samples.y - mean_y.unsqueeze(-2), weight.float()
    rows = samples.rows
    variances = X.square().mean(dim=-2)
    level = ridge_level(variances, ridge)  # (groups, 1)
    gram = (X @ X.mT).double()
    root, _ = regularized_cholesky(gram, rows * ridge_level(variances, ridge + extra_ridge).double())
    M = W + torch.cholesky_solve((Y - X @ W.mT).double(), root).float().mT @ X
    Z = X @ M.mT
    return ResponseProblem(
        target=M,
        whitened=torch.cat([Z.mT / rows**0.5, level.sqrt()[..., None] * M], dim=-1),
        floor=float((Y - Z).square().sum()) / rows,
        variance=float(Y.square().sum()) / rows,
        mean_x=mean_x,
        mean_y=mean_y,
    )


def regularized_cholesky(gram: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of `gram + level I`, and the level `(groups, 1)`, raised if rounding requires it.

    Args:
        gram: `(groups, n, n)`, symmetric and positive semidefinite up to rounding.
        level: `(groups, 1)`, above zero.
    """
    most = gram.diagonal(dim1=-2, dim2=-1).amax(dim=-1, keepdim=True)
    level = torch.maximum(level, torch.finfo(gram.dtype).eps * most)
    for _ in range(8):
        root, failed = torch.linalg.cholesky_ex(gram + torch.diag_embed(level.expand(gram.shape[:-1])))
        if not failed.any():
            break
        level = torch.where(failed[:, None] > 0, 10 * level, level)
    else:
        raise ValueError("the second moments of its inputs are not positive semidefinite")
    return root, level


def ridge_level(variances: Tensor, ridge: float) -> Tensor:
    """Return `ridge` times the mean variance of the inputs, `(groups, 1)`; above zero even for constant inputs."""
    mean = variances.mean(dim=-1, keepdim=True)
    return (ridge * mean).clamp_min(torch.finfo(mean.dtype).tiny ** 0.5)


def leading_left_vectors(matrix: Tensor, rank: int, solver: Solver, *, site: str = "") -> Tensor:
    """Return an orthonormal basis `(groups, out, rank)` of the leading left singular vectors of `(groups, out, m)`.

    Up to `EXACT_LIMIT` rows they come from an exact eigendecomposition of `matrix matrix^T`, above it from RSI.
    """
    if matrix.shape[-2] > EXACT_LIMIT:
        return solver(matrix, rank, site=site).left
    A = matrix.double()
    vectors: Tensor = torch.linalg.eigh(A @ A.mT).eigenvectors
    return vectors[..., -rank:].flip(-1).to(matrix.dtype).contiguous()
