"""Factorize one site and make its record, for PyTorch and ONNX models."""

from contextlib import suppress

import torch
from torch import Tensor

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import SiteRecord, unmeasured_record
from rsi_deploy.linalg.batched_solver import SolverLike
from rsi_deploy.linalg.factor_errors import factor_errors
from rsi_deploy.linalg.memory import on_cpu
from rsi_deploy.linalg.solver import Factors


def factorize_site(
    weight: Tensor,
    rank: int,
    solver: SolverLike,
    *,
    name: str,
    kind: str,
    reason: str = "split",
    nodes: tuple[str, ...] = (),
) -> tuple[Factors, SiteRecord]:
    """Factorize one site's `weight (groups, out, in)` at `rank` and measure the factors' errors.

    Args:
        weight: weight of the site.
        rank: rank of the factors.
        solver: solver that computes them.
        name: name of the site.
        kind: kind of operation.
        reason: reason of the decision; the record adds the solver's note.
        nodes: operations that use the weight.

    Returns:
        Factors `left (groups, out, rank)`, `right (groups, rank, in)` in the weight's dtype, and the record.

    Raises:
        ModelError: The weight has NaN or infinite values; the message names the site.
    """
    try:
        factors, route, iterations, note, seconds = solver.solve(weight, rank, site=name)
    except ValueError as error:
        raise ModelError(f"{error} (type --exclude {name!r} to leave it dense)") from error
    # 16-bit factors are balanced and rounded, so `left` is not orthonormal and `right` is not left^T W.
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
    """Return the record of a site split into `factors`, with their errors measured on `weight (groups, out, in)`.

    Args:
        name: name of the site.
        kind: kind of operation.
        weight: original weight.
        factors: factors as stored.
        reason: reason of the decision.
        seconds: time of the factorization.
        projected: whether `left` is orthonormal and `right` is `left^T W`, which saves work.
        nodes: operations that use the weight.
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
        errors = factor_errors(weight, factors, projected)
    if errors is None:
        W, left, right = on_cpu(weight, *factors)
        errors = factor_errors(W, Factors(left, right), projected)
        errors["reason"] = f"{reason}; errors measured on the CPU, as the GPU's memory is too small"
    return record.model_copy(update=errors)
