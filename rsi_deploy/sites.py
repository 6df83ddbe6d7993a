"""One site's factorization and the record of it: shared by the PyTorch way and the ONNX way."""

import math
import time
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from rsi_deploy.errors import ModelError
from rsi_deploy.kernel.certified import FAILURE
from rsi_deploy.kernel.orthogonal import orthonormal_
from rsi_deploy.plan.planner import break_even_rank
from rsi_deploy.rsi import Factors, Solver, certified_norm, rounding_level, singular_values
from rsi_deploy.spectra import Spectrum, thinned

# Up to this full rank the optimum s_{rank+1} comes from an exact spectrum (some ms); above it from a bound.
EXACT_SPECTRUM_LIMIT = 128


class SiteRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What was done at one site and what it cost. Errors are of the factors as stored, relative to the weight.

    Attributes:
        name: the weight's name less a final `.weight`.
        kind: the operation, e.g. "Linear", "Conv2d", "Gemm", "MatMul".
        out_features, in_features: the weight matrix `(out, in)`; per group where `groups > 1`.
        groups: of a grouped Conv, else 1.
        break_even_rank: `out*in/(out+in)`; at or above it nothing is saved.
        rank: of the split, None for a dense site.
        decision: "split" or "dense".
        reason: why, in words.
        params_dense, params_compressed: numbers in the weight, before and after.
        frobenius_error: `||W - left right||_F / ||W||_F`.
        spectral_error: `||W - left right||_2 / ||W||_2`, both from below.
        residual_interval: lower and upper end of `||W - left right||_2` itself, of the group where it is largest. The
            lower end is certain, the upper but for `residual_failure`.
        residual_failure: the probability that a norm lies above its upper end.
        normalized_error: `||W - left right||_2 / s_{rank+1}`, 1.0 is optimal.
        normalized_error_kind: "exact" spectrum or an "upper bound" for s_{rank+1} bounded from below. All four are
            None for factors that were fitted to data: those are not meant to be near the weight.
        form: of the split: "matmul", "gemm", "channel", "input", "separable"; None where it is dense or of no record.
        response_error: `E|y - y~|^2 / E|y|^2` on calibration data, centred, for factors fitted to them. Rows of a
            product (tokens) count in it, as in the fit, by what their errors do to the outputs.
        seconds: time of the factorization alone.
        route: that the kernel took: "direct", "chebyshev", "gram", "krylov", "exact"; "svd" for that method; None where
            factors were fitted to data. It can be forced by --route.
        power_iterations: that were done; 0 for exact factors.
        macs_dense, macs_compressed: multiply-accumulates per sample, where the model was traced.
        nodes: the operations (ONNX node names or module paths) that use the weight.
        joint: for a joint split, the names of all the sites that share `right`, in graph order; else empty. The first
            of them bears the parameters and MACs of `right`. Errors are those of the site's own weight, and its
            normalized error compares with the best of this rank for it alone (None where that is the weight itself).
        spectrum: singular values of the weight, as many as its errors took to compute (all of a small one, else the
            leading rank + 1); of the response for factors fitted to data. None where none were computed.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    groups: int = 1
    break_even_rank: float
    rank: int | None = None
    decision: Literal["split", "dense"]
    reason: str
    params_dense: int
    params_compressed: int
    frobenius_error: float | None = None
    spectral_error: float | None = None
    residual_interval: tuple[float, float] | None = None
    residual_failure: float | None = None
    normalized_error: float | None = None
    normalized_error_kind: Literal["exact", "upper bound"] | None = None
    form: str | None = None
    response_error: float | None = None
    seconds: float | None = None
    route: str | None = None
    power_iterations: int | None = None
    macs_dense: int | None = None
    macs_compressed: int | None = None
    nodes: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    spectrum: Spectrum | None = None


def dense_record(
    name: str,
    kind: str,
    out_features: int,
    in_features: int,
    reason: str,
    *,
    groups: int = 1,
    nodes: tuple[str, ...] = (),
) -> SiteRecord:
    """The record of a site that stays dense, with its reason."""
    params = groups * out_features * in_features
    return SiteRecord(
        name=name,
        kind=kind,
        out_features=out_features,
        in_features=in_features,
        groups=groups,
        break_even_rank=break_even_rank(out_features, in_features) if params else 0.0,
        decision="dense",
        reason=reason,
        params_dense=params,
        params_compressed=params,
        nodes=nodes,
    )


def factorize_site(
    name: str,
    kind: str,
    weight: Tensor,
    rank: int,
    solver: Solver,
    *,
    reason: str = "split",
    nodes: tuple[str, ...] = (),
) -> tuple[Factors, SiteRecord]:
    """Factorize one site's `weight (groups, out, in)` at `rank` and measure the factors' errors.

    Returns:
        factors `left (groups, out, rank)`, `right (groups, rank, in)` in the weight's dtype, and the record.

    Raises:
        ModelError: the weight holds NaN or infinite values; the site is named.
    """
    started = time.perf_counter()
    try:
        factors, route, iterations, note = solver.solve(weight, rank, site=name)
    except ValueError as error:
        raise ModelError(f"{error} (type --exclude {name!r} to leave it dense)") from error
    seconds = time.perf_counter() - started
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
    return record.model_copy(update=_errors(weight, factors, projected))


