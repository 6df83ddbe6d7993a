"""Factorize one weight from its sketch: choose the route, the precision and the number of iterations.

    small weights (`linalg.batched`)   direct | chebyshev | exact, in one batch
    all others, matrix by matrix       direct | chebyshev | gram | krylov | exact

With oversampling the result is truncated by the SVD of `Y^T`.

Memory beyond the weight: twice the blocks `X (out, columns)` and `Y (in, columns)` in float32, including copies of the
weight in bfloat16 (a panel of at least 2 MiB). `bench.kernel` measures it with the buffers of the libraries.
"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rsi_deploy.linalg import cost_model as cost
from rsi_deploy.linalg.adaptive import iterate_until_converged
from rsi_deploy.linalg.batched import exact_batch, is_small, iterate_batch
from rsi_deploy.linalg.checks import aligned
from rsi_deploy.linalg.operand import PANEL_BYTES, Operand, working_dtype
from rsi_deploy.linalg.products.rates import rates
from rsi_deploy.linalg.routes.chebyshev import Draw, iterate, shifts, steps
from rsi_deploy.linalg.routes.direct import direct
from rsi_deploy.linalg.routes.exact import exact
from rsi_deploy.linalg.routes.gram import gram
from rsi_deploy.linalg.routes.krylov import depth, krylov

BATCHED: tuple[cost.Route, ...] = ("chebyshev", "exact")  # the routes that are useful for small weights
# Least flops of a product; below, bfloat16 saves less time than its safety checks take.
LEAST_LOW_FLOPS = {"cpu": 3e7, "cuda": 2.5e10}
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SolveSettings:
    """Settings for the factorization of one weight.

    Attributes:
        route: one of `cost_model.ROUTES`, or "auto" to choose by the cost model.
        q: number of power iterations; "auto" stops when another one would gain less than a percent.
        mixed: whether to use bfloat16 where it is measured to be faster and does no harm.
    """

    route: Literal["auto", "direct", "chebyshev", "gram", "krylov", "exact"]
    q: int | Literal["auto"]
    mixed: bool


@dataclass(frozen=True, kw_only=True)
class Solved:
    """`X (..., out, rank)`, `Y = W^T X (..., in, rank)`, the route, and the number of iterations (0 if exact)."""

    X: Tensor
    Y: Tensor
    route: str
    q: int


def solve(weight: Tensor, draw: Draw, columns: int, rank: int, scale: float, how: SolveSettings) -> Solved:
    """Factorize `weight (..., out, in)` from a sketch.

    Args:
        weight: checked weight (`linalg.checks`).
        draw: returns a sketch `(..., side, columns)`: Gaussian, in the working precision, on the weight's device, the
            same each time.
        columns: columns of the sketch.
        rank: rank, at most `columns`.
        scale: scale of the weight.
        how: settings.
    """
    full = min(weight.shape[-2:])
    q = how.q if how.q != "auto" else 8  # the number that the cost model assumes
    mixed = how.mixed and working_dtype(weight) == torch.float32 and 2.0**-40 < scale < 2.0**40
    if mixed and (columns >= full or not rates(weight.device).mixed):
        mixed = False
    if 2.0 * weight.shape[-2] * weight.shape[-1] * columns < LEAST_LOW_FLOPS.get(weight.device.type, 0.0):
        mixed = False
    route: str = how.route
    if route == "auto":
        route = "chebyshev"
        shape = (weight.shape[-2], weight.shape[-1])
        if shape[0] * shape[1] > 4096:  # below, every route is instant
            among = BATCHED if is_small(weight) else cost.ROUTES
            route = cost.choose(rates(weight.device), shape, columns, rank, q, mixed=mixed, among=among)
    if columns >= full:
        route = "exact"  # the sketch spans everything, so iterations gain nothing
    if is_small(weight) and how.q != "auto" and route in (*BATCHED, "direct"):
        return _batch(weight, draw(weight.shape[-1]), rank, q, route)
    if weight.ndim == 2:
        return _one(weight, draw, columns, rank, scale, route, how.q, mixed)
    members = [
        _one(aligned(member), _drawn(draw, index), columns, rank, scale, route, how.q, mixed)
        for index, member in enumerate(weight.flatten(0, -3))
    ]
    X, Y = (torch.stack(parts) for parts in zip(*((m.X, m.Y) for m in members), strict=True))
    batch = weight.shape[:-2]
    taken = sorted({member.route for member in members})
    return Solved(
        X=X.reshape(*batch, *X.shape[1:]),
        Y=Y.reshape(*batch, *Y.shape[1:]),
        route="+".join(taken),
        q=max(member.q for member in members),
    )


def _drawn(draw: Draw, index: int) -> Draw:
    """Return the sketch of one member of a batch."""
    return lambda side: draw(side).flatten(0, -3)[index].clone()


def _batch(weight: Tensor, sketch: Tensor, rank: int, q: int, route: str) -> Solved:
    """Factorize a small weight, or a batch of them, by the direct, Chebyshev or exact route."""
    W = weight.reshape(-1, *weight.shape[-2:]).to(working_dtype(weight))
    done = {"exact": 0, "direct": q}.get(route, steps(q))
    if route == "exact":
        X, Y = exact_batch(W, rank)
    else:
        fractions = shifts(done) if route == "chebyshev" else [0.0] * (q - 1)
        X, Y = iterate_batch(W, sketch.reshape(-1, *sketch.shape[-2:]), fractions)
        X, Y = truncate(X, Y, rank)
    batch = weight.shape[:-2]
    return Solved(
        X=X.reshape(*batch, *X.shape[1:]),
        Y=Y.reshape(*batch, *Y.shape[1:]),
        route=route,
        q=done,
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
    """Factorize one matrix by one route."""
    allowance = 3 * sum(weight.shape) * columns  # bytes; with the other data, two blocks in float32
    operand = Operand(weight=weight, scale=scale, allowance=max(allowance, PANEL_BYTES))
    if route == "krylov" and q != "auto" and depth(q) * columns > min(weight.shape):
        log.warning("block Krylov needs %d columns of %d: Chebyshev instead", depth(q) * columns, min(weight.shape))
        route = "chebyshev"
    if route == "exact":
        X, Y = exact(operand, rank)
        return Solved(X=X, Y=Y, route=route, q=0)
    if q == "auto":
        X, Y, done = iterate_until_converged(operand, draw, mixed=mixed)
        X, Y = truncate(X, Y, rank)
        return Solved(X=X, Y=Y, route="direct", q=done)
    if route == "krylov":
        X, Y = krylov(operand, draw(weight.shape[1]), q, rank)
        return Solved(X=X, Y=Y, route=route, q=depth(q))
    done = q if route == "direct" else steps(q)
    if route == "gram":
        X, Y, route = gram(operand, draw, done, mixed=mixed)
    elif route == "chebyshev":
        X, Y = iterate(operand, draw, shifts(done), mixed=mixed)
    else:
        X, Y = direct(operand, draw, q, mixed=mixed)
    X, Y = truncate(X, Y, rank)
    return Solved(X=X, Y=Y, route=route, q=done)


def truncate(X: Tensor, Y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncate a basis `X (..., out, columns)` with `Y = W^T X (..., in, columns)` to its best `rank` columns."""
    if X.shape[-1] == rank:
        return X, Y
    U, S, Vh = torch.linalg.svd(Y.mT, full_matrices=False)
    return X @ U[..., :rank], (S[..., :rank, None] * Vh[..., :rank, :]).mT
