"""Judge what is fitted to calibration data on data that it was not fitted to, from the moments of each fold.

    e = E|y - T x - b|^2 on a fold left out = tr(yy) - 2 <T, yx> + <T xx, T>     about the means of the other folds

Folds part samples and never rows, because the rows of one image or text are correlated. With V = S^T W for an output
sensitivity `G = S S^T`, all factors of the dense response are projections of V, so its errors at every rank follow from
`V xx V^T` of each fold, `(out, out)`:

    U_f = leading eigenvectors of V (xx + r I) V^T on the other folds
    e(k) = sum over f of sum over j > k of u_j^T V xx_f V^T u_j

The regression of a sequential fit, `M(l) = (yx + l W)(xx + l I)^-1`, has two degrees of trust: the ridge l towards the
weight, and the share t of `W + t (M(l) - W)`. Both are chosen by e in the directions that the factors keep. For a given
l, e is a quadratic function of t.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rsi_deploy.calibration.moments import FOLDS, Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import (
    RIDGE,
    regularized_cholesky,
    ridge_level,
    sensitivity_root,
)

RIDGES = (RIDGE, 0.1, 1.0)
"""Ridges of the subspace that are tried where rows are scarce, in mean input variances."""
SCARCE_ROWS = 8
"""Rows for every input below which rows are scarce."""
EXTRA_RIDGES = (0.0, 0.1, 1.0)
"""Extra ridges of the regression towards the weight that are tried, in mean input variances. The share of the
regression makes up for a coarse grid."""
_LARGE = 128
"""Number of inputs or outputs above which two folds are left out to choose or judge, instead of all, one after another.
(In float32 a plan would depend on the number of threads.)"""
_HUGE = 512
"""Number of inputs or outputs above which one fold is."""


@dataclass(frozen=True, kw_only=True)
class ErrorCurve:
    """The held-out response error of a site at every rank.

    Attributes:
        errors: relative errors at rank 0 to full rank, float64 `(full rank + 1,)`.
        ridges: the ridge of the subspace that gives the least error at each rank.
    """

    errors: Tensor
    ridges: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Trust:
    """How far a regression is trusted against the projection of the weight.

    Attributes:
        extra_ridge: extra ridge towards the weight, in mean input variances.
        share: share of the regression, 0 (the projection alone) to 1.
    """

    extra_ridge: float = 0.0
    share: float = 1.0

    def applied(self, moments: Moments, weight: Tensor) -> Moments:
        """Return the moments whose regression is the trusted one, for a weight `(groups, out, in)`; without folds."""
        if self.share == 1.0:
            return replace(moments, folds=())
        plain = weight.to(moments.xx.dtype) @ moments.xx
        return replace(moments, yx=torch.lerp(plain, moments.yx, self.share), folds=())


def has_folds(moments: Moments | Samples) -> bool:
    """Return whether these moments can be parted."""
    return moments.rows > 1 if isinstance(moments, Samples) else len(moments.folds) > 1


def parted(moments: Moments) -> Iterator[tuple[Moments, Moments]]:
    """Yield the moments of all folds but one, and those of that fold about the means of the others."""
    for number, fold in enumerate(moments.folds):
        others = moments.without(number)
        dx, dy = fold.mean_x - others.mean_x, fold.mean_y - others.mean_y
        about = replace(
            fold,
            mean_x=others.mean_x,
            mean_y=others.mean_y,
            xx=fold.xx + dx[..., :, None] * dx[..., None, :],
            yx=fold.yx + dy[..., :, None] * dx[..., None, :],
            yy=fold.yy + dy.square().sum(dim=-1),
        )
        yield others, about


def tried_ridges(moments: Moments) -> tuple[float, ...]:
    """Return the ridges of the subspace that are worth trying: several where rows are scarce."""
    return RIDGES if _is_scarce(moments) else (RIDGE,)


def _is_scarce(moments: Moments) -> bool:
    return moments.rows < SCARCE_ROWS * moments.xx.shape[-1]


class ResponseCurves:
    """The response `S^T W x` of a site to its input, for an output sensitivity `S S^T`, and its leading directions.

    Args:
        weight: W `(groups, out, in)`.
        moments: moments of the site, or rows, whose halves are the folds. Only those of its input are used.
        sensitivity: output sensitivity G `(groups, out, out)`; None for the identity.
    """

    def __init__(self, weight: Tensor, moments: Moments | Samples, sensitivity: Tensor | None = None) -> None:
        V = weight.to(torch.float64 if isinstance(moments, Moments) else torch.float32)
        self._root = None if sensitivity is None else sensitivity_root(sensitivity).to(V)
        V = V if self._root is None else self._root.mT @ V
        self._basis: Tensor | None = None  # orthonormal `(groups, out, in)`, where there are more outputs than inputs
        if V.shape[-2] > V.shape[-1]:
            self._basis, V = torch.linalg.qr(V)
        self._V, self._moments = V, moments

    def held_out_curve(self, ridges: Sequence[float] = (RIDGE,)) -> ErrorCurve:
        """Return the held-out errors of the projections of a dense response `y = W x`; at least two folds are needed.

        Args:
            ridges: ridges of the subspace, in mean input variances. Those of rows are not used.
        """
        if isinstance(self._moments, Samples):
            ridges = ridges[:1]
        judged = self._folds[: _judged_count(len(self._V[0]))]
        tails = torch.zeros(len(ridges), len(self._V[0]) + 1, dtype=torch.float64)
        for number, fold in enumerate(judged):
            others = _Response.joined([part for n, part in enumerate(self._folds) if n != number])
            gram = fold.about(others.mean)
            for index, ridge in enumerate(ridges):
                tails[index] += fold.mass * _tails(gram, self._vectors(others.gram, ridge))
        least, best = (tails / sum(fold.mass for fold in judged)).min(dim=0)
        variance = float(self._total.gram.diagonal(dim1=-2, dim2=-1).sum())
        return ErrorCurve(errors=least / max(variance, 1e-300), ridges=tuple(ridges[n] for n in best.tolist()))

    @functools.cached_property
    def errors(self) -> Tensor:
        """The errors of `projection` on the data, relative, at rank 0 to full rank: float64 `(full rank + 1,)`."""
        tails = _tails(self._total.gram, self._leading)
        return tails / tails[0].clamp_min(1e-300)

    def projection(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return `left (groups, out, rank)` and `right (groups, rank, in)` that keep the leading directions."""
        left, right = self._directions(rank), self._leading[..., -rank:].mT @ self._V
        return left if self._root is None else torch.linalg.solve_triangular(self._root.mT, left, upper=True), right

    def kept(self, rank: int) -> Tensor:
        """Return `U^T S^T (groups, rank, out)` for the leading directions U; S^T at full rank."""
        groups, out = len(self._V), self._V.shape[-2] if self._basis is None else self._basis.shape[-2]
        if rank < out:
            U = self._directions(rank)
            return U.mT if self._root is None else (self._root @ U).mT
        return torch.eye(out).expand(groups, -1, -1) if self._root is None else self._root.mT

    def _directions(self, rank: int) -> Tensor:
        U = self._leading[..., -rank:]
        return U if self._basis is None else self._basis @ U

    @functools.cached_property
    def _leading(self) -> Tensor:
        return self._vectors(self._total.gram, RIDGE)

    @functools.cached_property
    def _folds(self) -> "list[_Response]":
        if isinstance(self._moments, Samples):
            return [_Response.of_rows(self._V, half) for half in self._moments.x.chunk(2, dim=-2)]
        return [_Response.of(self._V, fold) for fold in self._moments.folds]

    @functools.cached_property
    def _total(self) -> "_Response":
        moments = self._moments
        return _Response.joined(self._folds) if isinstance(moments, Samples) else _Response.of(self._V, moments)

    def _vectors(self, gram: Tensor, ridge: float) -> Tensor:
        """Return the directions of a response `(groups, n, n)` in ascending order; rows need no ridge."""
        if isinstance(self._moments, Moments):
            level = ridge_level(self._moments.xx.diagonal(dim1=-2, dim2=-1), ridge).to(gram)
            gram = gram + level[..., None] * (self._V @ self._V.mT)
        vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
        return vectors


