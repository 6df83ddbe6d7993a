"""Runs of one batch that read rows, of the dense network alone or of the dense and the compressed network.

    SurveyRun       x                                                     -> accumulators
    DenseRun        y = W x, and the tensor `other` that y is added to    -> responses with their choice of rows
    CompressedRun   x^ and other^; target y + (other - other^)            -> accumulators, at the same rows

A run stops after the last call that it needs.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rsi_deploy.calibration.accumulator import SiteAccumulator
from rsi_deploy.calibration.activations import RowCounts
from rsi_deploy.calibration.moments import GRAM_LIMIT
from rsi_deploy.linalg.solver import stream_seed
from rsi_deploy.torch_models.calibration.calls import Layer, LayerCall, Stopped, Watch
from rsi_deploy.torch_models.calibration.rows import Choice, LinearReader

Accumulators = Mapping[str, SiteAccumulator]


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """The choice of rows in one batch: a quota per call by site, from a random stream of (seed, site, batch, call)."""

    seed: int
    batch: int
    quotas: Mapping[str, int]
    kept: Tensor | None

    def __call__(self, call: LayerCall, layer: Layer, x: Tensor) -> Choice:
        """Choose the rows of `x` in this call."""
        seed = stream_seed(self.seed, f"{call.site}/{self.batch}/{call.number}")
        return layer.reader.choose(x, self.quotas[call.site], torch.Generator().manual_seed(seed), self.kept)


@dataclass(frozen=True, kw_only=True)
class BatchRowCounts:
    """The row weights of batch number `batch`, with `samples` samples from sample `begin` on, by site."""

    counts: Mapping[str, RowCounts]
    batch: int
    begin: int
    samples: int

    def of(self, call: LayerCall, layer: Layer, response: "DenseResponse") -> Tensor | None:
        """Return the float32 weights `(rows,)` of the rows of a product; None for 1."""
        counts = self.counts.get(call.site)
        if counts is None or not isinstance(layer.reader, LinearReader):
            return None
        return counts.of(self.begin, self.samples, response.shape, response.choice.at)


@dataclass(kw_only=True)
class DenseResponse:
    """The response of the dense network in one call, `y (groups, rows, out)`, and the rows that it is added to."""

    shape: torch.Size
    choice: Choice
    y: Tensor
    other: Tensor | None = None


class RowRun(Watch):
    """A run that reads rows of the inputs of `calls`, and of the tensors that outputs of `summands` are added to."""

    def __init__(
        self, layers: Sequence[Layer], calls: Collection[LayerCall], summands: Collection[LayerCall] = ()
    ) -> None:
        super().__init__(layers)
        self._layer_of: dict[LayerCall, Layer] = {}
        self._calls, self._summands = set(calls), set(summands) & set(calls)
        self._pending = len(self._calls) + len(self._summands)

    @abstractmethod
    def read_input(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """Read rows of an input."""

    def read_other(self, call: LayerCall, layer: Layer, other: Tensor) -> None:
        """Read rows of the tensor that an output is added to."""

    def called(self, call: LayerCall, layer: Layer, x: Tensor) -> bool:
        """See `Watch`."""
        if call not in self._calls:
            return False
        self._layer_of[call] = layer
        self.read_input(call, layer, x)
        self._count_down()
        return call in self._summands

    def added(self, call: LayerCall, other: Tensor) -> None:
        """See `Watch`."""
        self.read_other(call, self._layer_of[call], other)
        self._count_down()

    def _count_down(self) -> None:
        self._pending -= 1
        if not self._pending:
            raise Stopped


class SurveyRun(RowRun):
    """A run that accumulates inputs, and for wide sites the responses, too."""

    def __init__(
        self,
        layers: Sequence[Layer],
        calls: Collection[LayerCall],
        choosing: Choosing,
        weights: Mapping[str, Tensor],
        accumulators: Accumulators,
    ) -> None:
        super().__init__(layers, calls)
        self._choosing, self._weights, self._accumulators = choosing, weights, accumulators

    def read_input(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """See `RowRun`."""
        choice = self._choosing(call, layer, x)
        for rows in layer.reader.pieces(layer.reader.held(x, choice), choice):
            wide = rows.shape[-1] > GRAM_LIMIT
            y = rows @ self._weights[call.site].mT if wide else rows[..., :0]
            self._accumulators[call.site].add(rows, y, fold=self._choosing.batch)


class DenseRun(RowRun):
    """A run that keeps the responses of the dense network."""

    def __init__(
        self,
        layers: Sequence[Layer],
        calls: Collection[LayerCall],
        summands: Collection[LayerCall],
        choosing: Choosing,
        weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__(layers, calls, summands)
        self._choosing, self._weights = choosing, weights
        self.responses: dict[LayerCall, DenseResponse] = {}

    def read_input(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """See `RowRun`."""
        choice, W = self._choosing(call, layer, x), self._weights[call.site]
        rows = [piece @ W.mT for piece in layer.reader.pieces(layer.reader.held(x, choice), choice)]
        y = torch.cat(rows, dim=-2) if rows else W.new_zeros(len(W), 0, W.shape[1])
        self.responses[call] = DenseResponse(shape=x.shape, choice=choice, y=y)

    def read_other(self, call: LayerCall, layer: Layer, other: Tensor) -> None:
        """See `RowRun`."""
        response = self.responses[call]
        response.other = layer.reader.outputs(other, response.choice)


class CompressedRun(RowRun):
    """A run that accumulates inputs of the compressed network with responses of the dense one; end it by `finish`."""

    def __init__(
        self,
        layers: Sequence[Layer],
        responses: Mapping[LayerCall, DenseResponse],
        summands: Collection[LayerCall],
        accumulators: Accumulators,
        row_counts: BatchRowCounts,
    ) -> None:
        super().__init__(layers, responses.keys(), summands)
        self._responses, self._accumulators, self._row_counts = responses, accumulators, row_counts
        self._pending_inputs: dict[LayerCall, Tensor] = {}

    def read_input(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """See `RowRun`."""
        response = self._responses[call]
        if x.shape != response.shape:  # the rows do not correspond to those of the dense network
            return
        held = layer.reader.held(x, response.choice)
        if call in self._summands:  # the input may change before the addition
            self._pending_inputs[call] = held.clone() if held.data_ptr() == x.data_ptr() else held
        else:
            self._accumulate(call, layer, held, response.y)

    def read_other(self, call: LayerCall, layer: Layer, other: Tensor) -> None:
        """See `RowRun`."""
        held, response = self._pending_inputs.pop(call, None), self._responses[call]
        if held is not None:
            now = layer.reader.outputs(other, response.choice)
            lost = 0 if response.other is None else response.other - now
            self._accumulate(call, layer, held, response.y + lost)

    def finish(self) -> None:
        """Accumulate the inputs whose outputs were not added in this batch."""
        for call, held in self._pending_inputs.items():
            self._accumulate(call, self._layer_of[call], held, self._responses[call].y)
        self._pending_inputs.clear()

    def _accumulate(self, call: LayerCall, layer: Layer, held: Tensor, y: Tensor) -> None:
        begin, response = 0, self._responses[call]
        counts = self._row_counts.of(call, layer, response)
        for rows in layer.reader.pieces(held, response.choice):
            end = begin + rows.shape[-2]
            some = None if counts is None else counts[begin:end].to(rows.device)
            self._accumulators[call.site].add(rows, y[..., begin:end, :], some, fold=self._row_counts.batch)
            begin = end
