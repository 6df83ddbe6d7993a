"""One weight, from the sketch to its factors: which route, in which precision, in how many iterations.

    small weights (`kernel.batched`)   the direct route, batched          left @ right = X X^T W
    all others, matrix by matrix       direct | gram | krylov | exact     with oversampling: cut by the SVD of Y^T

Memory beyond the weight: the blocks `X (out, columns)` and `Y (in, columns)`, and for copies of the weight in bfloat16
as much again as both in float32 (at least 2 MiB); with the buffers of the libraries it is measured by `bench.kernel`.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rsi_deploy.kernel import cost
from rsi_deploy.kernel.adaptive import until_settled
from rsi_deploy.kernel.batched import direct_batch, exact_batch, is_small
from rsi_deploy.kernel.checks import settled
from rsi_deploy.kernel.direct import Draw, direct
from rsi_deploy.kernel.exact import exact
from rsi_deploy.kernel.gram import gram
from rsi_deploy.kernel.krylov import depth, krylov
from rsi_deploy.kernel.products import Operand, working_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class How:
    """How a weight is to be factorized.

    Attributes:
        route: one of `cost.ROUTES`, or "auto": by the cost model.
        q: power iterations; "auto": until another would gain less than a percent.
        mixed: bfloat16 where it is measured to be faster and does no harm.
    """

    route: Literal["auto", "direct", "gram", "krylov", "exact"]
    q: int | Literal["auto"]
    mixed: bool


@dataclass(frozen=True, kw_only=True)
class Solved:
    """`X (..., out, rank)`, `Y = W^T X (..., in, rank)`, the route taken, and the iterations done (0: exact)."""

    X: Tensor
    Y: Tensor
    route: str
    q: int


def solve(weight: Tensor, draw: Draw, columns: int, rank: int, scale: float, how: How) -> Solved:
    """Factorize `weight (..., out, in)` from a sketch `(..., in, columns)`.

    Args:
        weight: checked (`kernel.checks`).
        draw: makes the sketch: Gaussian, in the working precision, on the weight's device, the same each time.
        columns: of the sketch.
        rank: at most `columns`.
        scale: of the weight.
        how: to do it.
    """
    full = min(weight.shape[-2:])
    q = how.q if how.q != "auto" else 8  # what an automatic choice reckons with
    mixed = how.mixed and working_dtype(weight) == torch.float32 and 2.0**-40 < scale < 2.0**40
    if mixed and (columns >= full or not cost.rates(weight.device).mixed):
        mixed = False
    route: str = how.route
    if route == "auto":
        small = weight.shape[-2] * weight.shape[-1] <= 4096  # here every route is instant: no need to know the machine
        shape = (weight.shape[-2], weight.shape[-1])
        route = "direct" if small else cost.choose(cost.rates(weight.device), shape, columns, rank, q, mixed=mixed)
    if columns >= full:
        route = "exact"  # the sketch spans everything: nothing is left to iterate for
    if is_small(weight) and how.q != "auto" and route in ("direct", "exact"):
        return _batch(weight, draw(), rank, q, route)
    if weight.ndim == 2:
        return _one(weight, draw, columns, rank, scale, route, how.q, mixed)
    pairs = zip(weight.flatten(0, -3), draw().flatten(0, -3), strict=True)
    members = [_one(settled(member), block.clone, columns, rank, scale, route, how.q, mixed) for member, block in pairs]
    X, Y = (torch.stack(parts) for parts in zip(*((m.X, m.Y) for m in members), strict=True))
    batch = weight.shape[:-2]
    taken = sorted({member.route for member in members})
    return Solved(
        X=X.reshape(*batch, *X.shape[1:]),
        Y=Y.reshape(*batch, *Y.shape[1:]),
        route="+".join(taken),
        q=max(member.q for member in members),
    )


def _batch(weight: Tensor, sketch: Tensor, rank: int, q: int, route: str) -> Solved:
    """A small weight, or a batch of them: direct, or exact; the other routes save nothing here."""
    W = weight.reshape(-1, *weight.shape[-2:]).to(working_dtype(weight))
    if route == "exact":
        X, Y = exact_batch(W, rank)
    else:
        X, Y = direct_batch(W, sketch.reshape(-1, *sketch.shape[-2:]), q)
        X, Y = cut(X, Y, rank)
    batch = weight.shape[:-2]
    taken = route if route == "exact" else "direct"
    return Solved(
        X=X.reshape(*batch, *X.shape[1:]),
        Y=Y.reshape(*batch, *Y.shape[1:]),
        route=taken,
        q=0 if route == "exact" else q,
    )


def _one(
    weight: Tensor,
    draw: Draw,
    columns: int,
    rank: int,
    scale: float,
    route: str,
    q: int | Literal["auto"],
    mixed: bool,
) -> Solved:
    """One matrix by one route."""
    blocks = 4 * sum(weight.shape) * columns
    operand = Operand(weight=weight, scale=scale, allowance=max(blocks, 2 << 20))
    if route == "krylov" and q != "auto" and depth(q) * columns > min(weight.shape):
        log.warning("block Krylov needs %d columns of %d: direct instead", depth(q) * columns, min(weight.shape))
        route = "direct"
    if route == "exact":
        X, Y = exact(operand, rank)
        return Solved(X=X, Y=Y, route=route, q=0)
    if q == "auto":
        X, Y, done = until_settled(operand, draw, mixed=mixed)
        X, Y = cut(X, Y, rank)
        return Solved(X=X, Y=Y, route="direct", q=done)
    if route == "krylov":
        X, Y = krylov(operand, draw(), q, rank)
        return Solved(X=X, Y=Y, route=route, q=depth(q))
    if route == "gram":
        X, Y, route = gram(operand, draw, q, mixed=mixed)
    else:
        X, Y = direct(operand, draw, q, mixed=mixed)
    X, Y = cut(X, Y, rank)
    return Solved(X=X, Y=Y, route=route, q=q)


def cut(X: Tensor, Y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best `rank` columns of a basis `X (..., out, columns)` with `Y = W^T X (..., in, columns)`."""
    if X.shape[-1] == rank:
        return X, Y
    U, S, Vh = torch.linalg.svd(Y.mT, full_matrices=False)
    return X @ U[..., :rank], (S[..., :rank, None] * Vh[..., :rank, :]).mT