def unmeasured_record(
    name: str,
    kind: str,
    shape: tuple[int, int, int],
    rank: int,
    params: int,
    *,
    reason: str,
    seconds: float,
    nodes: tuple[str, ...] = (),
) -> SiteRecord:
    """The record of a split site, without any error.

    Args:
        name: of the site.
        kind: of operation.
        shape: `(groups, out, in)` of the weight.
        rank: of the split.
        params: numbers in both factors.
        reason: of the decision.
        seconds: that the factorization took.
        nodes: that use the weight.
    """
    groups, out_features, in_features = shape
    return SiteRecord(
        name=name,
        kind=kind,
        out_features=out_features,
        in_features=in_features,
        groups=groups,
        break_even_rank=break_even_rank(out_features, in_features),
        rank=rank,
        decision="split",
        reason=reason,
        params_dense=groups * out_features * in_features,
        params_compressed=params,
        seconds=seconds,
        nodes=nodes,
    )


def _errors(weight: Tensor, factors: Factors, projected: bool) -> dict[str, Any]:
    """The record's errors, the worst group's where they are not of all, and the spectrum that they took."""
    rank = factors.left.shape[-1]
    full = min(weight.shape[-2:])
    residual = certified_norm(weight, factors)
    frobenius = _frobenius_error(weight, factors, projected)
    if full <= EXACT_SPECTRUM_LIMIT:
        s = singular_values(weight)
        top = s[..., 0]
        optimum = s[..., rank] if rank < full else torch.zeros_like(top)
    else:
        top, s = _bounded_spectrum(weight, factors, residual.u, projected)
        optimum = s[..., -1]
    norm = residual.upper if full > EXACT_SPECTRUM_LIMIT else residual.lower
    # No optimum is below the rounding level (full rank, or a weight of lower rank than asked).
    ratio = norm / torch.maximum(optimum, top * rounding_level(weight.dtype)).clamp_min(1e-300)
    return {
        "frobenius_error": frobenius,
        "spectral_error": float((residual.lower / top.clamp_min(1e-300)).max()),
        "residual_interval": (float(residual.lower.max()), float(residual.upper.max())),
        "residual_failure": FAILURE,
        "normalized_error": max(float(ratio.max()), 1.0),
        "normalized_error_kind": "exact" if full <= EXACT_SPECTRUM_LIMIT else "upper bound",
        "spectrum": thinned(s, full, rank),
    }


def _bounded_spectrum(weight: Tensor, factors: Factors, u: Tensor, projected: bool) -> tuple[Tensor, Tensor]:
    """`s_1` and lower bounds of `s_1` to `s_{rank+1}` from the factors, without a spectrum of the weight.

    For orthonormal `V (in, rank+1)`, `s_{rank+1}(W V) <= s_{rank+1}(W)` (interlacing); `V` is the span of `W^T Q`, with
    `Q` that of `left` and of the residual's leading direction `u`. This last product with the weight brings the bound
    near the truth, whether the factors were iterated plainly or with shifts, which leave the least direction less pure.
    """
    W = weight.to(_working(weight))
    left, u = factors.left.to(W.dtype), u.to(W.dtype)[..., None]
    if not projected:
        Q = torch.linalg.qr(torch.cat([left, u], dim=-1)).Q
        B = W.mT @ Q
    else:
        u = u - left @ (left.mT @ u)
        B = torch.cat([factors.right.mT, W.mT @ u], dim=-1)
    full = min(W.shape[-2:])
    image = W @ orthonormal_(B[..., :full].contiguous())  # at full rank there is no s_{rank+1}
    gram = torch.zeros(*B.shape[:-2], image.shape[-1], image.shape[-1], dtype=torch.float64, device=B.device)
    for block in torch.split(image, 4096, dim=-2):  # float64 a block at a time: memory
        gram += block.double().mT @ block.double()
    s = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0).sqrt()
    s = torch.nn.functional.pad(s, (0, B.shape[-1] - s.shape[-1]))
    # Factors may miss the leading direction (RSVD does), so s_1 is looked for in the weight itself too.
    nothing = Factors(factors.left[..., :0], factors.right[..., :0, :])
    return torch.maximum(s[..., 0], certified_norm(weight, nothing).lower), s


def _frobenius_error(weight: Tensor, factors: Factors, projected: bool, *, rows: int = 256) -> float:
    """`||W - left @ right||_F / ||W||_F`, without ever forming a residual of the weight's size.

    Where `left @ right` is a projection of `W`, Pythagoras gives the residual for free, unless it is so small that the
    difference would cancel; then, and for other factors, it is summed over blocks of rows.
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
    """`||values||_F^2`, blocks of rows added up in float64."""
    blocks = (values[..., start : start + rows, :] for start in range(0, values.shape[-2], rows))
    return math.fsum(float(torch.linalg.vector_norm(block, dtype=_working(block))) ** 2 for block in blocks)


def _working(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
