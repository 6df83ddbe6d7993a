"""A certified interval of a residual's norm `||W - left @ right||_2`: Lanczos from below, a theorem above.

With `A = R^T R` (or `R R^T`, whichever is smaller, `n x n`), `l` its largest eigenvalue, `t_k` the largest Ritz value
of `k` Lanczos steps from a start drawn uniformly from the sphere (Kuczynski and Wozniakowski 1992, SIAM J. Matrix Anal.
Appl. 13(4), theorem 4.2):

    P( l > t_k / (1 - e) )  <=  1.648 sqrt(n) exp(-sqrt(e) (2k - 1))

whatever the eigenvalues. Solved for `e` at the failure probability wanted and `k` steps, the upper end is
`sqrt(t_k / (1 - e))`; `k` is the least with `sqrt(1 / (1 - e)) <= 1 + width` for the width wanted. The lower end is
`|R v| / |v|` in float64 for the Ritz vector `v`: a norm that is reached, so it never exceeds the truth. Both ends are
moved by the rounding of the products. Where `k >= n`, the eigenvalues are computed instead.

Cost: `2 k` passes over the weight, 32 for a 4096 x 4096 weight at one percent and five percent width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rsi_deploy.kernel.checks import settled
from rsi_deploy.kernel.factors import Factors
from rsi_deploy.kernel.products import working_dtype

FAILURE = 0.01
DOUBLE = 1 << 20  # up to so many numbers everything is in float64: no rounding to speak of
WIDTH = 0.045  # of the upper end over the lower; the rest of five percent is left to roundings


class Interval(NamedTuple):
    """Ends of an interval of `||W - left right||_2`, float64, one per leading batch entry, and the direction found.

    `lower <= norm` always; `norm <= upper` but for the failure probability. `u (..., out)` is the unit vector with
    `|R^T u|` about `lower`, in the working precision.
    """

    lower: Tensor
    upper: Tensor
    u: Tensor


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
        seed: of the start vector, which must not depend on the weight.
    """
    W = settled(weight.detach()).flatten(0, -3) if weight.ndim > 2 else settled(weight.detach())[None]
    dtype = working_dtype(W)
    if W.numel() <= DOUBLE:
        dtype = torch.float64
    W = W.to(dtype)
    L, R = (factor.detach().to(dtype).reshape(len(W), *factor.shape[-2:]) for factor in factors)
    generator = torch.Generator().manual_seed(seed)
    n = min(W.shape[-2:])
    steps = lanczos_steps(n, failure / len(W), width)
    if steps >= n or n <= 32:
        lower, upper, u = _exact(W, L, R)
    else:
        start = torch.randn(len(W), n, 1, generator=generator, dtype=torch.float64).to(W.device, dtype)
        lower, upper, u = _lanczos(W, L, R, start, steps, lanczos_gap(steps, n, failure / len(W)))
    lower, upper = (end.reshape(weight.shape[:-2]) for end in (lower, upper))
    return Interval(lower, upper, u.reshape(weight.shape[:-1]).to(working_dtype(weight)))


def _exact(W: Tensor, L: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the eigenvalues of the small Gram matrix of the residual, in float64."""
    residual = W.double() - L.double() @ R.double()
    U, S, _ = torch.linalg.svd(residual, full_matrices=False)
    slack = 1e-13 * torch.linalg.matrix_norm(W.double())
    return (S[..., 0] - slack).clamp_min(0), S[..., 0] + slack, U[..., 0].to(W.dtype)


def _lanczos(W: Tensor, L: Tensor, R: Tensor, start: Tensor, steps: int, gap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos with full reorthogonalization on the smaller of `R^T R` and `R R^T`, from `start (batch, n, 1)`."""
    turned = W.shape[-2] < W.shape[-1]
    if turned:  # the residual's transpose has the same norm, and the smaller side is then the inner one
        W, L, R = W.mT, R.mT, L.mT
    size = torch.linalg.vector_norm(W, dim=(-2, -1), dtype=torch.float64)
    largest = torch.linalg.vector_norm(W, ord=torch.inf, dim=(-2, -1)).double()
    size = torch.where(torch.isfinite(size), size, largest * (W.shape[-2] * W.shape[-1]) ** 0.5)
    unit = torch.where(size > 0, 1 / size.clamp_min(torch.finfo(W.dtype).tiny), 0)[:, None, None].to(W.dtype)
    v = start / start.norm(dim=-2, keepdim=True)
    basis, images = [v], []
    for index in range(steps):
        u = (W @ v - L @ (R @ v)) * unit
        images.append(u)
        if index + 1 == steps:
            break
        w = (W.mT @ u - R.mT @ (L.mT @ u)) * unit
        V = torch.cat(basis, dim=-1)
        w = w - V @ (V.mT @ w)
        w = w - V @ (V.mT @ w)
        norm = w.norm(dim=-2, keepdim=True)
        v = w / norm.clamp_min(torch.finfo(W.dtype).tiny)  # an invariant space: what is added then does no harm
        basis.append(v)
    # Rayleigh-Ritz on the span: the singular values of R V are the roots of the Ritz values.
    RV = torch.cat(images, dim=-1).double()
    A, S, Bh = torch.linalg.svd(RV, full_matrices=False)
    ritz = S[..., 0] / unit[:, 0, 0].double().clamp_min(1e-300)
    best = (torch.cat(basis, dim=-1).double() @ Bh[..., :1, :].mT).to(W.dtype)
    reached = _in_float64(W, L, R, best)
    lower = torch.linalg.vector_norm(reached, dim=(-2, -1)) / torch.linalg.vector_norm(best.double(), dim=(-2, -1))
    slack = 2 * torch.finfo(W.dtype).eps * size
    upper = torch.maximum(ritz, lower) / math.sqrt(1 - gap) + slack
    zero = size == 0
    lower, upper = (torch.where(zero, torch.zeros_like(end), end) for end in (lower, upper))
    u = best if turned else A[..., :1].to(W.dtype)
    return lower, upper, (u / u.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)).squeeze(-1)


def _in_float64(W: Tensor, L: Tensor, R: Tensor, v: Tensor, *, rows: int = 256) -> Tensor:
    """`(W - L R) v` in float64, blocks of rows at a time."""
    v, right = v.double(), R.double() @ v.double()
    blocks = []
    for start in range(0, W.shape[-2], rows):
        part = slice(start, start + rows)
        blocks.append(W[:, part].double() @ v - L[:, part].double() @ right)
    return torch.cat(blocks, dim=-2)