def trust_of(weight: Tensor, moments: Moments, rank: int, *, sensitivity: Tensor | None = None) -> Trust:
    """Choose the trust in the regression of a site by its held-out error in the directions that are kept.

    Args:
        weight: W `(groups, out, in)`.
        moments: moments of a sequential fit with at least two folds.
        rank: number of directions of the response that are kept.
        sensitivity: output sensitivity G `(groups, out, out)`; None for the identity.
    """
    kept = ResponseCurves(weight, moments, sensitivity).kept(rank)
    ridges = EXTRA_RIDGES if _is_scarce(moments) else EXTRA_RIDGES[:1]
    slopes, bends = [0.0] * len(ridges), [0.0] * len(ridges)
    for others, fold in judged_folds(moments):
        P, xx = kept.to(others.xx), others.xx
        W = P @ weight.to(xx.dtype)
        rest = P @ fold.yx - W @ fold.xx
        gap = P @ others.yx - W @ xx  # M - W = (yx - W xx)(xx + l I)^-1
        variances = xx.diagonal(dim1=-2, dim2=-1)
        for index, ridge in enumerate(ridges):
            try:
                root, _ = regularized_cholesky(xx, ridge_level(variances, RIDGE + ridge))
            except ValueError:
                continue
            D = torch.cholesky_solve(gap.mT, root).mT
            slopes[index] += fold.mass * float((D * rest).sum())
            bends[index] += fold.mass * float(((D @ fold.xx) * D).sum())
    best, most = Trust(share=0.0), 0.0
    for ridge, slope, bend in zip(ridges, slopes, bends, strict=True):
        share = min(max(slope / bend, 0.0), 1.0) if bend > 0 else 0.0
        gain = 2 * share * slope - share * share * bend
        if gain > most:
            best, most = Trust(extra_ridge=ridge, share=share), gain
    return best


