"""One site's factorization and the record of it: shared by the PyTorch way and the ONNX way."""

import math
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from rsi_deploy.errors import ModelError
from rsi_deploy.kernel.certified import FAILURE, Search, searched
from rsi_deploy.kernel.memory import or_on_cpu
from rsi_deploy.plan.planner import break_even_rank
from rsi_deploy.rsi import Factors, certified_norm, rounding_level, singular_values
from rsi_deploy.spectra import Spectrum, thinned
from rsi_deploy.together import Solves

# Up to this full rank the optimum s_{rank+1} comes from an exact spectrum (some ms); above it from a bound.
EXACT_SPECTRUM_LIMIT = 128
# Of the residual's norm over s_1, up to which a s_1 that the factors miss is less than 2 % above the one they have.
SMALL_BESIDE = 0.2
TOP_WIDTH = 0.3  # of the interval in which s_1 is searched for elsewhere: its lower end is much nearer
# Of the least singular value over the largest, above which a Gram matrix in float32 tells it to 1e-3.
RESOLVED = 0.05


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
    solver: Solves,
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
    errors, moved = or_on_cpu(lambda W, left, right: _errors(W, Factors(left, right), projected), weight, *factors)
    if moved:
        errors["reason"] = f"{reason}; errors measured on the CPU, for want of GPU memory"
    return record.model_copy(update=errors)


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
    if len(weight) == 1:  # one matrix as such: products in batches are slower
        weight, factors = weight[0], Factors(factors.left[0], factors.right[0])
    found = searched(weight, factors)
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


def _bounded_spectrum(weight: Tensor, factors: Factors, found: Search, projected: bool) -> tuple[Tensor, Tensor]:
    """`s_1` and lower bounds of `s_1` to `s_{rank+1}` from the factors, without a spectrum of the weight.

    For orthonormal `Q (out, rank+few)`, `s_{rank+1}(Q^T W) <= s_{rank+1}(W)` (interlacing). `Q` is the span of `left`
    and of the directions in which the residual's norm was searched: those hold what the least directions of `left`
    lack, and their products with the weight are known.
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
        scale = torch.where(values > 0.01, values.clamp_min(0.01).rsqrt(), 0)  # the others are of `left`
        known, beside = factors.right.to(W.dtype), scale[..., None] * (vectors.mT @ images)
    s = _leading_values(known, beside, min(rank + 1, full))
    s = torch.nn.functional.pad(s, (0, rank + 1 - s.shape[-1]))  # at full rank there is no s_{rank+1}
    # Factors may miss the leading direction (RSVD does): |W|^2 <= |Q^T W|^2 + |residual|^2 says whether they may have.
    top = s[..., 0]
    if bool((found.interval.upper > SMALL_BESIDE * top).any()):
        nothing = Factors(factors.left[..., :0], factors.right[..., :0, :])
        top = torch.maximum(top, certified_norm(weight, nothing, width=TOP_WIDTH).lower)
    return top, s


def _leading_values(first: Tensor, last: Tensor, count: int) -> Tensor:
    """The leading singular values of the rows of `first` and `last (..., n, in)`, descending, float64 `(..., count)`.

    Of their Gram matrix in float32, where that tells the last of them, else in float64.
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
    """The upper triangle of `B B^T`, `B (..., n, in)` the rows of both; some columns at a time: memory."""
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
