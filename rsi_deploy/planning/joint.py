"""One right factor for weights that multiply the same input (q, k, v; gate and up), where it costs less.

    alone     W_i ~ left_i @ right_i    sum of rank_i (out_i + in) numbers,  e_i = ||W_i - left_i right_i|| / ||W_i||
    jointly   W_i ~ left_i @ right      rank (sum of out_i + in) numbers,    no weight's error above its e_i

The weights are stacked, each divided by its norm so that a small one counts as much as a large one, and factorized at
the largest rank that costs less. Turned so that `right = S V^T`, these factors hold those of every lower rank, and

    ||W - left_r right_r||^2 = ||E||^2 + sum over j > r of (2 s_j x_j . E v_j + s_j^2 ||x_j||^2),   E = W - left @ right

(x_j the columns of a weight's rows of `left`) tells every weight's error at all of them; the smallest that will do is
taken. All norms are Frobenius norms.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsi_deploy.core.sites import SiteRecord
from rsi_deploy.linalg.site_factors import split_record
from rsi_deploy.linalg.solver import Factors, Solver, balanced, rounding_level


def factorize_jointly(
    weights: Sequence[Tensor], alone: Sequence[SiteRecord], solver: Solver
) -> tuple[Factors, list[SiteRecord]] | None:
    """Factorize `weights` with one right factor, or None where that costs no less for the same errors.

    Args:
        weights: two or more, `(1, out_i, in)`, of one dtype and on one device.
        alone: the record of each one's split alone: its rank, and the error that is to be kept.
        solver: computes the factors.

    Returns:
        `left (1, sum of out_i, rank)` and `right (1, rank, in)` in the weights' dtype, and a record for each weight
        with the error of its own rows. The first one bears the parameters of `right`, so that sums are right.
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
    """Each weight's record; the first also bears what the shared factor costs."""
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
        if own.left.shape[-1] >= min(weight.shape[-2:]):  # the best of this rank is the weight: no ratio to no error
            update |= {"normalized_error": None, "normalized_error_kind": None}
        records.append(joint.model_copy(update=update))
    return records


def largest_cheaper_rank(alone: Sequence[SiteRecord]) -> int:
    """The largest rank at which one shared right factor holds fewer numbers than the splits alone."""
    in_features = alone[0].in_features
    cost = sum(record.params_compressed for record in alone)
    return (cost - 1) // (sum(record.out_features for record in alone) + in_features)


def _stacked(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The weights of norm 1 on top of each other in float32 or float64, and the norm of every row's weight."""
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
    """The same product with the rows of `right` orthogonal and the largest first: `right = S V^T`, `left` turned."""
    right = factors.right.double()
    U = torch.linalg.eigh(right @ right.mT).eigenvectors.flip(-1).to(factors.right.dtype)
    return Factors(factors.left @ U, U.mT @ factors.right)


def _smallest_rank(stacked: Tensor, factors: Factors, alone: Sequence[SiteRecord], rounding: float) -> int | None:
    """The smallest rank at which no weight has a larger error than alone (but for rounding); None if there is none."""
    fits = torch.ones(factors.left.shape[-1], dtype=torch.bool)
    end = 0
    for record in alone:
        start, end = end, end + record.out_features
        errors = _squared_errors(stacked[0, start:end], Factors(factors.left[0, start:end], factors.right[0]))
        fits &= errors <= max(record.frobenius_error or 0.0, rounding) ** 2
    ranks = fits.nonzero()
    return int(ranks[0]) + 1 if len(ranks) else None


def _squared_errors(weight: Tensor, factors: Factors, *, rows: int = 256) -> Tensor:
    """`||W - left[:, :r] @ right[:r]||_F^2` for r = 1, 2, ..., where the rows of `right` are orthogonal; float64."""
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
