"""A certified interval of a residual's norm `||W - left @ right||_2`: Lanczos from below, its own polynomials above.

With `R` the residual, `A = R R^T (m x m)`, `z` its leading eigenvector and `l` the eigenvalue, `v` a start drawn
uniformly from the sphere, `T` the tridiagonal matrix of `k` Lanczos steps, `t` its largest eigenvalue, and `p` any
polynomial of degree `k - 1`: no component of `R^T p(A) v` is longer than the whole, so

    sqrt(l) |p(l)| |<v, z>|  <=  |R^T p(A) v|           and      P( |<v, z>| < d )  <=  d sqrt(2 m / pi)

The right side is known from `T`; the best `p` for a given `l` leaves, with `P = (p_0(l), ..., p_{k-1}(l))` the
orthonormal polynomials of `T`,

    d^2 l P^T T^-1 P  <=  1

whose left side rises with `l` above `t`. Where it is above 1 at `l = (1 + width)^2 t`, the norm is at most
`(1 + width) sqrt(t)`, but for the probability `d sqrt(2 m / pi)`, whatever the eigenvalues (after van Dorsselaer,
Hochstenbach and van der Vorst 2000, SIAM J. Matrix Anal. Appl. 22(3)). As it is one event, it may be asked after every
step; Chebyshev's `p = T_{2k-1}` on `[0, sqrt(t)]` shows that it is so at the latest where
`T_{2k-1}(1 + width) d >= 1`. The lower end is `|R^T v| / |v|` for the Ritz vector `v`: a norm that is reached, so it
never exceeds the truth. Both ends are moved by the rounding of the products. Where the smaller side allows no more than
such steps, an SVD is made instead.

Several starts at once, each with a `T` of its own, need half as many steps: the norm is above all their ends only
where each start had less than `d` along `z`, so the probability of that for one may be the root of what it may be for
all. A product with four vectors takes hardly longer than one with a single vector where the weight comes from memory,
if a library has it that way: oneDNN does, MKL does not.

Cost: `2 k` passes over the weight; 25 to 35 for a 4096 x 4096 weight at five percent width from one start, half as many
from four.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rsi_deploy.linalg.checks import settled
from rsi_deploy.linalg.factors import Factors
from rsi_deploy.linalg.operand import working_dtype
from rsi_deploy.linalg.products.gemm import times

FAILURE = 0.01  # that is stated
WORKED = FAILURE / 10  # that is worked with, unless told otherwise: the bound is sharp, and roundings are no part of it
DOUBLE = 1 << 18  # up to so many numbers everything is in float64: no rounding to speak of
STARTS = 4
WIDTH = 0.045  # of the upper end over the lower; the rest of five percent is left to roundings
SQUARED = 1e-15  # below such a norm in float32, some squares are lost
EMPTY = 1e-12  # of a random vector, what is added to each, in units of the norm squared: where that is zero, it stays


class Interval(NamedTuple):
    """Ends of an interval of `||W - left right||_2`, float64, one per leading batch entry, and the direction found.

    `lower <= norm` always; `norm <= upper` but for the failure probability. `u (..., out)` is the unit vector with
    `|R^T u|` about `lower`, in the working precision.
    """

    lower: Tensor
    upper: Tensor
    u: Tensor


class Search(NamedTuple):
    """An interval, and the directions among which its lower end was found.

    Attributes:
        interval: of the residual's norm.
        directions: `(..., few, out)`, orthonormal among those of each start; float64 for a small weight, else in the
            working precision.
        images: `directions @ R (..., few, in)`.
    """

    interval: Interval
    directions: Tensor
    images: Tensor


def least_part(n: int, failure: float) -> float:
    """`d`: a vector drawn uniformly from the sphere in `n` dimensions has less along another with this probability."""
    return failure * math.sqrt(math.pi / (2 * n))


def most_steps(n: int, failure: float = WORKED, width: float = WIDTH, starts: int = 1) -> int:
    """The number of Lanczos steps that is always enough for this width, by Chebyshev's polynomials."""
    part = least_part(n, failure ** (1 / starts))
    return math.ceil((math.acosh(max(1 / part, 1.0)) / math.acosh(1 + width) + 1) / 2)


def certified_norm(
    weight: Tensor, factors: Factors, *, failure: float = WORKED, width: float = WIDTH, seed: int = 0
) -> Interval:
    """An interval of `||W - left @ right||_2` that holds with probability `1 - failure`, for the whole batch at once.

    Args:
        weight: `(..., out, in)`, floating.
        factors: `left (..., out, rank)`, `right (..., rank, in)`; a rank of 0 gives the norm of the weight.
        failure: the probability that any of the norms lies above its upper end.
        width: of the interval, relative to its lower end, before roundings.
        seed: of the start vector, which must not depend on the weight.
    """
    return searched(weight, factors, failure=failure, width=width, seed=seed).interval


