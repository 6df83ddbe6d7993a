"""A certified interval of a residual's norm `||W - left @ right||_2`: block Lanczos from below, a theorem above.

With `R` the residual, `A = R R^T (m x m)`, `l` its largest eigenvalue and `t_k` the largest Ritz value of `k` Lanczos
steps from a start drawn uniformly from the sphere (Kuczynski and Wozniakowski 1992, SIAM J. Matrix Anal. Appl. 13(4),
theorem 4.2):

    P( l > t_k / (1 - e) )  <=  1.648 sqrt(m) exp(-sqrt(e) (2k - 1))

whatever the eigenvalues. A block of `b` independent starts spans what each of them does, so all must fail for it to
fail: at the failure probability `f` wanted, each may with `f^(1/b)`. Solved for `e`, the upper end is
`sqrt(t_k / (1 - e))`; `k` is the least with `sqrt(1 / (1 - e)) <= 1 + width` for the width wanted. The lower end is
`|R^T v| / |v|` for the Ritz vector `v`: a norm that is reached, so it never exceeds the truth. Both ends are moved by
the rounding of the products. Where `b k` is no less than the smaller side, an SVD is made instead.

Cost: `2 k` passes over the weight, each of `b` vectors: 22 for a 4096 x 4096 weight at one percent and five percent
width, where one vector alone would take 34. The vectors are rows: skinny products are several times faster so.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rsi_deploy.kernel.checks import settled
from rsi_deploy.kernel.factors import Factors
from rsi_deploy.kernel.products import working_dtype

FAILURE = 0.01
BLOCK = 4
DOUBLE = 1 << 18  # up to so many numbers everything is in float64: no rounding to speak of
WIDTH = 0.045  # of the upper end over the lower; the rest of five percent is left to roundings
SQUARED = 1e-15  # below such a norm in float32, some squares are lost
EMPTY = 1e-12  # what is added to a block, in units of the weight's norm squared: where it is zero, it is random then


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
        directions: orthonormal, `(..., few, out)`; float64 for a small weight, else in the working precision.
        images: `directions @ R (..., few, in)`.
    """

    interval: Interval
    directions: Tensor
    images: Tensor


def lanczos_gap(steps: int, n: int, failure: float) -> float:
    """`e` of the theorem: with at most this probability of failure, `l <= t_k / (1 - e)`; 1 where it says nothing."""
    root = math.log(1.648 * math.sqrt(n) / failure) / (2 * steps - 1)
    return min(root**2, 1.0)


def lanczos_steps(n: int, failure: float = FAILURE, width: float = WIDTH) -> int:
    """The least number of steps whose upper end is at most `1 + width` times the Ritz value's root."""
    gap = 1 - (1 + width) ** -2
    return math.ceil((math.log(1.648 * math.sqrt(n) / failure) / math.sqrt(gap) + 1) / 2)


def certified_norm(
    weight: Tensor, factors: Factors, *, failure: float = FAILURE, width: float = WIDTH, seed: int = 0
) -> Interval:
    """An interval of `||W - left @ right||_2` that holds with probability `1 - failure`, for the whole batch at once.

    Args:
        weight: `(..., out, in)`, floating.
        factors: `left (..., out, rank)`, `right (..., rank, in)`; a rank of 0 gives the norm of the weight.
        failure: the probability that any of the norms lies above its upper end.
        width: of the interval, relative to its lower end, before roundings.
        seed: of the starts, which must not depend on the weight.
    """
    return searched(weight, factors, failure=failure, width=width, seed=seed).interval