def held_out_error(fit: Callable[[Moments], Tensor], moments: Moments, *, folds: int = FOLDS) -> float:
    """Return the mean response error `E|y - T x - b|^2 / E|y|^2` on folds that the product T was not fitted to.

    Args:
        fit: function from moments without folds to the fitted product `(groups, out, in)`.
        moments: moments of a site with at least two folds.
        folds: largest number of folds that are left out, one after another.
    """
    error = variance = 0.0
    for others, fold in itertools.islice(judged_folds(moments), folds):
        T = fit(others).to(fold.xx.dtype)
        own = fold.yy.sum() - 2 * (T * fold.yx).sum() + ((T @ fold.xx) * T).sum()
        error += fold.mass * max(float(own), 0.0)
        variance += fold.mass * float(fold.yy.sum())
    return error / max(variance, 1e-300)


def judged_folds(moments: Moments) -> Iterator[tuple[Moments, Moments]]:
    """Yield the parts of `parted` that suffice to choose and judge."""
    return itertools.islice(parted(moments), _judged_count(max(moments.yx.shape[-2:])))


def _judged_count(size: int) -> int:
    """Return the number of folds that are left out, one after another, for matrices of this size."""
    return FOLDS if size <= _LARGE else 2 if size <= _HUGE else 1


@dataclass(frozen=True, kw_only=True)
class _Response:
    """The moments of a response: `mass`, `mean (groups, n)`, and the centred `gram (groups, n, n)`."""

    mass: float
    mean: Tensor
    gram: Tensor

    @classmethod
    def of(cls, V: Tensor, moments: Moments) -> "_Response":
        mean = (V @ moments.mean_x.to(V.dtype).unsqueeze(-1)).squeeze(-1)
        return cls(mass=moments.mass, mean=mean, gram=V @ moments.xx.to(V.dtype) @ V.mT)

    @classmethod
    def of_rows(cls, V: Tensor, x: Tensor) -> "_Response":
        z = x @ V.mT
        mean = z.mean(dim=-2)
        z -= mean.unsqueeze(-2)
        return cls(mass=float(x.shape[-2]), mean=mean, gram=z.mT @ z / x.shape[-2])

    @classmethod
    def joined(cls, parts: "Sequence[_Response]") -> "_Response":
        mass = sum(part.mass for part in parts)
        mean = torch.stack([part.mass / mass * part.mean for part in parts]).sum(dim=0)
        gram = torch.zeros_like(parts[0].gram)
        for part in parts:
            gram.add_(part.about(mean), alpha=part.mass / mass)
        return cls(mass=mass, mean=mean, gram=gram)

    def about(self, mean: Tensor) -> Tensor:
        """Return the second moments about another mean."""
        d = self.mean - mean
        return self.gram + d[..., :, None] * d[..., None, :]


def _tails(gram: Tensor, vectors: Tensor) -> Tensor:
    """Return what projections to the last 0, 1, ... of the vectors leave of a response, float64 `(n + 1,)`."""
    energy = ((gram @ vectors) * vectors).sum(dim=-2).clamp_min(0).sum(dim=0).double().cpu()
    return torch.cat([energy.new_zeros(1), energy.cumsum(dim=0)]).flip(0)
