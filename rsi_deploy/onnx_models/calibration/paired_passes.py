"""Run the dense and the compressed stream of an ONNX graph side by side through its waves.

    dense        alive values --wave, its sites--> alive values, responses y = W x of every site
    compressed   alive values --replaced sites of the wave before; wave--> alive values, rows x^

Only values that differ between the streams are computed and kept twice; other rows x come from the dense one. Where a
site's output is added to a stream that has lost something, its target includes the loss: y + (beside - beside^).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from onnx import NodeProto
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibration.accumulator import BUFFER_SIZE, SiteAccumulator
from rsi_deploy.calibration.activations import RowCounts
from rsi_deploy.calibration.live_values import LiveValues
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached
from rsi_deploy.onnx_models.calibration.row_sampling import (
    Readings,
    inputs_of,
    own_biases,
    response_of,
    taps_of,
    weight_of,
)
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import Program, Wave, reads

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class TwoStreams:
    """Both streams, at first before wave 1.

    Args:
        program: the dense model.
        path: its file.
        reached: its sites, by output.
        readings: reads the rows of the sites.
        dense: store of the dense stream's values.
        compressed: store of the compressed stream's values that differ.
        provider: execution provider of onnxruntime.
        counts: weights of the rows, by the name of the site.
    """

    def __init__(
        self,
        program: Program,
        path: Path,
        reached: Mapping[str, Reached],
        readings: Readings,
        dense: LiveValues,
        compressed: LiveValues,
        *,
        provider: str,
        counts: Mapping[str, RowCounts],
    ) -> None:
        self._program, self._path, self._provider = program, path, provider
        self._reached, self._readings = reached, readings
        self._dense, self._compressed = dense, compressed
        self._inputs = [value.name for value in program.model.graph.input if value.name not in program.fixed]
        self._biases = own_biases(program.model)
        self._begins = [0]  # number of the first sample of every batch
        self._counts = counts
        self._alone: set[str] = set()  # outputs to which no value of their shape is added
        self._moved: set[str] = set()  # values that differ between the streams
        self._before: Sequence[NodeProto] = ()  # sites of the wave before

    def load(self, batches: Iterable[Feeds]) -> None:
        """Store the data."""
        for batch in batches:
            self._dense.put(self._batches, batch)
            self._alone |= self._readings.alone(batch)
            self._begins.append(self._begins[-1] + self._readings.axes.samples(batch))

    def forget_counts(self) -> None:
        """Let all rows weigh the same: the weights are those of samples by number, and some samples do not run."""
        self._counts = {}

    @property
    def _batches(self) -> int:
        return len(self._begins) - 1

    def advance(self, wave: Wave, became: Mapping[str, gp.SplitFactors]) -> dict[str, SiteAccumulator]:
        """Run one wave, with factors in the wave before it, and return the moments that its sites gather.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        here = [self._reached[node.output[0]] for node in wave.sites]
        split = {n.output[0] for n in self._before if self._reached[n.output[0]].graph.weight in became}
        changed = differing([*self._before, *wave.nodes], self._moved, split)
        earlier = frozenset(self._moved)
        self._moved |= {name for node in changed for name in node.output if name}
        beside = {r.beside for r in here if r.graph.output not in self._alone} & self._moved
        again = Segment(
            self._program,
            self._path,
            changed,
            taps_of(here, data=lambda r: r.graph.data in self._moved, beside=beside),
            wave.alive,
            became,
            provider=self._provider,
        )
        once = Segment(
            self._program,
            self._path,
            [*wave.nodes, *wave.sites],
            taps_of(here, data=self._is_read_once, biases=self._biases, beside=beside),
            wave.alive | again.reads,  # nodes that differ may read values of this wave that do not
            provider=self._provider,
        )
        gathered = {r.graph.output: SiteAccumulator(r.site, BUFFER_SIZE) for r in here}
        weights = {r.graph.output: weight_of(r) for r in here if r.graph.output not in self._biases}
        with once, again:
            for number in range(self._batches):
                batch = self._dense.get(number, self._inputs)
                index = self._readings.index(here, batch, number)
                values, other = self._run(number, index, once, again, earlier)
                for r in here:
                    x, y = self._rows(r, weights.get(r.graph.output), values, other)
                    row_counts = self._counts.get(r.site.name)
                    begin = self._begins[number]
                    counts = None if row_counts is None else self._readings.counts(row_counts, r, batch, begin, index)
                    gathered[r.graph.output].add(x, y, counts, fold=number)
                self._dense.keep_only(number, {*wave.alive, *self._inputs})
                self._compressed.keep_only(number, wave.alive)
        self._moved &= wave.alive
        self._before = wave.sites
        return gathered

    def _run(
        self, number: int, index: Feeds, once: Segment, again: Segment, earlier: frozenset[str]
    ) -> tuple[Feeds, Feeds]:
        """Run one batch through the dense stream and, where any value differs, through the compressed one."""
        values = once({**self._dense.get(number, once.reads - index.keys()), **index})
        self._dense.put(number, {name: values[name] for name in once.keeps})
        if not again.outputs:
            return values, {}
        outside = again.reads - index.keys()
        same = self._dense.get(number, outside - earlier)
        other = again({**same, **self._compressed.get(number, outside & earlier), **index})
        self._compressed.put(number, {name: other[name] for name in again.keeps})
        return values, other

    def _is_read_once(self, r: Reached) -> bool:
        """Whether the dense stream has the rows x: where both streams share them, or where y is computed from them."""
        return r.graph.data not in self._moved or r.graph.output not in self._biases

    def _rows(self, r: Reached, weight: Tensor | None, values: Feeds, other: Feeds) -> tuple[Tensor, Tensor]:
        """Return rows of a site's input in the compressed stream, and of its target."""
        rows, beside = f"{r.tag}/rows", f"{r.tag}/beside/rows"
        if weight is None:
            y = response_of(r, values, self._biases[r.graph.output][1])
        else:
            y = inputs_of(r, values[rows]) @ weight.mT
        if beside in other:
            y += r.grouped(values[beside] - other[beside])
        return inputs_of(r, (other if rows in other else values)[rows]), y


def differing(nodes: Iterable[NodeProto], moved: Collection[str], split: Collection[str]) -> list[NodeProto]:
    """Return the nodes whose outputs differ between the streams: split ones, and readers of values that differ."""
    differs, found = set(moved), []
    for node in nodes:
        if node.output[0] in split or differs & reads(node):
            differs |= set(node.output)
            found.append(node)
    return found