def searched(
    weight: Tensor, factors: Factors, *, failure: float = FAILURE, width: float = WIDTH, seed: int = 0
) -> Search:
    """As `certified_norm`, with what was searched."""
    W = settled(weight.detach())
    single = W[..., 0, 0].numel() == 1
    batch = () if single else (W[..., 0, 0].numel(),)  # one matrix as such: products in batches are slower
    dtype = torch.float64 if W.shape[-2] * W.shape[-1] <= DOUBLE else working_dtype(W)
    W, L, R = (part.detach().reshape(*batch, *part.shape[-2:]).to(dtype) for part in (W, *factors))
    side = W.shape[-2]
    each = (failure / math.prod(batch)) ** (1 / BLOCK)
    steps = lanczos_steps(side, each, width)
    if min(W.shape[-2:]) <= max(BLOCK * steps, 32):
        lower, upper, directions, images = _exact(W, L, R, BLOCK * steps)
        u = directions[..., 0, :]
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(*batch, 2 * BLOCK, side, generator=generator, dtype=torch.float64).to(W.device, dtype)
        size = _size(W)
        directions, images = _lanczos(W, L, R, start, steps, size)
        lower, upper, u = _ends(W, L, R, directions, images, size, lanczos_gap(steps, side, each))
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


def _lanczos(W: Tensor, L: Tensor, R: Tensor, start: Tensor, steps: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """A basis of the block Krylov space of `R R^T` and its images in units of `size`, rows both.

    Args:
        W: `(..., out, in)`.
        L: `(..., out, rank)`.
        R: `(..., rank, in)`.
        start: Gaussian, `(..., 2 * BLOCK, out)`: the start, and what fills up a space that ends before.
        steps: blocks of the basis.
        size: of the weight, `(..., 1, 1)`.
    """
    unit = torch.where(size > 0, 1 / size.clamp_min(torch.finfo(size.dtype).tiny), 0)
    filler = start[..., BLOCK:, :] * EMPTY
    basis = W.new_empty(*W.shape[:-2], steps * BLOCK, W.shape[-2])
    images = W.new_empty(*W.shape[:-2], steps * BLOCK, W.shape[-1])
    v = _orthonormal_rows(start[..., :BLOCK, :])
    for index in range(steps):
        now, known = slice(index * BLOCK, (index + 1) * BLOCK), basis[..., : (index + 1) * BLOCK, :]
        basis[..., now, :] = v
        x = (v @ W - (v @ L) @ R) * unit
        images[..., now, :] = x
        if index + 1 < steps:
            v = (x @ W.mT - (x @ R.mT) @ L.mT) * unit + filler
            for _ in range(2):  # once more: what was nearly dependent is no longer orthogonal after the first
                v = _orthonormal_rows(v - (v @ known.mT) @ known)
    return basis, images


def _ends(
    W: Tensor, L: Tensor, R: Tensor, basis: Tensor, images: Tensor, size: Tensor, gap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper end `(...)`, float64, and the Ritz vector `(..., out)`, by Rayleigh and Ritz."""
    values, vectors = torch.linalg.eigh(images @ images.mT)
    best = vectors[..., -1:].mT @ basis
    best = best / torch.linalg.vector_norm(best, dim=-1, keepdim=True)
    image = best @ W - (best @ L) @ R
    size = size[..., 0, 0].double()
    scale = torch.where(size > 0, size, 1)[..., None, None]  # squares of tiny numbers would vanish
    reached = torch.linalg.vector_norm(image / scale.to(image.dtype), dim=(-2, -1), dtype=torch.float64) * size
    slack = 2 * torch.finfo(W.dtype).eps * size
    ritz = values[..., -1].double().clamp_min(0).sqrt() * size
    upper = torch.maximum(ritz, reached) / math.sqrt(1 - gap) + slack
    return (reached - slack).clamp_min(0), upper, best[..., 0, :]


def _size(W: Tensor) -> Tensor:
    """`|W|_F (..., 1, 1)`, finite; where its squares leave what floats hold, of the weight scaled to 1."""
    size = torch.linalg.vector_norm(W.flatten(-2), dim=-1)
    if not bool((torch.isfinite(size) & (size > SQUARED)).all()):
        largest = torch.linalg.vector_norm(W.flatten(-2), ord=torch.inf, dim=-1)
        scaled = W / largest.clamp_min(torch.finfo(W.dtype).tiny)[..., None, None]
        size = (torch.linalg.vector_norm(scaled.flatten(-2), dim=-1) * largest).clamp_max(torch.finfo(W.dtype).max)
    return size[..., None, None]


def _orthonormal_rows(v: Tensor) -> Tensor:
    return torch.linalg.qr(v.mT).Q.mT
