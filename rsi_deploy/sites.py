"""One site's factorization and the record of it: shared by the PyTorch way and the ONNX way."""

from typing import Literal

import pydantic
from torch import Tensor

from rsi_deploy.errors import ModelError
from rsi_deploy.factor_errors import errors_of
from rsi_deploy.kernel.memory import or_on_cpu
from rsi_deploy.plan.planner import break_even_rank
from rsi_deploy.rsi import Factors
from rsi_deploy.spectra import Spectrum
from rsi_deploy.together import Solves


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

    @pydantic.model_validator(mode="after")
    def _a_split_has_sizes(self) -> "SiteRecord":
        if self.decision == "split" and min(self.out_features, self.in_features, self.groups) < 1:
            raise ValueError(f"{self.name}: a site that is split has rows, columns and groups")
        return self


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
    errors, moved = or_on_cpu(lambda W, left, right: errors_of(W, Factors(left, right), projected), weight, *factors)
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
