"""What calibration needs of a model: its sites in execution order, and what flows through them on calibration data.

    survey      every site's moments in the dense network
    sequence    the same site by site, each fed by what the sites before it have become
    distance    how far the outputs move when some sites are replaced

`OnnxStreams` and `TorchStreams` give these; whoever plans and factorizes sees neither torch modules nor ONNX graphs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.core.sites import Spectrum

Form = Literal["matmul", "gemm", "channel", "input", "separable"]


@dataclass(frozen=True, kw_only=True)
class CalibratedSite:
    """A site that calibration can reach.

    Attributes:
        name: as in reports and filters.
        kind: the operation, "Conv", "Linear", "MatMul".
        groups: matrices in the weight.
        out_features: rows of the weight, per group.
        in_features: columns, per group: `in * prod(kernel)` for a Conv.
        kernel: of a Conv; () for a product.
        strides: of a Conv.
        forms: the forms its split can take, the usual one first.
        macs: multiply-accumulates a sample of the dense operation; 0 where unknown.
        item_bytes: of one stored number.
        load: reads the weight, `(groups, out, in)`, any floating dtype.
    """

    name: str
    kind: str
    groups: int
    out_features: int
    in_features: int
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    forms: tuple[Form, ...]
    macs: int = 0
    item_bytes: int = 4
    load: Callable[[], Tensor]

    def shape(self, form: Form) -> tuple[int, int]:
        """Rows of `left` and columns of `right` in this form, per group."""
        points = math.prod(self.kernel[self.first_axes(form) :])
        return self.out_features * points, self.in_features // points

    def first_axes(self, form: Form) -> int:
        """How many of the kernel's axes the first node takes."""
        return {"input": 0, "separable": 1}.get(form, len(self.kernel))

    def split_params(self, form: Form, rank: int) -> int:
        """Numbers in the two factors."""
        rows, columns = self.shape(form)
        return self.groups * rank * (rows + columns)

    def split_macs(self, form: Form, rank: int) -> int:
        """Multiply-accumulates a sample of the two nodes, from those of the dense one.

        The first node works at every position along the axes whose stride the second one takes.
        """
        rows, columns = self.shape(form)
        denser = math.prod(self.strides[self.first_axes(form) :])
        return round(self.macs * rank * (rows + columns * denser) / (self.out_features * self.in_features))


class Replacement(NamedTuple):
    """What a site becomes: `left (groups, rows, rank)`, `right (groups, rank, columns)`, added `bias (groups, out)`."""

    form: Form
    left: Tensor
    right: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A site's replacement as fitted to calibration data.

    Attributes:
        replacement: factors and bias.
        response_error: what they leave, relative.
        seconds: that fitting took.
        macs: multiply-accumulates a sample of the dense operation and of the split; None where unknown.
        spectrum: singular values of the response; None where they take long.
    """

    replacement: Replacement
    response_error: float
    seconds: float
    macs: tuple[int, int] | None = None
    spectrum: Spectrum | None = None


class Distance(NamedTuple):
    """How far outputs moved: `relative`, squared, to their variance over samples; `kl` of the softmax, or None."""

    relative: float
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What each row of a product's data counts beside the others.

    Attributes:
        by_sample: float32 `(places,)` by the sample's number, of mean 1 over all of them.
    """

    by_sample: Mapping[int, Tensor]

    def of(self, begin: int, samples: int, shape: Sequence[int], at: Tensor) -> Tensor | None:
        """Float32 `(rows,)` for some rows of a batch; 1 where nothing is known, None where it is not for any.

        Args:
            begin: number of the batch's first sample.
            samples: how many it has.
            shape: of the data, `(samples, ..., in)`; nothing is known of another one.
            at: int64 `(rows,)`, which of its flattened leading dimensions.
        """
        places = math.prod(shape[1:-1])
        known = {n: self.by_sample.get(begin + n) for n in range(samples)}
        fitting = {n: counts for n, counts in known.items() if counts is not None and len(counts) == places}
        if shape[0] != samples or not fitting:
            return None
        table = torch.ones(samples, places)
        for n, counts in fitting.items():
            table[n] = counts
        return table.reshape(-1)[at.cpu()]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What errors of a site's response do to the outputs.

    Attributes:
        directions: G `(groups, out, out)`, float32, of any scale: an error e costs `e^T G e`.
        rows: what the same error costs at each row; None where it is not told apart.
    """

    directions: Tensor
    rows: RowCounts | None


class ModelActivations(Protocol):
    """A model with calibration data flowing through it."""

    @property
    def sites(self) -> tuple[CalibratedSite, ...]:
        """What can be calibrated, in execution order."""

    @property
    def unreachable(self) -> Mapping[str, str]:
        """Names of the sites that cannot, each with the reason."""

    def survey(self, visit: Callable[[CalibratedSite, Moments | Samples], None]) -> None:
        """Call `visit` for every site with its moments in the dense network; memory is bounded, the order is not."""

    def sequence(
        self,
        visit: Callable[[CalibratedSite, Moments | Samples], Replacement | None],
        counts: Mapping[str, RowCounts] | None = None,
    ) -> None:
        """Call `visit` in execution order; each site then becomes what is returned (None: stays dense) for those after.

        The moments are of the input in the network compressed so far, and of the dense network's response. `counts`
        says by site's name what each row counts; where it says nothing, 1.
        """

    def distance(self, replacements: Mapping[str, Replacement]) -> Distance:
        """Distance of the outputs with these sites replaced and all others dense, on a part of the data."""

    def metrics(self) -> Mapping[str, Metric]:
        """What errors of the sites' responses do to the outputs, by name; none where unknown."""


def distance_samples(samples: int) -> int:
    """How many of so many samples a distance is measured on, about: a sixteenth, so three a site cost few passes.

    Examples:
        >>> [distance_samples(samples) for samples in (8, 300, 1024, 50_000)]
        [32, 32, 64, 128]
    """
    return min(max(samples // 16, 32), 128)


def output_distance(dense: Tensor, other: Tensor) -> Distance:
    """The distance between outputs `(N, ...)` of two networks on the same samples.

    It is infinite where `other` is not finite. Outputs that do not vary over the samples are compared with their own
    size. KL is told for class scores, `(N, classes)`; rows of unit norm are embeddings and have none.
    """
    z, w = (t.double().reshape(len(t), math.prod(t.shape[1:])) for t in (dense, other))
    size, spread = float(z.square().sum()), float((z - z.mean(dim=0)).square().sum())
    unit = spread if spread > 1e-12 * size else size
    moved = float((z - w).square().sum())
    relative = moved / unit if unit else (math.inf if moved else 0.0)
    embeds = bool(((z.norm(dim=1) - 1).abs() < 1e-3).all())
    scores = dense.ndim == 2 and dense.shape[1] > 1 and not embeds
    if not torch.isfinite(w).all():
        return Distance(relative=math.inf, kl=math.inf if scores else None)
    if not scores:
        return Distance(relative=relative, kl=None)
    p, q = z.log_softmax(dim=1), w.log_softmax(dim=1)
    return Distance(relative=relative, kl=float((p.exp() * (p - q)).sum(dim=1).mean()))
