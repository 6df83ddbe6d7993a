"""One site's factorization and the record of it: shared by the PyTorch way and the ONNX way."""

from contextlib import suppress

import torch
from torch import Tensor

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import SiteRecord, unmeasured_record
from rsi_deploy.linalg.batched_solver import Solves
from rsi_deploy.linalg.factor_errors import errors_of
from rsi_deploy.linalg.memory import on_cpu
from rsi_deploy.linalg.solver import Factors


def factorize_site(
    weight: Tensor,
    rank: int,
    solver: Solves,
    *,
    name: str,
    kind: str,
    reason: str = "split",
    nodes: tuple[str, ...] = (),
) -> tuple[Factors, SiteRecord]:
    """Factorize one site's `weight (groups, out, in)` at `rank` and measure the factors' errors.

    Args:
        weight: of the site.
        rank: of the factors.
        solver: computes them.
        name: of the site.
        kind: of operation.
        reason: of the decision; the record adds what came otherwise than requested.
        nodes: that use the weight.

    Returns:
        factors `left (groups, out, rank)`, `right (groups, rank, in)` in the weight's dtype, and the record.

    Raises:
        ModelError: the weight holds NaN or infinite values; the site is named.
    """
    try:
        factors, route, iterations, note, seconds = solver.solve(weight, rank, site=name)
    except ValueError as error:
        raise ModelError(f"{error} (type --exclude {name!r} to leave it dense)") from error
    # 16-bit factors are stored balanced and rounded: `left` is not orthonormal, `right` is not left^T W.
    projected = weight.dtype.itemsize >= 4
    reason = f"{reason}; {note}" if note else reason
    record = split_record(name, kind, weight, factors, reason=reason, seconds=seconds, projected=projected, nodes=nodes)
    return factors, record.model_copy(update={"route": route, "power_iterations": iterations})


def split_record(
    name: str,
    kind: str,
    weight: Tensor,
    factors: Factors,
    *,
    reason: str,
    seconds: float,
    projected: bool,
    nodes: tuple[str, ...] = (),
) -> SiteRecord:
    """The record of a site split into `factors`, with their errors measured on `weight (groups, out, in)`.

    Args:
        name: of the site.
        kind: of operation.
        weight: what the factors stand for.
        factors: as stored.
        reason: of the decision.
        seconds: that the factorization took.
        projected: whether `left` is orthonormal and `right` is `left^T W`, which saves work.
        nodes: that use the weight.
    """
    record = unmeasured_record(
        name,
        kind,
        (weight.shape[0], weight.shape[1], weight.shape[2]),
        factors.left.shape[-1],
        factors.left.numel() + factors.right.numel(),
        reason=reason,
        seconds=seconds,
        nodes=nodes,
    )
    errors = None
    with suppress(torch.OutOfMemoryError):
        errors = errors_of(weight, factors, projected)
    if errors is None:
        W, left, right = on_cpu(weight, *factors)
        errors = errors_of(W, Factors(left, right), projected)
        errors["reason"] = f"{reason}; errors measured on the CPU, for want of GPU memory"
    return record.model_copy(update=errors)
