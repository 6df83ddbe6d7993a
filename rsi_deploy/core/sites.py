"""One site of a model, as everything that decides about it or reports on it names it."""

from typing import Literal, Self

import pydantic


class Spectrum(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Singular values at some ranks, relative to the largest.

    Attributes:
        of: "weight", or "response": of the matrix whose leading directions factors fitted to data keep.
        ranks: ascending, from 1. The last is the full rank, or where only the leading values were computed the last.
        values: `s_i / s_1`, four digits; over groups their root mean square.
        full_rank: `min(out, in)` of the matrix they are of.
    """

    of: Literal["weight", "response"]
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    full_rank: int

    @pydantic.model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.ranks) != len(self.values):
            raise ValueError(f"ranks and values must be as many, but are {len(self.ranks)} and {len(self.values)}")
        return self


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


def break_even_rank(out_features: int, in_features: int) -> float:
    """`out*in/(out+in)`: at or above this rank two factors hold no fewer numbers than the weight."""
    return out_features * in_features / (out_features + in_features)


def site_name(weight_name: str) -> str:
    """The name a user sees: the weight's, less a final `.weight`.

    Example:
        >>> site_name("classifier.0.weight"), site_name("attn.in_proj_weight")
        ('classifier.0', 'attn.in_proj_weight')
    """
    return weight_name.removesuffix(".weight")
