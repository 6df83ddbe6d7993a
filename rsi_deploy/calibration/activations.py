"""The interface between calibration and a model: its sites in execution order, and their activations on the data.

    survey      moments of every site in the dense network
    sequence    moments site by site, in the network whose earlier sites are already compressed
    distance    change of the outputs when some sites are replaced

The classes for ONNX graphs and for torch modules implement `ModelActivations`. The code that plans ranks and fits
factors uses this interface only.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from graph_passes.forms import Form, split_numbers
from graph_passes.forms import first_axes as graph_first_axes
from graph_passes.records import Units
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.core.sites import Spectrum


@dataclass(frozen=True, kw_only=True)
class CalibratedSite:
    """A site that calibration can reach.

    Attributes:
        name: name in reports and filters.
        kind: operation: "Conv", "Linear" or "MatMul".
        groups: number of matrices in the weight.
        out_features: rows of the weight, per group.
        in_features: columns of the weight, per group: `in * prod(kernel)` for a Conv.
        kernel: kernel size of a Conv; () for a matrix product.
        strides: strides of a Conv.
        forms: forms that a split of the site can take, the usual one first.
        macs: multiply-accumulates of the dense operation per sample; 0 if unknown.
        item_bytes: bytes of one stored number.
        load: function that reads the weight `(groups, out, in)` in any floating dtype.
        units: hidden units that it reads, with the names of the sites that make them; None without any.
        unit_macs: multiply-accumulates per sample of the nodes between those sites and this one.
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
    units: Units | None = None
    unit_macs: int = 0

    def shape(self, form: Form) -> tuple[int, int]:
        """Return the rows of `left` and the columns of `right` in this form, per group."""
        points = math.prod(self.kernel[self.first_axes(form) :])
        return self.out_features * points, self.in_features // points

    def first_axes(self, form: Form) -> int:
        """Return the number of kernel axes that belong to the first node."""
        return len(graph_first_axes(form, len(self.kernel)))

    def split_params(self, form: Form, rank: int) -> int:
        """Return the number of parameters in the two factors, less those between that go with hidden units."""
        numbers = self.groups * split_numbers(form, *self.shape(form), rank)
        return numbers - self._units_gone(form, rank) * (self.units.beside if self.units else 0)

    def split_macs(self, form: Form, rank: int) -> int:
        """Return the multiply-accumulates of the two nodes per sample, less those between that go with hidden units.

        The second node strides along its own kernel axes, so the first node computes every position along them.
        """
        rows, columns = self.shape(form)
        denser = math.prod(self.strides[self.first_axes(form) :])
        numbers = split_numbers(form, rows, columns * denser, rank)
        macs = round(self.macs * numbers / (self.out_features * self.in_features))
        gone = self._units_gone(form, rank)
        return macs - (round(self.unit_macs * gone / self.units.count) if self.units and gone else 0)

    def _units_gone(self, form: Form, rank: int) -> int:
        return self.units.count - rank // self.units.run if self.units and form == self.units.form else 0


class Replacement(NamedTuple):
    """Factors `left (groups, rows, rank)` and `right (groups, rank, columns)`, and the added `bias (groups, out)`."""

    form: Form
    left: Tensor
    right: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class FittedSite:
    """A replacement of a site that is fitted to calibration data.

    Attributes:
        replacement: factors and bias.
        response_error: relative response error on the data that the replacement is fitted to.
        held_out_error: the same on folds that are left out of the fit; None if the moments have no folds.
        seconds: duration of the fit.
        macs: multiply-accumulates per sample of the dense operation and of the split; None if unknown.
        spectrum: singular values of the response; None if they take long to compute.
    """

    replacement: Replacement
    response_error: float
    seconds: float
    held_out_error: float | None = None
    macs: tuple[int, int] | None = None
    spectrum: Spectrum | None = None


class Distance(NamedTuple):
    """The squared distance of outputs, `relative` to their variance over samples, and `kl` of the softmax or None."""

    relative: float
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """The weights of the rows of a product's input.

    Attributes:
        by_sample: sample number -> float32 `(positions,)`; the mean over all samples is 1.
    """

    by_sample: Mapping[int, Tensor]

    def of(self, begin: int, samples: int, shape: Sequence[int], at: Tensor) -> Tensor | None:
        """Return float32 weights `(rows,)` for some rows of a batch: 1 for unknown samples, None if all are unknown.

        Args:
            begin: number of the first sample in the batch.
            samples: number of samples in the batch.
            shape: shape of the input, `(samples, ..., in)`; the weights of any other shape are unknown.
            at: int64 `(rows,)`, indices into the flattened leading dimensions.
        """
        positions = math.prod(shape[1:-1])
        known = {n: self.by_sample.get(begin + n) for n in range(samples)}
        fitting = {n: counts for n, counts in known.items() if counts is not None and len(counts) == positions}
        if shape[0] != samples or not fitting:
            return None
        table = torch.ones(samples, positions)
        for n, counts in fitting.items():
            table[n] = counts
        return table.reshape(-1)[at.cpu()]


@dataclass(frozen=True, kw_only=True)
class OutputSensitivity:
    """The effect of errors in a site's response on the outputs.

    Attributes:
        directions: G `(groups, out, out)`, float32, of any scale: an error e costs `e^T G e`.
        rows: relative cost of the same error at each row; None if all rows cost the same.
        in_nats: G is that of a language model: `e^T G e / 2` is the KL divergence a token that errors e cause.
    """

    directions: Tensor
    rows: RowCounts | None
    in_nats: bool = False


class ModelActivations(Protocol):
    """A model together with its calibration data."""

    @property
    def sites(self) -> tuple[CalibratedSite, ...]:
        """The sites that can be calibrated, in execution order."""

    @property
    def unreachable(self) -> Mapping[str, str]:
        """The names of the sites that cannot be calibrated, each with the reason."""

    def survey(self, visit: Callable[[CalibratedSite, Moments | Samples], None]) -> None:
        """Call `visit` for every site with its moments in the dense network, in any order and in bounded memory."""

    def sequence(
        self,
        visit: Callable[[CalibratedSite, Moments | Samples], Replacement | None],
        counts: Mapping[str, RowCounts] | None = None,
    ) -> None:
        """Call `visit` for every site in execution order and replace the site by the result (None: it stays dense).

        The moments are those of the input in the network compressed so far and of the response in the dense network.
        `counts` holds the row weights by site name; rows of other sites have weight 1.
        """

    def distance(self, replacements: Mapping[str, Replacement]) -> Distance:
        """Return the distance of the outputs with these sites replaced and all others dense, on a part of the data."""

    def sensitivities(self) -> Mapping[str, OutputSensitivity]:
        """Return the output sensitivity of the sites by name, without the sites whose sensitivity is unknown."""


def distance_samples(samples: int) -> int:
    """Return the number of samples for one distance: about a sixteenth, so that a distance per site stays cheap.

    Examples:
        >>> [distance_samples(samples) for samples in (8, 300, 1024, 50_000)]
        [16, 18, 64, 128]
    """
    return min(max(samples // 16, 16), 128)


def output_distance(dense: Tensor, other: Tensor) -> Distance:
    """Return the distance between the outputs `(N, ...)` of two networks on the same samples.

    The distance is infinite if `other` is not finite. It is relative to the squared norm if the outputs do not vary
    over the samples. Only class scores `(N, classes)` have a KL divergence; rows of unit norm are embeddings.
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
