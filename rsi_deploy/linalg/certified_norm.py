"""A certified interval for the norm of a residual, `||W - left @ right||_2`, by Lanczos steps from random starts.

With `R` the residual, `A = R R^T (m x m)`, `z` its leading eigenvector and `l` the eigenvalue, `v` a start drawn
uniformly from the sphere, `T` the tridiagonal matrix of `k` Lanczos steps, `t` its largest eigenvalue, and `p` any
polynomial of degree `k - 1`: no component of `R^T p(A) v` is longer than the whole, so

    sqrt(l) |p(l)| |<v, z>|  <=  |R^T p(A) v|           and      P( |<v, z>| < d )  <=  d sqrt(2 m / pi)

The right side is known from `T`. With the orthonormal polynomials `P = (p_0(l), ..., p_{k-1}(l))` of `T`, the best `p`
for a given `l` gives

    d^2 l P^T T^-1 P  <=  1

The left side increases with `l` above `t`. If it exceeds 1 at `l = (1 + width)^2 t`, the norm is at most
`(1 + width) sqrt(t)`, except with probability `d sqrt(2 m / pi)`, for any eigenvalues (after van Dorsselaer,
Hochstenbach and van der Vorst 2000, SIAM J. Matrix Anal. Appl. 22(3)). This is a single event, so it may be checked
after every step. Chebyshev's `p = T_{2k-1}` on `[0, sqrt(t)]` shows that the check succeeds at the latest where
`T_{2k-1}(1 + width) d >= 1`. The lower end is `|R^T v| / |v|` for the Ritz vector `v`. It is a value that is attained,
so it never exceeds the norm. Both ends are widened by the rounding of the products. If the smaller side of the weight
is not larger than the number of steps, an SVD is computed instead.

Several starts at once, each with its own `T`, need half as many steps: the norm exceeds all their ends only if every
start has less than `d` along `z`, so the failure probability of one start may be the root of the total one. A product
with four vectors takes hardly longer than with one if the weight is read from memory and the library supports it well:
oneDNN does, MKL does not.

Cost: `2 k` passes over the weight; 25 to 35 for a 4096 x 4096 weight at five percent width from one start, half as many
from four starts.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rsi_deploy.linalg.checks import aligned
from rsi_deploy.linalg.factors import Factors
from rsi_deploy.linalg.operand import working_dtype
from rsi_deploy.linalg.products.gemm import times

FAILURE = 0.01  # probability that reports state
WORKED = FAILURE / 10  # default probability: the bound is sharp and does not include roundings
DOUBLE = 1 << 18  # up to this many numbers all computations use float64, where rounding is negligible
STARTS = 4
WIDTH = 0.045  # relative width of the interval; the rest of five percent is left for roundings
SQUARED = 1e-15  # below this norm in float32, some squares vanish
EMPTY = 1e-12  # share of a random vector that is added to each vector, so that a zero vector continues at random


class NormInterval(NamedTuple):
    """Interval of `||W - left right||_2`, float64, one per batch entry, and the direction found.

    `lower <= norm` always; `norm <= upper` except with the failure probability. `u (..., out)` is the unit vector with
    `|R^T u|` near `lower`, in the working precision.
    """

    lower: Tensor
    upper: Tensor
    u: Tensor


class Search(NamedTuple):
    """A norm interval, and the directions that were searched.

    Attributes:
        interval: interval of the residual's norm.
        directions: `(..., few, out)`, orthonormal within each start; float64 for a small weight, else in the working
            precision.
        images: `directions @ R (..., few, in)`.
    """

    interval: NormInterval
    directions: Tensor
    images: Tensor


def least_part(n: int, failure: float) -> float:
    """Return `d` such that a uniform unit vector in `n` dimensions has less along a given one with this probability."""
    return failure * math.sqrt(math.pi / (2 * n))


def most_steps(n: int, failure: float = WORKED, width: float = WIDTH, starts: int = 1) -> int:
    """Return a number of Lanczos steps that always suffices for this width, by Chebyshev's polynomials."""
    part = least_part(n, failure ** (1 / starts))
    return math.ceil((math.acosh(max(1 / part, 1.0)) / math.acosh(1 + width) + 1) / 2)


