"""Runs of one batch in which rows are taken: of the dense network alone, or of the dense and the compressed one.

    SurveyRun       x                                                      -> gathered
    DenseRun        y = W x, and beside, where the output is added to it   -> answers, the rows and y
    CompressedRun   x^, and beside^; target y + (beside - beside^)         -> gathered, at the rows of the answers

A run stops behind the last call that it wants.
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
    """How rows of one batch are chosen: `quotas` of each call by site, from a stream of (seed, site, batch, call)."""

    seed: int
    batch: int
    quotas: Mapping[str, int]
    kept: Tensor | None

    def __call__(self, call: LayerCall, layer: Layer, x: Tensor) -> Choice:
        """The rows of `x` in this call."""
        seed = stream_seed(self.seed, f"{call.site}/{self.batch}/{call.number}")
        return layer.reader.choose(x, self.quotas[call.site], torch.Generator().manual_seed(seed), self.kept)


@dataclass(frozen=True, kw_only=True)
class BatchRowCounts:
    """What rows count in a batch of `samples` that begins with sample `begin`, by site."""

    counts: Mapping[str, RowCounts]
    begin: int
    samples: int

    def of(self, call: LayerCall, layer: Layer, answer: "DenseResponse") -> Tensor | None:
        """Float32 `(rows,)` of a product's rows; None for 1 each."""
        counts = self.counts.get(call.site)
        if counts is None or not isinstance(layer.reader, LinearReader):
            return None
        return counts.of(self.begin, self.samples, answer.shape, answer.choice.at)


@dataclass(kw_only=True)
class DenseResponse:
    """What the dense network said in one call: `y (groups, rows, out)` and what it was added to, at `choice`."""

    shape: torch.Size
    choice: Choice
    y: Tensor
    beside: Tensor | None = None


class Reading(Watch):
    """A run that takes rows of the wanted calls, and of what the outputs of those in `added` are added to."""

    def __init__(
        self, layers: Sequence[Layer], wanted: Collection[LayerCall], added: Collection[LayerCall] = ()
    ) -> None:
        super().__init__(layers)
        self._of: dict[LayerCall, Layer] = {}
        self._wanted, self._added = set(wanted), set(added) & set(wanted)
        self._pending = len(self._wanted) + len(self._added)

    @abstractmethod
    def take(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """Take rows of an input."""

    def take_beside(self, call: LayerCall, layer: Layer, beside: Tensor) -> None:
        """Take rows of what an output is added to."""

    def called(self, call: LayerCall, layer: Layer, x: Tensor) -> bool:
        """See `Watch`."""
        if call not in self._wanted:
            return False
        self._of[call] = layer
        self.take(call, layer, x)
        self._one_less()
        return call in self._added

    def joined(self, call: LayerCall, beside: Tensor) -> None:
        """See `Watch`."""
        self.take_beside(call, self._of[call], beside)
        self._one_less()

    def _one_less(self) -> None:
        self._pending -= 1
        if not self._pending:
            raise Stopped


class SurveyRun(Reading):
    """Gathers inputs; of wide sites also what the weight makes of them."""

    def __init__(
        self,
        layers: Sequence[Layer],
        wanted: Collection[LayerCall],
        choosing: Choosing,
        weights: Mapping[str, Tensor],
        gathered: Accumulators,
    ) -> None:
        super().__init__(layers, wanted)
        self._choosing, self._weights, self._gathered = choosing, weights, gathered

    def take(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """See `Reading`."""
        choice = self._choosing(call, layer, x)
        for rows in layer.reader.pieces(layer.reader.held(x, choice), choice):
            wide = rows.shape[-1] > GRAM_LIMIT
            y = rows @ self._weights[call.site].mT if wide else rows[..., :0]
            self._gathered[call.site].add(rows, y)


class DenseRun(Reading):
    """Keeps what the dense network answers."""

    def __init__(
        self,
        layers: Sequence[Layer],
        wanted: Collection[LayerCall],
        added: Collection[LayerCall],
        choosing: Choosing,
        weights: Mapping[str, Tensor],
    ) -> None:
        super().__init__(layers, wanted, added)
        self._choosing, self._weights = choosing, weights
        self.answers: dict[LayerCall, DenseResponse] = {}

    def take(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """See `Reading`."""
        choice, W = self._choosing(call, layer, x), self._weights[call.site]
        rows = [piece @ W.mT for piece in layer.reader.pieces(layer.reader.held(x, choice), choice)]
        y = torch.cat(rows, dim=-2) if rows else W.new_zeros(len(W), 0, W.shape[1])
        self.answers[call] = DenseResponse(shape=x.shape, choice=choice, y=y)

    def take_beside(self, call: LayerCall, layer: Layer, beside: Tensor) -> None:
        """See `Reading`."""
        answer = self.answers[call]
        answer.beside = layer.reader.outputs(beside, answer.choice)


class CompressedRun(Reading):
    """Gathers what the compressed network reads where the dense one gave the answers; call `finish` behind it."""

    def __init__(
        self,
        layers: Sequence[Layer],
        answers: Mapping[LayerCall, DenseResponse],
        added: Collection[LayerCall],
        gathered: Accumulators,
        counted: BatchRowCounts,
    ) -> None:
        super().__init__(layers, answers.keys(), added)
        self._answers, self._gathered, self._counted = answers, gathered, counted
        self._waiting: dict[LayerCall, Tensor] = {}

    def take(self, call: LayerCall, layer: Layer, x: Tensor) -> None:
        """See `Reading`."""
        answer = self._answers[call]
        if x.shape != answer.shape:  # the rows that it goes another way with cannot be told
            return
        held = layer.reader.held(x, answer.choice)
        if call in self._added:  # it may change before the addition
            self._waiting[call] = held.clone() if held.data_ptr() == x.data_ptr() else held
        else:
            self._gather(call, layer, held, answer.y)

    def take_beside(self, call: LayerCall, layer: Layer, beside: Tensor) -> None:
        """See `Reading`."""
        held, answer = self._waiting.pop(call, None), self._answers[call]
        if held is not None:
            now = layer.reader.outputs(beside, answer.choice)
            lost = 0 if answer.beside is None else answer.beside - now
            self._gather(call, layer, held, answer.y + lost)

    def finish(self) -> None:
        """Gather what waits for an addition that this batch did not bring."""
        for call, held in self._waiting.items():
            self._gather(call, self._of[call], held, self._answers[call].y)
        self._waiting.clear()

    def _gather(self, call: LayerCall, layer: Layer, held: Tensor, y: Tensor) -> None:
        begin, answer = 0, self._answers[call]
        counts = self._counted.of(call, layer, answer)
        for rows in layer.reader.pieces(held, answer.choice):
            end = begin + rows.shape[-2]
            some = None if counts is None else counts[begin:end].to(rows.device)
            self._gathered[call.site].add(rows, y[..., begin:end, :], some)
            begin = end
