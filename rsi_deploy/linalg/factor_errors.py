"""The errors of factors in a site's record.

Frobenius      by Pythagoras, or from the residual a few rows at a time
spectral       a certified interval (`linalg.certified_norm`) over s_1
normalized     its upper end over s_{rank+1}: exact for a small weight, else bounded by interlacing
"""

import math
from typing import Any

import torch
from torch import Tensor

from rsi_deploy.linalg.certified_norm import FAILURE, Search, search_norm
from rsi_deploy.linalg.solver import Factors, certified_norm, rounding_level, singular_values
from rsi_deploy.linalg.spectra import thin_spectrum

# Up to this full rank the optimum s_{rank+1} comes from an exact spectrum (some ms); above it from a bound.
EXACT_SPECTRUM_LIMIT = 128
# Up to this ratio of the residual's norm to s_1, an s_1 that the factors miss is less than 2 % above the one they have.
SMALL_BESIDE = 0.2
TOP_WIDTH = 0.3  # width of the interval in a separate search for s_1; its lower end is much closer
# Least ratio of the smallest to the largest singular value that a float32 Gram matrix resolves to 1e-3.
RESOLVED = 0.05


def factor_errors(weight: Tensor, factors: Factors, projected: bool) -> dict[str, Any]:
    """Return the record's errors, of the worst group where they are per group, and the spectrum computed for them.

    Args:
        weight: `(groups, out, in)`.
        factors: `left (groups, out, rank)`, `right (groups, rank, in)`, as stored.
        projected: whether `left` is orthonormal and `right` is `left^T W`, which saves work.
    """
    rank = factors.left.shape[-1]
    full = min(weight.shape[-2:])
    if len(weight) == 1:  # a single matrix has no batch dimension, as batched products are slower
        weight, factors = weight[0], Factors(factors.left[0], factors.right[0])
    found = search_norm(weight, factors)
    residual = found.interval
    frobenius = _frobenius_error(weight, factors, projected)
    if full <= EXACT_SPECTRUM_LIMIT:
        s = singular_values(weight)
        top = s[..., 0]
        optimum = s[..., rank] if rank < full else torch.zeros_like(top)
    else:
        top, s = _bounded_spectrum(weight, factors, found, projected)
        optimum = s[..., -1]
    norm = residual.upper if full > EXACT_SPECTRUM_LIMIT else residual.lower
    # The optimum is at least the rounding level (full rank, or a weight of lower rank than the factors).
    ratio = norm / torch.maximum(optimum, top * rounding_level(weight.dtype)).clamp_min(1e-300)
    return {
        "frobenius_error": frobenius,
        "spectral_error": float((residual.lower / top.clamp_min(1e-300)).max()),
        "residual_interval": (float(residual.lower.max()), float(residual.upper.max())),
        "residual_failure": FAILURE,
        "normalized_error": max(float(ratio.max()), 1.0),
        "normalized_error_kind": "exact" if full <= EXACT_SPECTRUM_LIMIT else "upper bound",
        "spectrum": thin_spectrum(s, full, rank),
    }


def _bounded_spectrum(weight: Tensor, factors: Factors, found: Search, projected: bool) -> tuple[Tensor, Tensor]:
    """Return `s_1` and lower bounds of `s_1` to `s_{rank+1}` from the factors, without a spectrum of the weight.

    For orthonormal `Q (out, rank+few)`, `s_{rank+1}(Q^T W) <= s_{rank+1}(W)` (interlacing). `Q` spans `left` and the
    directions that were searched for the residual's norm. These contain what the last directions of `left` miss, and
    their products with the weight are known.
    """
    W = weight.to(_working(weight))
    full, rank = min(W.shape[-2:]), factors.left.shape[-1]
    left, directions, images = factors.left.to(W.dtype), found.directions.to(W.dtype), found.images.to(W.dtype)
    if not projected:
        B = torch.linalg.qr(torch.cat([left, directions.mT], dim=-1)).Q.mT @ W
        known, beside = B[..., :rank, :], B[..., rank:, :]
    else:
        # With N = T (1 - left left^T) directions orthonormal: N W = T (directions @ residual) = T images.
        apart = directions - (directions @ left) @ left.mT
        values, vectors = torch.linalg.eigh(apart @ apart.mT)
        scale = torch.where(values > 0.01, values.clamp_min(0.01).rsqrt(), 0)  # the others lie in the span of `left`
        known, beside = factors.right.to(W.dtype), scale[..., None] * (vectors.mT @ images)
    s = _leading_values(known, beside, min(rank + 1, full))
    s = torch.nn.functional.pad(s, (0, rank + 1 - s.shape[-1]))  # at full rank there is no s_{rank+1}
    # Factors may miss the leading direction (RSVD does): |W|^2 <= |Q^T W|^2 + |residual|^2 bounds what they can miss.
    top = s[..., 0]
    if bool((found.interval.upper > SMALL_BESIDE * top).any()):
        nothing = Factors(factors.left[..., :0], factors.right[..., :0, :])
        top = torch.maximum(top, certified_norm(weight, nothing, width=TOP_WIDTH).lower)
    return top, s


