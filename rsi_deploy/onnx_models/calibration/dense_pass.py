"""Run the dense stream of an ONNX graph through its waves, and measure replacements at the current wave.

    all the data      alive values --wave, its sites--> alive values, rows x of every site
    checked samples   the same, and then for each replacement that is tried:
                      alive values --one replaced site, all later waves--> outputs

A trial of one replacement costs the part of the network behind the site; the part in front runs once. The model of that
part is made once a site where weight and bias can be model inputs: those of a replacement are its product. Checked
samples that are whole batches of the data are not run twice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt
from onnx import NodeProto

import graph_passes as gp
from rsi_deploy.calibration.accumulator import BUFFER_SIZE, SiteAccumulator
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.calibration.live_values import LiveValues
from rsi_deploy.calibration.moments import GRAM_LIMIT
from rsi_deploy.onnx_models.calibration.check_samples import CheckSamples
from rsi_deploy.onnx_models.calibration.fed_sites import FedSite
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached
from rsi_deploy.onnx_models.calibration.row_sampling import Readings, inputs_of, taps_of, weight_of
from rsi_deploy.onnx_models.calibration.rows import Taps
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import Program, Wave
from rsi_deploy.onnx_models.site_factorizer import graph_factors

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Survey:
    """The dense stream, at first before wave 1. Use it in a `with`.

    Args:
        program: the dense model.
        path: its file.
        reached: its sites, by output.
        readings: of the sites.
        provider: onnxruntime's.
    """

    def __init__(
        self, program: Program, path: Path, reached: Mapping[str, Reached], readings: Readings, *, provider: str
    ) -> None:
        self._program, self._path, self._provider = program, path, provider
        self._reached, self._readings = reached, readings
        self._inputs = [value.name for value in program.model.graph.input if value.name not in program.fixed]
        self._values = LiveValues()
        self._batches = self._all = self._done = 0
        self._looked_at: list[int] = []  # numbers of the batches of checked samples
        self._fed: tuple[str, Segment] | None = None  # the site whose weight is an input, and the model behind it

    def __enter__(self) -> "Survey":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._values.__exit__(kind, error, trace)

    def load(self, batches: Iterable[Feeds], checked: CheckSamples) -> None:
        """Store the data, then the samples on which outputs are compared."""
        for batch in map(checked.add, batches):
            self._values.put(self._batches, batch)
            self._batches += 1
        self._all = self._batches
        for batch in checked.batches():
            number = checked.number_of(batch)
            if number is None:
                number = self._all
                self._values.put(number, batch)
                self._all += 1
            self._looked_at.append(number)

    def advance(self, wave: Wave) -> dict[str, SiteAccumulator]:
        """Run the next wave and return the moments that its sites gather.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        self._close()
        self._done += 1
        here = [self._reached[node.output[0]] for node in wave.sites]
        gathered = {r.graph.output: SiteAccumulator(r.site, BUFFER_SIZE) for r in here}
        weights = {r.graph.output: weight_of(r) for r in here if r.site.in_features > GRAM_LIMIT}
        nodes = [*wave.nodes, *wave.sites]
        with Segment(self._program, self._path, nodes, taps_of(here), wave.alive, provider=self._provider) as run:
            for number in range(self._all):
                index = self._readings.index(here, self._values.get(number, self._inputs), number, survey=True)
                found = run({**self._values.get(number, run.reads - index.keys()), **index})
                self._values.put(number, {name: found[name] for name in run.keeps})
                self._values.keep_only(number, {*wave.alive, *self._inputs})
                for r in here if number < self._batches else []:
                    x = inputs_of(r, found[f"{r.tag}/rows"])
                    weight = weights.get(r.graph.output)
                    y = x.new_zeros(*x.shape[:-1], 0) if weight is None else x @ weight.mT
                    gathered[r.graph.output].add(x, y, fold=number)
        return gathered

    def has(self, r: Reached) -> bool:
        """Return whether the site is in the current wave."""
        return bool(self._done) and r.graph.output in {n.output[0] for n in self._program.waves[self._done - 1].sites}

    def outputs(self, r: Reached, replacement: Replacement, names: Iterable[str]) -> Iterator[tuple[Feeds, Feeds]]:
        """Yield the checked samples, a batch at a time, with the graph's outputs after a replacement.

        Args:
            r: a site of the current wave.
            replacement: factors and bias in place of its weight.
            names: names of the outputs.
        """
        wave = self._program.waves[self._done - 1]
        (node,) = (node for node in wave.sites if node.output[0] == r.graph.output)
        ends = set(names)
        fed = FedSite.of(r, node, self._program.model)
        if fed is None:
            with self._behind([node], ends, {r.graph.weight: graph_factors(replacement, r.graph)}) as run:
                yield from self._run(run, {}, ends)
            return
        if self._fed is None or self._fed[0] != r.graph.output:
            self._close()
            self._fed = r.graph.output, self._behind(fed.nodes, ends)
        yield from self._run(self._fed[1], fed.feeds(replacement), ends)

    def _behind(
        self, site: Sequence[NodeProto], ends: set[str], factors: Mapping[str, gp.SplitFactors] | None = None
    ) -> Segment:
        """Return a model of a site's own nodes and all later waves."""
        later = self._program.waves[self._done :]
        nodes = [*site, *(node for wave in later for node in (*wave.nodes, *wave.sites))]
        return Segment(self._program, self._path, nodes, Taps(), ends, factors, provider=self._provider)

    def _run(self, run: Segment, fed: Feeds, ends: set[str]) -> Iterator[tuple[Feeds, Feeds]]:
        """Run the checked samples through a part of the graph, and yield its outputs `ends`."""
        read = run.reads - fed.keys()
        for number in self._looked_at:
            values = self._values.get(number, read | (ends - set(run.keeps)))
            values |= run({**values, **fed})
            yield self._values.get(number, self._inputs), {name: values[name] for name in ends}

    def _close(self) -> None:
        if self._fed is not None:
            self._fed[1].__exit__(None, None, None)
        self._fed = None
