"""The dense stream of an ONNX graph through its waves, and what its outputs become where it stands.

    all the data      alive values --wave, its sites--> alive values, rows x of every site
    checked samples   the same, and then, as often as asked:
                      alive values --one site as replaced--> its output --all later waves--> outputs

So a look at one site's replacement costs what lies behind the site, and the network in front of it runs once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

import graph_passes as gp
from rsi_deploy.calibrate.gathered import Gathered
from rsi_deploy.calibrate.live_values import LiveValues
from rsi_deploy.calibrate.moments import GRAM_LIMIT
from rsi_deploy.calibrate.onnx_reach import Reached
from rsi_deploy.calibrate.onnx_readings import Readings, inputs_of, taps_of, weight_of
from rsi_deploy.calibrate.onnx_rows import Taps
from rsi_deploy.calibrate.onnx_segment import Segment
from rsi_deploy.calibrate.onnx_waves import Program, Wave

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Survey:
    """The dense stream, standing before the first wave. Use it in a `with`.

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
        self._rest: Segment | None = None

    def __enter__(self) -> "Survey":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._values.__exit__(kind, error, trace)

    def load(self, batches: Iterable[Feeds], checked: Callable[[], Iterable[Feeds]]) -> None:
        """Take the data in, then the samples to look at outputs on."""
        for batch in batches:
            self._values.put(self._batches, batch)
            self._batches += 1
        self._all = self._batches
        for batch in checked():
            self._values.put(self._all, batch)
            self._all += 1

    def advance(self, wave: Wave) -> dict[str, Gathered]:
        """The stream through the next wave; what its sites gather.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        self._close()
        self._done += 1
        here = [self._reached[node.output[0]] for node in wave.sites]
        gathered = {r.graph.output: Gathered(r.site) for r in here}
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
                    gathered[r.graph.output].add(x, y)
        return gathered

    def has(self, r: Reached) -> bool:
        """Whether the stream stands at this site."""
        return bool(self._done) and r.graph.output in {n.output[0] for n in self._program.waves[self._done - 1].sites}

    def outputs(self, r: Reached, factors: gp.Factors, names: Iterable[str]) -> Iterator[tuple[Feeds, Feeds]]:
        """The checked samples, a batch at a time, with what the graph's outputs `names` become.

        Args:
            r: a site where the stream stands.
            factors: what it is replaced by.
            names: of the outputs.
        """
        wave = self._program.waves[self._done - 1]
        (node,) = (node for node in wave.sites if node.output[0] == r.graph.output)
        ends = set(names)
        rest = self._behind(ends)
        split = {r.graph.weight: factors}
        made = set(node.output)
        with Segment(self._program, self._path, [node], Taps(), made, split, provider=self._provider) as site:
            for number in range(self._batches, self._all):
                own = site(self._values.get(number, site.reads))
                values = {**self._values.get(number, (rest.reads | ends) - made - set(rest.keeps)), **own}
                values |= rest(values) if rest.outputs else {}
                yield self._values.get(number, self._inputs), {name: values[name] for name in ends}

    def _behind(self, ends: set[str]) -> Segment:
        """All that lies behind the sites of the wave."""
        if self._rest is None:
            later = self._program.waves[self._done :]
            nodes = [node for wave in later for node in (*wave.nodes, *wave.sites)]
            self._rest = Segment(self._program, self._path, nodes, Taps(), ends, provider=self._provider)
        return self._rest

    def _close(self) -> None:
        if self._rest is not None:
            self._rest.__exit__(None, None, None)
        self._rest = None
