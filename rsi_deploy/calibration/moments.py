"""Second moments of a site's input and its desired response, accumulated over calibration data batch by batch.

    x (in)   input of the site in the compressed network: the sites before it are already replaced
    y (out)  desired response without bias: the response of the same site in the dense network

    xx = E[(x - E x)(x - E x)^T]     yx = E[(y - E y)(x - E x)^T]     yy = E|y - E y|^2

Each batch is centred on its own mean, twice, and merged (Chan, Golub and LeVeque 1979), so a large mean costs no
digits. For an input wider than `GRAM_LIMIT` the rows are kept instead of a Gram matrix: there are fewer rows than
columns.

Batches belong to folds in turn, and the moments of each fold are kept, so that anything that is fitted to some folds
can be judged on the others without another pass over the data.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GRAM_LIMIT = 8192
"""Widest input whose Gram matrix is kept; for wider ones the rows are kept."""
_DOUBLE_LIMIT = 2048
ROWS = 16_384
"""Largest number of rows per site, of all its groups together, or 32 times its inputs if that is more."""
GROUP_ROWS = 16
"""Rows per input that every group may have: a depthwise convolution has few inputs and hundreds of groups."""
WIDE_ROWS = 4096
"""Largest number of rows for a site whose rows are kept."""
FOLDS = 4
WIDE_FOLDS = 2
"""Number of folds of an input wider than `_DOUBLE_LIMIT`, whose moments are large."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The moments of one site per group, in float64 up to 2,048 inputs and in float32 above.

    Attributes:
        rows: number of pairs (x, y).
        mass: sum of the row weights; equal to `rows` if every weight is 1.
        mean_x: `(groups, in)`.
        mean_y: `(groups, out)`.
        xx: `(groups, in, in)`, centred.
        yx: `(groups, out, in)`, centred.
        yy: total variance of y, `(groups,)`.
        folds: moments of each fold, which add up to these; empty if they are unknown.
    """

    rows: int
    mass: float
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor
    folds: "tuple[Moments, ...]" = ()

    @classmethod
    def of_folds(cls, folds: "Sequence[Moments]") -> "Moments":
        """Return the moments of all folds together."""
        total = functools.reduce(_merged, folds)
        return replace(total, folds=tuple(folds) if len(folds) > 1 else ())

    def without(self, fold: int) -> "Moments":
        """Return the moments of all folds but one."""
        return functools.reduce(_merged, [part for number, part in enumerate(self.folds) if number != fold])

    def single(self) -> "Moments":
        """Return the moments in float32, without folds."""
        return Moments(
            rows=self.rows,
            mass=self.mass,
            mean_x=self.mean_x.float(),
            mean_y=self.mean_y.float(),
            xx=self.xx.float(),
            yx=self.yx.float(),
            yy=self.yy.float(),
        )

    @property
    def varies(self) -> bool:
        """Return whether the inputs of any group vary by more than the rounding of their float32 values."""
        return bool(self._varying.any())

    @property
    def _varying(self) -> Tensor:
        return _above_rounding(self.xx.diagonal(dim1=-2, dim2=-1), self.mean_x)

    def stabilized(self, weight: Tensor) -> "Moments":
        """Return the moments with `y = weight x` in groups whose inputs do not vary, `weight (groups, out, in)`.

        The variation of such inputs is rounding, and a regression would fit its chance correlation with y.
        """
        varying = self._varying
        if varying.all():
            return self
        yx = torch.where(varying[:, None, None], self.yx, weight.to(self.xx.dtype) @ self.xx)
        return replace(self, yx=yx, folds=())

    @classmethod
    def dense(cls, inputs: "Moments", weight: Tensor) -> "Moments":
        """Return the moments in the dense network, where `y = W x` follows from the moments of the inputs alone.

        Those of the folds stay moments of the inputs.
        """
        W = weight.to(inputs.xx.dtype)
        yx = W @ inputs.xx
        mean_y = (W @ inputs.mean_x.to(W.dtype).unsqueeze(-1)).squeeze(-1)
        return replace(inputs, mean_y=mean_y, yx=yx, yy=(yx * W).sum(dim=(-2, -1)))


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The rows of an input that is too wide for a Gram matrix, in float32.

    Attributes:
        x: `(groups, rows, in)`.
        y: `(groups, rows, out)`.
    """

    x: Tensor
    y: Tensor

    @property
    def rows(self) -> int:
        """Number of pairs (x, y)."""
        return int(self.x.shape[-2])

    @property
    def mean_x(self) -> Tensor:
        """Mean of the inputs, `(groups, in)`."""
        return self.x.mean(dim=-2)

    @property
    def mean_y(self) -> Tensor:
        """Mean of the responses, `(groups, out)`."""
        return self.y.mean(dim=-2)

    @property
    def varies(self) -> bool:
        """Return whether the inputs of any group vary, as in `Moments`."""
        return bool(self._varying.any())

    @property
    def _varying(self) -> Tensor:
        return _above_rounding(self.x.var(dim=-2, correction=0), self.mean_x)

    def stabilized(self, weight: Tensor) -> "Samples":
        """Return the rows with `y = weight x` in groups whose inputs do not vary, as in `Moments`."""
        varying = self._varying
        if varying.all():
            return self
        y = self.x @ weight.to(self.x.dtype).mT
        y += (self.mean_y - y.mean(dim=-2)).unsqueeze(-2)
        return Samples(x=self.x, y=torch.where(varying[:, None, None], self.y, y))