def searched(
    weight: Tensor, factors: Factors, *, failure: float = WORKED, width: float = WIDTH, seed: int = 0
) -> Search:
    """As `certified_norm`, with what was searched."""
    W = settled(weight.detach())
    count = W[..., 0, 0].numel()
    batch = () if count == 1 else (count,)  # one matrix as such: products in batches are slower
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
    interval = Interval(lower.reshape(outer), upper.reshape(outer), u.reshape(*outer, side).to(working_dtype(weight)))
    return Search(interval, *(rows.reshape(*outer, *rows.shape[-2:]) for rows in (directions, images)))


def _exact(W: Tensor, L: Tensor, R: Tensor, few: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By an SVD of the residual, in float64: both ends, and the leading singular vectors with their images."""
    U, S, Vh = torch.linalg.svd(W.double() - L.double() @ R.double(), full_matrices=False)
    slack = 1e-13 * torch.linalg.matrix_norm(W.double())
    directions, images = U[..., :few].mT, S[..., :few, None] * Vh[..., :few, :]
    return (S[..., 0] - slack).clamp_min(0), S[..., 0] + slack, directions.to(W.dtype), images.to(W.dtype)


def _lanczos(
    W: Tensor, L: Tensor, R: Tensor, start: Tensor, size: Tensor, most: int, part: float, width: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Krylov bases of `R R^T` `(..., few, out)`, their images over `size`, and the best Ritz vector's coefficients.

    Args:
        W: `(..., out, in)`.
        L: `(..., out, rank)`.
        R: `(..., rank, in)`.
        start: Gaussian, `(..., 2, starts, out)`: the starts, and what goes on where a space ends.
        size: of the weight, `(..., 1, 1)`.
        most: steps.
        part: that a start has along the leading direction, at least.
        width: at which it stops.
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
        if 2 * few > most:  # hardly ever before
            T = _tridiagonal(diagonal[..., :few], beside[..., :few])
            found = found | is_told(T, part, width)
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
    """`(..., k, k)`, on the CPU, where it is judged, from `(..., k)` each, the first number of `beside` left out."""
    diagonal, beside = diagonal.cpu(), beside[..., 1:].cpu()
    return diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)


def is_told(T: Tensor, part: float, width: float) -> Tensor:
    """Whether `T (..., starts, k, k)` tell that the norm is at most `1 + width` times the root of the largest of their
    eigenvalues.

    Args:
        T: tridiagonal, float64, of each start.
        part: `d`, that a start has along the leading direction at least.
        width: of the interval.
    """
    identity = torch.eye(T.shape[-1], dtype=T.dtype)
    tops = torch.linalg.eigvalsh(T)[..., -1, None, None].clamp_min(1e-300)
    at = (1 + width) ** 2 * tops.amax(-3, keepdim=True)
    P = torch.linalg.solve(at * identity - T, identity[:, -1:].expand(*T.shape[:-1], 1))
    P = P / P[..., :1, :]  # p_0 is 1; where a space ends, the others are infinite
    # A little on the diagonal makes the condition no easier, and rounding harmless.
    reached = part**2 * at * (P.mT @ torch.linalg.solve(T + 1e-5 * tops * identity, P))
    told: Tensor = ~(reached[..., 0, 0] < 1)
    return told.all(-1)


def _ends(W: Tensor, L: Tensor, R: Tensor, best: Tensor, size: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper end `(...)`, float64, and the unit vector of `best (..., 1, out)`, the Ritz vector."""
    best = best / torch.linalg.vector_norm(best, dim=-1, keepdim=True)
    image = times(best, W) - times(times(best, L), R)
    scale = torch.where(size > 0, size, 1)  # squares of tiny numbers would vanish
    size = size[..., 0, 0].double()
    reached = torch.linalg.vector_norm(image / scale, dim=(-2, -1), dtype=torch.float64) * size
    slack = 2 * torch.finfo(W.dtype).eps * size
    return (reached - slack).clamp_min(0), (1 + width) * reached + slack, best[..., 0, :]


def _size(W: Tensor) -> Tensor:
    """`|W|_F (..., 1, 1)`, finite; where its squares leave what floats hold, of the weight scaled to 1."""
    size: Tensor = torch.linalg.vector_norm(W.flatten(-2), dim=-1)
    if not bool((torch.isfinite(size) & (size > SQUARED)).all()):
        largest = torch.linalg.vector_norm(W.flatten(-2), ord=torch.inf, dim=-1)
        scaled = W / largest.clamp_min(torch.finfo(W.dtype).tiny)[..., None, None]
        size = (torch.linalg.vector_norm(scaled.flatten(-2), dim=-1) * largest).clamp_max(torch.finfo(W.dtype).max)
    return size[..., None, None]
