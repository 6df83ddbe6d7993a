"""One shared right factor for weights that multiply the same input (q, k, v; gate and up), if it is smaller.

    separate  W_i ~ left_i @ right_i    sum of rank_i (out_i + in) numbers,  e_i = ||W_i - left_i right_i|| / ||W_i||
    shared    W_i ~ left_i @ right      rank (sum of out_i + in) numbers,    no weight's error above its e_i

The weights are divided by their norms, so that small ones count as much as large ones, stacked, and factorized at the
largest rank that is smaller than the separate factors. After a rotation to `right = S V^T`, these factors contain those
of every lower rank, with the error

    ||W - left_r right_r||^2 = ||E||^2 + sum over j > r of (2 s_j x_j . E v_j + s_j^2 ||x_j||^2),   E = W - left @ right

of each weight, where x_j are the columns of its rows of `left`. The smallest rank that meets every e_i is taken. All
norms are Frobenius norms.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.linalg.site_factors import split_record
from rsi_deploy.linalg.solver import Factors, Solver, balanced, rounding_level


def factorize_with_shared_right(
    weights: Sequence[Tensor], alone: Sequence[SiteRecord], solver: Solver
) -> tuple[Factors, list[SiteRecord]] | None:
    """Factorize `weights` with one right factor; return None if that is not smaller at the same errors.

    Args:
        weights: two or more weights `(1, out_i, in)` of one dtype on one device.
        alone: records of the separate splits, with the errors that must not increase.
        solver: solver that computes the factors.

    Returns:
        `left (1, sum of out_i, rank)` and `right (1, rank, in)` in the dtype of the weights, and a record per weight
        with the error of its own rows. The first record counts the parameters of `right`, so that sums are correct.
    """
    started = time.perf_counter()
    dtype = weights[0].dtype
    stacked, norms = _stacked(weights)
    name = " + ".join(record.name for record in alone)
    left, right = _ordered(solver(stacked, largest_cheaper_rank(alone), site=name))
    rank = _smallest_rank(stacked, Factors(left, right), alone, rounding_level(dtype))
    if rank is None:
        return None
    left, right = left[..., :rank] * norms, right[..., :rank, :].contiguous()
    if dtype.itemsize < 4:
        left, right = balanced(left, right)
    factors = Factors(left.to(dtype), right.to(dtype))
    return factors, _records(weights, factors, alone, time.perf_counter() - started)


def _records(
    weights: Sequence[Tensor], factors: Factors, alone: Sequence[SiteRecord], seconds: float
) -> list[SiteRecord]:
    """Return the record of each weight. The first one includes the parameters and the time of the shared factor."""
    names = tuple(record.name for record in alone)
    records, end = [], 0
    for record, weight in zip(alone, weights, strict=True):
        start, end = end, end + record.out_features
        own = Factors(factors.left[..., start:end, :], factors.right)
        joint = split_record(
            record.name,
            record.kind,
            weight,
            own,
            reason=f"jointly with {', '.join(name for name in names if name != record.name)}",
            seconds=(record.seconds or 0) + (0 if start else seconds),
            projected=False,
        )
        update: dict[str, Any] = {"joint": names}
        if start:
            update["params_compressed"] = own.left.numel()
        if own.left.shape[-1] >= min(weight.shape[-2:]):  # the optimum at full rank is 0, so there is no ratio to it
            update |= {"normalized_error": None, "normalized_error_kind": None}
        records.append(joint.model_copy(update=update))
    return records


def largest_cheaper_rank(alone: Sequence[SiteRecord]) -> int:
    """Return the largest rank at which the shared factors have fewer parameters than the separate ones."""
    in_features = alone[0].in_features
    cost = sum(record.params_compressed for record in alone)
    return (cost - 1) // (sum(record.out_features for record in alone) + in_features)


def _stacked(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the stacked weights, each of norm 1, in float32 or float64, and the norm of every row's weight."""
    first = weights[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    rows = sum(weight.shape[-2] for weight in weights)
    stacked = torch.empty(1, rows, first.shape[-1], dtype=dtype, device=first.device)
    norms = torch.ones(1, rows, 1, dtype=dtype, device=first.device)
    end = 0
    for weight in weights:
        start, end = end, end + weight.shape[-2]
        part = stacked[:, start:end].copy_(weight)
        if norm := float(torch.linalg.vector_norm(part, dtype=torch.float64)):
            part.div_(norm)
            norms[:, start:end] = norm
    return stacked, norms


def _ordered(factors: Factors) -> Factors:
    """Rotate the factors so that `right = S V^T` has orthogonal rows, the largest first."""
    right = factors.right.double()
    U = torch.linalg.eigh(right @ right.mT).eigenvectors.flip(-1).to(factors.right.dtype)
    return Factors(factors.left @ U, U.mT @ factors.right)


def _smallest_rank(stacked: Tensor, factors: Factors, alone: Sequence[SiteRecord], rounding: float) -> int | None:
    """Return the smallest rank at which no weight's error exceeds that of its own split up to rounding, or None."""
    fits = torch.ones(factors.left.shape[-1], dtype=torch.bool)
    end = 0
    for record in alone:
        start, end = end, end + record.out_features
        errors = _squared_errors(stacked[0, start:end], Factors(factors.left[0, start:end], factors.right[0]))
        fits &= errors <= max(record.frobenius_error or 0.0, rounding) ** 2
    ranks = fits.nonzero()
    return int(ranks[0]) + 1 if len(ranks) else None


def _squared_errors(weight: Tensor, factors: Factors, *, rows: int = 256) -> Tensor:
    """Return `||W - left[:, :r] @ right[:r]||_F^2` for r = 1, 2, ..., float64. The rows of `right` are orthogonal."""
    left, right = factors
    squares = right.double().square().sum(-1)  # s_j^2
    whole, terms = 0.0, torch.zeros_like(squares)
    for start in range(0, len(weight), rows):
        X = left[start : start + rows]
        E = weight[start : start + rows] - X @ right
        whole += float(torch.linalg.vector_norm(E, dtype=torch.float64)) ** 2
        X, C = X.double(), (E @ right.mT).double()  # C: s_j E v_j
        terms += (2 * X * C + X.square() * squares).sum(0)
    dropped = terms.flip(0).cumsum(0).flip(0)  # sum over j >= r, r from 0
    return whole + torch.cat([dropped[1:], dropped.new_zeros(1)]).clamp_min(-whole).cpu()
