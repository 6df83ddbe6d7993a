"""The record of a site: what was decided, done and measured there."""

from typing import Literal, Self

import pydantic


class Spectrum(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Singular values at some ranks, relative to the largest.

    Attributes:
        of: "weight", or "response" for the matrix whose leading directions are kept by factors fitted to data.
        ranks: ascending ranks from 1; the last is the full rank, or the last computed one.
        values: `s_i / s_1` with four digits; their root mean square over groups.
        full_rank: `min(out, in)` of the matrix.
    """

    of: Literal["weight", "response"]
    ranks: tuple[int, ...]
    values: tuple[float, ...]
    full_rank: int

    @pydantic.model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.ranks) != len(self.values):
            raise ValueError(
                f"ranks and values must have the same length, but have {len(self.ranks)} and {len(self.values)}"
            )
        return self


class SiteRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The decision at one site, what was done, and what it cost.

    Errors are those of the stored factors relative to the weight.

    Attributes:
        name: name of the weight without a final `.weight`.
        kind: the operation, for example "Linear", "Conv2d", "Gemm" or "MatMul".
        out_features, in_features: shape of the weight matrix `(out, in)`; per group if `groups > 1`.
        groups: groups of a grouped Conv, else 1.
        break_even_rank: `out*in/(out+in)`, `min(out, in)` if pivoted; a split at or above this rank saves nothing.
        rank: rank of the split; None for a dense site.
        decision: "split" or "dense".
        reason: why, in words.
        params_dense, params_compressed: numbers in the weight before and after.
        frobenius_error: `||W - left right||_F / ||W||_F`.
        spectral_error: `||W - left right||_2 / ||W||_2`, both estimated from below.
        residual_interval: lower and upper bound of `||W - left right||_2`, for the group with the largest. The lower
            bound is certain, the upper bound fails with probability `residual_failure`.
        residual_failure: probability that a norm exceeds its upper bound.
        normalized_error: `||W - left right||_2 / s_{rank+1}`; 1.0 is optimal.
        normalized_error_kind: "exact" if the spectrum is exact, "upper bound" if s_{rank+1} is bounded from below. All
            four are None for factors fitted to data, which need not be close to the weight.
        form: form of the split: "matmul", "gemm", "channel", "input", "separable", "pivoted", "units", "heads"; None if
            dense or not recorded.
        response_error: `E|y - y~|^2 / E|y|^2`, centred, on the calibration data that the factors are fitted to. Rows of
            a product (tokens) are weighted, as in the fit, by the effect of their errors on the outputs.
        held_out_error: mean of the same on folds of these data that are left out of a fit, one after another; None
            where the data have no folds.
        seconds: time of the factorization alone.
        route: route of the kernel: "direct", "chebyshev", "gram", "krylov", "exact"; "svd" for that method; None if
            factors were fitted to data. --route forces it.
        power_iterations: number of power iterations; 0 for exact factors.
        macs_dense, macs_compressed: multiply-accumulates per sample, if the model was traced.
        nodes: operations (ONNX node names or module paths) that use the weight.
        joint: for a joint split, names of all the sites that share `right`, in graph order; else empty. The first one
            counts the parameters and MACs of `right`. Errors are those of the site's own weight; its normalized error
            compares with the best factors of this rank for it alone (None if those are the weight itself).
        spectrum: singular values of the weight that its errors required (all of a small one, else the leading rank +
            1), or of the response for factors fitted to data; None if none were computed.
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
    held_out_error: float | None = None
    seconds: float | None = None
    route: str | None = None
    power_iterations: int | None = None
    macs_dense: int | None = None
    macs_compressed: int | None = None
    nodes: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    spectrum: Spectrum | None = None

    @property
    def outcome(self) -> Literal["split", "smaller", "dense"]:
        """Return what became of the weight; "smaller" if it makes fewer units or values than before."""
        is_smaller = self.decision == "dense" and self.params_compressed < self.params_dense
        return "smaller" if is_smaller else self.decision

    @property
    def kind_of_reason(self) -> str:
        """Return the reason of a site without a split; the same for all that make less."""
        return "makes fewer hidden units or values of heads" if self.outcome == "smaller" else self.reason

    @pydantic.model_validator(mode="after")
    def _a_split_has_sizes(self) -> "SiteRecord":
        if self.decision == "split" and min(self.out_features, self.in_features, self.groups) < 1:
            raise ValueError(f"{self.name}: a split site must have rows, columns and groups")
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
    """Return the record of a site that stays dense, with its reason."""
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


def smaller_record(site: SiteRecord, kept: int, count: int, what: str, reader: str) -> SiteRecord:
    """Return the record of a site that makes fewer units, or values of heads, for another one.

    Args:
        site: record of the dense site.
        kept: number of units that stay.
        count: number of units.
        what: what they are, in words.
        reader: name of the site that reads them.
    """
    reason = f"makes {kept} of its {count} {what}, as {reader} reads no others"
    return site.model_copy(update={"params_compressed": site.params_dense * kept // count, "reason": reason})


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
    """Return the record of a split site without errors.

    Args:
        name: name of the site.
        kind: kind of operation.
        shape: `(groups, out, in)` of the weight.
        rank: rank of the split.
        params: numbers in both factors.
        reason: reason of the decision.
        seconds: time of the factorization.
        nodes: operations that use the weight.
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
    """Return `out*in/(out+in)`; at or above this rank two factors have no fewer numbers than the weight."""
    return out_features * in_features / (out_features + in_features)


def site_name(weight_name: str) -> str:
    """Return the weight's name without a final `.weight`, as shown to users.

    Example:
        >>> site_name("classifier.0.weight"), site_name("attn.in_proj_weight")
        ('classifier.0', 'attn.in_proj_weight')
    """
    return weight_name.removesuffix(".weight")