def certified_norm(
    weight: Tensor, factors: Factors, *, failure: float = WORKED, width: float = WIDTH, seed: int = 0
) -> NormInterval:
    """Return an interval of `||W - left @ right||_2` that holds with probability `1 - failure` for the whole batch.

    Args:
        weight: `(..., out, in)`, floating.
        factors: `left (..., out, rank)`, `right (..., rank, in)`; a rank of 0 gives the norm of the weight.
        failure: probability that any of the norms exceeds its upper end.
        width: width relative to the lower end, before roundings.
        seed: seed of the start vectors, which must not depend on the weight.
    """
    return search_norm(weight, factors, failure=failure, width=width, seed=seed).interval


def search_norm(
    weight: Tensor, factors: Factors, *, failure: float = WORKED, width: float = WIDTH, seed: int = 0
) -> Search:
    """Return the interval of `certified_norm` with the directions that were searched."""
    W = aligned(weight.detach())
    count = W[..., 0, 0].numel()
    batch = () if count == 1 else (count,)  # a single matrix has no batch dimension, as batched products are slower
    dtype = torch.float64 if W.shape[-2] * W.shape[-1] <= DOUBLE else working_dtype(W)
    W, L, R = (part.detach().reshape(*batch, *part.shape[-2:]).to(dtype) for part in (W, *factors))
    side = W.shape[-2]
    most = most_steps(side, failure / count, width, STARTS)
    if min(W.shape[-2:]) <= max(most, 32):
        lower, upper, directions, images = _exact(W, L, R, most)
        u = directions[..., 0, :]
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(*batch, 2, STARTS, side, generator=generator, dtype=torch.float64).to(W.device, dtype)
        size, part = _size(W), least_part(side, (failure / count) ** (1 / STARTS))
        directions, images, mix = _lanczos(W, L, R, start, size, most, part, width)
        lower, upper, u = _ends(W, L, R, mix[..., None, :] @ directions, size, width)
        images = images * size
    outer = weight.shape[:-2]
    interval = NormInterval(
        lower.reshape(outer), upper.reshape(outer), u.reshape(*outer, side).to(working_dtype(weight))
    )
    return Search(interval, *(rows.reshape(*outer, *rows.shape[-2:]) for rows in (directions, images)))


def _exact(W: Tensor, L: Tensor, R: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both ends by an SVD of the residual in float64, and its leading singular vectors with their images."""
    U, S, Vh = torch.linalg.svd(W.double() - L.double() @ R.double(), full_matrices=False)
    slack = 1e-13 * torch.linalg.matrix_norm(W.double())
    directions, images = U[..., :few].mT, S[..., :few, None] * Vh[..., :few, :]
    return (S[..., 0] - slack).clamp_min(0), S[..., 0] + slack, directions.to(W.dtype), images.to(W.dtype)


def _lanczos(
    W: Tensor, L: Tensor, R: Tensor, start: Tensor, size: Tensor, most: int, part: float, width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Krylov bases of `R R^T (..., few, out)`, their images over `size`, and the best Ritz coefficients.

    Args:
        W: `(..., out, in)`.
        L: `(..., out, rank)`.
        R: `(..., rank, in)`.
        start: Gaussian `(..., 2, starts, out)`: the starts, and vectors to continue with if a Krylov space ends.
        size: norm of the weight, `(..., 1, 1)`.
        most: most steps.
        part: least share of a start along the leading direction.
        width: width at which to stop.
    """
    unit = torch.where(size > 0, 1 / size.clamp_min(torch.finfo(size.dtype).tiny), 0)
    v, filler = start[..., 0, :, :], start[..., 1, :, :] * EMPTY
    (*batch, starts, out), in_ = v.shape, W.shape[-1]
    basis, images = (W.new_empty(*batch, starts, most, side) for side in (out, in_))
    diagonal, beside = (W.new_zeros(*batch, starts, most, dtype=torch.float64) for _ in range(2))
    found = torch.zeros(batch, dtype=torch.bool)
    for index in range(most):
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        v = v / norm
        x = (times(v, W) - times(times(v, L), R)) * unit
        basis[..., index, :], images[..., index, :] = v, x
        diagonal[..., index] = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).square()
        beside[..., index] = norm[..., 0]
        few = index + 1
        if 2 * few > most:  # convergence is very unlikely earlier
            T = _tridiagonal(diagonal[..., :few], beside[..., :few])
            found = found | is_certified(T, part, width)
            if found.all():
                break
        known = basis[..., :few, :]
        v = (times(x, W.mT) - times(times(x, R.mT), L.mT)) * unit + filler.roll(index, -1)
        for _ in range(2):
            v = v - ((v[..., None, :] @ known.mT) @ known)[..., 0, :]
    values, vectors = torch.linalg.eigh(T)
    best = torch.nn.functional.one_hot(values[..., -1].argmax(-1), starts)[..., None]
    mix = (best * vectors[..., -1]).flatten(-2)
    spans = (held[..., :few, :].flatten(-3, -2) for held in (basis, images))
    return *spans, mix.to(W)


