"""Run the dense stream of an ONNX graph through its waves, and measure replacements at the current wave.

    all the data      alive values --a group of waves--> alive values, rows x of every site
    checked samples   alive values --wave, its sites--> alive values, and then for each replacement that is tried:
                      alive values --one replaced site, all later waves--> outputs

The waves of a group are those whose moments fit into memory together, so a small network runs once over the data.

A trial of one replacement costs the part of the network behind the site; the part in front runs once. The model of that
part is made once a site where weight and bias can be model inputs: those of a replacement are its product.
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
from rsi_deploy.calibration.moments import GRAM_LIMIT, moment_bytes, row_limit
from rsi_deploy.core.progress import at
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

TOGETHER = 32 * 2**20
"""Bytes of the moments that are gathered in one run of the data."""


class Survey:
    """The dense stream, at first before wave 1. Use it in a `with`.

    Args:
        program: the dense model.
        path: its file.
        reached: its sites, by output.
        readings: reads the rows of the sites.
        provider: execution provider of onnxruntime.
    """

    def __init__(
        self, program: Program, path: Path, reached: Mapping[str, Reached], readings: Readings, *, provider: str
    ) -> None:
        self._program, self._path, self._provider = program, path, provider
        self._reached, self._readings = reached, readings
        self._inputs = [value.name for value in program.model.graph.input if value.name not in program.fixed]
        self._values, self._checked = LiveValues(), LiveValues()
        self._batches = self._checked_batches = 0
        self._gathered = self._done = self._followed = 0  # waves that the data, the visits, the checked samples passed
        self._fed: tuple[str, Segment] | None = None  # the site whose weight is an input, and the model behind it

    def __enter__(self) -> "Survey":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        for values in (self._values, self._checked):
            values.__exit__(kind, error, trace)

    def load(self, batches: Iterable[Feeds], checked: CheckSamples) -> None:
        """Store the data, and the samples on which outputs are compared."""
        for batch in map(checked.add, batches):
            self._values.put(self._batches, batch)
            self._batches += 1
        for batch in checked.batches():
            self._checked.put(self._checked_batches, batch)
            self._checked_batches += 1

    def groups(self, limit: int = TOGETHER) -> Iterator[Sequence[Wave]]:
        """Yield the waves with sites in groups whose moments take at most `limit` bytes; one wave may exceed it."""
        group: list[Wave] = []
        size = 0
        for wave in self._program.waves:
            own = sum(map(_gathered_bytes, self._sites((wave,))))
            if group and size + own > limit:
                yield group
                group, size = [], 0
            if wave.sites:
                group.append(wave)
                size += own
        if group:
            yield group

    def gather(self, group: Sequence[Wave]) -> dict[str, SiteAccumulator]:
        """Run the data through the next waves and return the moments that their sites gather.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        self._close()
        self._gathered += len(group)
        here = self._sites(group)
        is_last = not any(wave.sites for wave in self._program.waves[self._gathered :])
        alive = frozenset[str]() if is_last else group[-1].alive
        gathered = {r.graph.output: SiteAccumulator(r.site, BUFFER_SIZE // len(here)) for r in here}
        weights = {r.graph.output: weight_of(r) for r in here if r.site.in_features > GRAM_LIMIT}
        nodes = [node for wave in group for node in (*wave.nodes, *wave.sites)]
        with Segment(self._program, self._path, nodes, taps_of(here), alive, provider=self._provider) as run:
            for number in range(self._batches):
                at(f"inputs of {len(here)} sites", number, self._batches)
                index = self._readings.index(here, self._values.get(number, self._inputs), number, survey=True)
                found = run({**self._values.get(number, run.reads - index.keys()), **index})
                self._values.put(number, {name: found[name] for name in run.keeps})
                self._values.keep_only(number, {*alive, *self._inputs})
                for r in here:
                    x = inputs_of(r, found.pop(f"{r.tag}/rows"))
                    weight = weights.get(r.graph.output)
                    y = x.new_zeros(*x.shape[:-1], 0) if weight is None else x @ weight.mT
                    gathered[r.graph.output].add(x, y, fold=number)
        return gathered

    def advance(self) -> None:
        """Go to the next wave: `outputs` are those of replacements of its sites."""
        self._close()
        self._done += 1

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
        self._follow()
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

    def _follow(self) -> None:
        """Run the checked samples up to the sites of the current wave, these included."""
        waves = self._program.waves[self._followed : self._done]
        self._followed = self._done
        if not waves:
            return
        nodes = [node for wave in waves for node in (*wave.nodes, *wave.sites)]
        alive = waves[-1].alive
        with Segment(self._program, self._path, nodes, Taps(), alive, provider=self._provider) as run:
            for number in range(self._checked_batches):
                self._checked.put(number, run(self._checked.get(number, run.reads)))
                self._checked.keep_only(number, {*alive, *self._inputs})

    def _sites(self, waves: Iterable[Wave]) -> list[Reached]:
        return [self._reached[node.output[0]] for wave in waves for node in wave.sites]

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
        for number in range(self._checked_batches):
            values = self._checked.get(number, read | (ends - set(run.keeps)))
            values |= run({**values, **fed})
            yield self._checked.get(number, self._inputs), {name: values[name] for name in ends}

    def _close(self) -> None:
        if self._fed is not None:
            self._fed[1].__exit__(None, None, None)
        self._fed = None


def _gathered_bytes(r: Reached) -> int:
    """Return the bytes that the moments of a site take in a survey, which gathers no responses."""
    wide = r.site.out_features if r.site.in_features > GRAM_LIMIT else 0
    return moment_bytes(r.site.in_features, wide, r.site.groups, row_limit(r.site.in_features, r.site.groups))