class MomentAccumulator:
    """An accumulator of moments, by fold.

    Args:
        in_features: columns of the weight, per group.
        limit: widest input whose Gram matrix is kept.
    """

    def __init__(self, in_features: int, *, limit: int = GRAM_LIMIT) -> None:
        self._wide = in_features > limit
        self._dtype = torch.float64 if in_features <= _DOUBLE_LIMIT else torch.float32
        self._folds = fold_count(in_features)
        self._sums: dict[int, Moments] = {}
        self._kept: list[tuple[Tensor, Tensor]] = []

    @property
    def rows(self) -> int:
        """Number of rows added."""
        return sum(x.shape[-2] for x, _ in self._kept) + sum(moments.rows for moments in self._sums.values())

    def add(self, x: Tensor, y: Tensor, counts: Tensor | None = None, *, fold: int = 0) -> None:
        """Add zero or more rows.

        Args:
            x: inputs `(groups, rows, in)`.
            y: responses `(groups, rows, out)`.
            counts: positive row weights `(rows,)`; None for 1. They have no effect on an input wider than the limit.
            fold: any number, modulo the number of folds. An input wider than the limit has no folds.

        Raises:
            ValueError: NaN or infinite values, or shapes that do not fit together.
        """
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)} do not fit together")
        if not x.shape[-2]:
            return
        for name, values in (("inputs", x), ("responses", y)):
            if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
                raise ValueError(f"its {name} on the calibration data hold NaN or infinite values")
        if self._wide:
            self._kept.append((x.float(), y.float()))
            return
        batch = _moments_of(x.float(), y.float(), self._dtype, x.new_ones(x.shape[-2]) if counts is None else counts)
        if not torch.isfinite(batch.xx).all() or not torch.isfinite(batch.yy).all():
            raise ValueError("its values on the calibration data are too large to be squared")
        fold %= self._folds
        before = self._sums.get(fold)
        self._sums[fold] = batch if before is None else _merged(before, batch, in_place=True)

    def result(self) -> Moments | Samples | None:
        """Return the moments of all rows, or None without rows."""
        if self._kept:
            return Samples(
                x=torch.cat([x for x, _ in self._kept], dim=-2), y=torch.cat([y for _, y in self._kept], dim=-2)
            )
        return Moments.of_folds([self._sums[fold] for fold in sorted(self._sums)]) if self._sums else None


def fold_count(in_features: int) -> int:
    """Return the number of folds of a site's moments."""
    return FOLDS if in_features <= _DOUBLE_LIMIT else WIDE_FOLDS


def row_limit(in_features: int, groups: int = 1) -> int:
    """Return the largest number of rows, per group, that a site's moments are computed from."""
    return (
        WIDE_ROWS if in_features > GRAM_LIMIT else max(max(ROWS, 32 * in_features) // groups, GROUP_ROWS * in_features)
    )


def moment_bytes(in_features: int, out_features: int, groups: int, rows: int, *, limit: int = GRAM_LIMIT) -> int:
    """Return the bytes that the accumulated moments of one site take, in all folds."""
    if in_features > limit:
        return 4 * groups * rows * (in_features + out_features)
    width = 8 if in_features <= _DOUBLE_LIMIT else 4
    return fold_count(in_features) * width * groups * in_features * (in_features + out_features)


def _moments_of(x: Tensor, y: Tensor, dtype: torch.dtype, counts: Tensor) -> Moments:
    shares = counts.to(dtype) / counts.to(dtype).sum()
    x, mean_x = _centred(x, shares)
    y, mean_y = _centred(y, shares)
    root = shares.sqrt().to(x.dtype).unsqueeze(-1)
    x, y = x.mul_(root), y.mul_(root)
    return Moments(
        rows=len(counts),
        mass=float(counts.sum()),
        mean_x=mean_x,
        mean_y=mean_y,
        xx=(x.mT @ x).to(dtype),
        yx=(y.mT @ x).to(dtype),
        yy=y.square().sum(dim=(-2, -1)).to(dtype),
    )


def _centred(x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centred rows, and their mean to more digits than the rows have."""
    weights = shares.to(x.dtype)
    mean = (weights @ x).unsqueeze(-2)
    x = x - mean
    rest = (weights @ x).unsqueeze(-2)  # the rounding error of the mean
    return x.sub_(rest), (mean.to(shares.dtype) + rest).squeeze(-2)


def _above_rounding(variances: Tensor, means: Tensor) -> Tensor:
    """Return whether each group varies by more than float32 rounding, bool `(groups,)`."""
    rounding = 4 * torch.finfo(torch.float32).eps
    return variances.sum(dim=-1) > rounding**2 * means.square().sum(dim=-1)


def _merged(a: Moments, b: Moments, *, in_place: bool = False) -> Moments:
    """Return the moments of the rows of both; `in_place` overwrites the matrices of `a`."""
    mass = a.mass + b.mass
    t, u = a.mass / mass, b.mass / mass
    dx, dy = b.mean_x - a.mean_x, b.mean_y - a.mean_y
    xx, yx = (a.xx.mul_(t), a.yx.mul_(t)) if in_place else (a.xx * t, a.yx * t)
    return Moments(
        rows=a.rows + b.rows,
        mass=mass,
        mean_x=a.mean_x + u * dx,
        mean_y=a.mean_y + u * dy,
        xx=xx.add_(b.xx, alpha=u).baddbmm_(dx[..., :, None], dx[..., None, :], alpha=t * u),
        yx=yx.add_(b.yx, alpha=u).baddbmm_(dy[..., :, None], dx[..., None, :], alpha=t * u),
        yy=t * a.yy + u * b.yy + t * u * dy.square().sum(dim=-1),
    )