def _tridiagonal(diagonal: Tensor, beside: Tensor) -> Tensor:
    """Return the tridiagonal matrix `(..., k, k)` on the CPU, from `(..., k)` each; `beside[..., 0]` is not used."""
    diagonal, beside = diagonal.cpu(), beside[..., 1:].cpu()
    return diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)


def is_certified(T: Tensor, part: float, width: float) -> Tensor:
    """Return whether `T (..., starts, k, k)` prove that the norm is at most `1 + width` times their largest root.

    Args:
        T: tridiagonal matrix of each start, float64; its largest eigenvalue's root counts.
        part: `d`, the least share of a start along the leading direction.
        width: width of the interval.
    """
    identity = torch.eye(T.shape[-1], dtype=T.dtype)
    tops = torch.linalg.eigvalsh(T)[..., -1, None, None].clamp_min(1e-300)
    at = (1 + width) ** 2 * tops.amax(-3, keepdim=True)
    P = torch.linalg.solve(at * identity - T, identity[:, -1:].expand(*T.shape[:-1], 1))
    P = P / P[..., :1, :]  # p_0 is 1; if a Krylov space ends, the others are infinite
    # A small diagonal term keeps the condition valid and makes it robust to rounding.
    reached = part**2 * at * (P.mT @ torch.linalg.solve(T + 1e-5 * tops * identity, P))
    proven: Tensor = ~(reached[..., 0, 0] < 1)
    return proven.all(-1)


def _ends(W: Tensor, L: Tensor, R: Tensor, best: Tensor, size: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower and upper end `(...)`, float64, and the normalized Ritz vector from `best (..., 1, out)`."""
    best = best / torch.linalg.vector_norm(best, dim=-1, keepdim=True)
    image = times(best, W) - times(times(best, L), R)
    scale = torch.where(size > 0, size, 1)  # squares of tiny numbers would vanish
    size = size[..., 0, 0].double()
    reached = torch.linalg.vector_norm(image / scale, dim=(-2, -1), dtype=torch.float64) * size
    slack = 2 * torch.finfo(W.dtype).eps * size
    return (reached - slack).clamp_min(0), (1 + width) * reached + slack, best[..., 0, :]


def _size(W: Tensor) -> Tensor:
    """Return `|W|_F (..., 1, 1)`, finite; if squares would overflow or vanish, from the weight scaled to 1."""
    size: Tensor = torch.linalg.vector_norm(W.flatten(-2), dim=-1)
    if not bool((torch.isfinite(size) & (size > SQUARED)).all()):
        largest = torch.linalg.vector_norm(W.flatten(-2), ord=torch.inf, dim=-1)
        scaled = W / largest.clamp_min(torch.finfo(W.dtype).tiny)[..., None, None]
        size = (torch.linalg.vector_norm(scaled.flatten(-2), dim=-1) * largest).clamp_max(torch.finfo(W.dtype).max)
    return size[..., None, None]