def _leading_values(first: Tensor, last: Tensor, count: int) -> Tensor:
    """Return the leading singular values of the rows of `first` and `last (..., n, in)`, descending, float64.

    They come from a Gram matrix in float32 if that resolves the last of them, else in float64.
    """
    largest: Tensor = torch.linalg.vector_norm(first.flatten(-2), ord=torch.inf, dim=-1)[..., None, None]
    if bool(((largest < 1e-8) & (largest > 0) | (largest > 1e8)).any()):  # squares would leave what float32 holds
        largest = largest.clamp_min(torch.finfo(first.dtype).tiny)
        return _leading_values(first / largest, last / largest, count) * largest[..., 0].double()
    for dtype in (torch.float32, torch.float64)[first.dtype == torch.float64 :]:
        values = torch.linalg.eigvalsh(_upper_gram(first, last, dtype), UPLO="U").flip(-1)[..., :count]
        s: Tensor = values.double().clamp_min(0).sqrt()
        if bool((s[..., -1] > RESOLVED * s[..., 0]).all()):
            break
    return s


def _upper_gram(first: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the upper triangle of `B B^T`, `B (..., n, in)` the rows of both, summed over columns to save memory."""
    k = first.shape[-2]
    n, half = k + last.shape[-2], k // 2
    gram = torch.zeros(*first.shape[:-2], n, n, dtype=dtype, device=first.device)
    for columns in zip(torch.split(first, 4096, dim=-1), torch.split(last, 4096, dim=-1), strict=True):
        a, b = (part.to(dtype) for part in columns)
        gram[..., :half, :k] += a[..., :half, :] @ a.mT
        gram[..., half:k, half:k] += a[..., half:, :] @ a[..., half:, :].mT
        gram[..., :k, k:] += a @ b.mT
        gram[..., k:, k:] += b @ b.mT
    return gram


def _frobenius_error(weight: Tensor, factors: Factors, projected: bool, *, rows: int = 256) -> float:
    """Return `||W - left @ right||_F / ||W||_F` without a residual of the weight's size.

    If `left @ right` is a projection of `W`, Pythagoras gives the residual, unless it is so small that the difference
    would cancel. Then, and for other factors, it is summed over blocks of rows.
    """
    total = _squared_norm(weight)
    if total == 0:
        return 0.0
    if projected and (error := 1 - _squared_norm(factors.right) / total) > 1e-3:
        return math.sqrt(error)
    left, right = (factor.to(_working(weight)) for factor in factors)
    residual = 0.0
    for start in range(0, weight.shape[-2], rows):
        block = weight[..., start : start + rows, :].to(left.dtype) - left[..., start : start + rows, :] @ right
        residual += _squared_norm(block)
    return math.sqrt(residual / total)


def _squared_norm(values: Tensor, *, rows: int = 256) -> float:
    """Return `||values||_F^2`, summed in float64 over blocks of rows."""
    blocks = (values[..., start : start + rows, :] for start in range(0, values.shape[-2], rows))
    return math.fsum(float(torch.linalg.vector_norm(block, dtype=_working(block))) ** 2 for block in blocks)


def _working(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
