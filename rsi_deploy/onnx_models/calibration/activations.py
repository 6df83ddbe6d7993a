"""Run calibration data through an ONNX graph in onnxruntime, stage by stage: `ModelActivations` of a file.

    survey       the dense stream: alive values --waves--> alive values, rows x of every site of the waves
    sequence     the dense stream, and beside it the compressed one with its replaced sites: rows x^
    distance     from the current stage of a survey to the outputs, on some samples, with one site replaced

All streams go wave by wave, a batch at a time. Values that are alive between two waves wait in memory or on disk, so
the network runs once a stream and not once a site, and only one wave's moments are in memory. The target of a site is
its dense response. Where its output is added to a residual stream, the loss of that stream so far (`res - res^`) is
added to the target, so that each branch compensates for it.
"""

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibration.accumulator import SiteAccumulator
from rsi_deploy.calibration.activations import (
    CalibratedSite,
    Distance,
    OutputSensitivity,
    Replacement,
    RowCounts,
    output_distance,
)
from rsi_deploy.calibration.live_values import LiveValues
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.output_sensitivity import sensitivities_or_empty
from rsi_deploy.core.errors import ModelError
from rsi_deploy.evaluation.answer_outputs import with_readable_output
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.onnx_models.calibration.check_samples import CheckSamples
from rsi_deploy.onnx_models.calibration.dense_pass import Survey
from rsi_deploy.onnx_models.calibration.gradients import output_sensitivities
from rsi_deploy.onnx_models.calibration.paired_passes import TwoStreams
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached, found_sites, reach
from rsi_deploy.onnx_models.calibration.row_sampling import Readings, axes_of, in_order, padding_mask, token_count
from rsi_deploy.onnx_models.calibration.rows import Taps
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import cut, thinned
from rsi_deploy.onnx_models.site_factorizer import graph_factors
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.values import arrays_of_output
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Visit = Callable[[CalibratedSite, Moments | Samples], Replacement | None]

NEVER = "never executed on the calibration data"
ID_BYTES = 512
"""Bytes that a whole number in an input counts for: it may be the id of a token, which becomes a vector."""
INPUT_BYTES = 2 * 2**20
"""Bytes of inputs in a run. Values of larger runs leave the caches and take memory: pictures of 224 x 224 took twice as
long in runs of 32 as in runs of 4."""
SMALL_WORK = 20_000_000
"""MACs of a run below which one thread is as fast as several, which synchronize at every operator."""


class OnnxStreams:
    """The activations of the ONNX file at `path`.

    Args:
        path: the dense model, its large weights in a data file beside it; temporary models are written beside it.
        feeds: function that returns a fresh iterator over the calibration data, a batch of model inputs at a time.
        samples: number of samples in the data.
        may_split: function from a site name to whether the site may be split; other sites are not observed.
        macs: multiply-accumulates a sample, by node name.
        provider: execution provider of onnxruntime.
        seed: random seed for the choice of rows and for the probes of sensitivities.
        compensate: let a branch compensate for the loss of the stream to which it is added.
        before_ids: measure at the scores where the model's outputs are class ids alone.
        sensitivities: sensitivities of the same model, data and seed that an earlier run has computed.
        proto: the model, parsed; None reads it from its file.
        sites: all sites of the model; None finds them.
    """

    def __init__(
        self,
        path: Path,
        feeds: Callable[[], Iterator[Feeds]],
        samples: int,
        *,
        may_split: Callable[[str], bool] = lambda name: True,
        macs: Mapping[str, int] | None = None,
        provider: str = "cpu",
        seed: int = 0,
        compensate: bool = True,
        before_ids: bool = False,
        sensitivities: Mapping[str, OutputSensitivity] | None = None,
        proto: ModelProto | None = None,
        sites: Sequence[gp.Site] | None = None,
    ) -> None:
        self._path = path
        proto = proto or read_proto(path)
        self._model = with_readable_output(proto) if before_ids else proto
        self._provider = _for_work(provider, _fixed_batch(self._model) * sum((macs or {}).values()))
        self._dense_outputs: Tensor | None = None
        self._rows: dict[str, int] = {}
        self._run_share = 1.0
        self._samples, self._seed = samples, seed
        axes = axes_of(self._model)
        self._feeds = functools.partial(_in_parts, feeds, axes)
        self._checked = CheckSamples(axes, samples)
        self._survey: Survey | None = None
        self._sensitivities = functools.cache(
            self._computed_sensitivities if sensitivities is None else lambda: sensitivities
        )
        self._reached, self.unreachable = reach(
            self._model,
            found_sites(path) if sites is None else sites,
            may_split=may_split,
            macs=macs or {},
            compensate=compensate,
        )
        self._program = cut(self._model, self._reached)
        self._readings = Readings(
            self._program, path, self._reached.values(), samples=samples, seed=seed, provider=provider
        )

    @property
    def sites(self) -> tuple[CalibratedSite, ...]:
        """See `ModelActivations`."""
        return tuple(r.site for r in self._in_order())

    def rows_of(self, name: str) -> int:
        """Return the number of rows in the moments of a site; 0 before there are any."""
        return self._rows.get(name, 0)

    @property
    def run_share(self) -> float:
        """Share of the data that the last pass ran: below 1 for text with more tokens than any site has rows."""
        return self._run_share

    def only(self, names: Collection[str]) -> "OnnxStreams":
        """Return the same activations, with only these sites gathered and visited; the others run dense."""
        fewer = copy.copy(self)
        outputs = {output for output, r in self._reached.items() if r.site.name in names}
        fewer._program = thinned(self._program, outputs)
        return fewer

    def survey(self, visit: Callable[[CalibratedSite, Moments | Samples], None]) -> None:
        """See `ModelActivations`; in execution order. Within `visit`, the distance of the visited site alone is cheap.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        if not self.sites:
            return
        with Survey(self._program, self._path, self._reached, self._readings, provider=self._provider) as survey:
            self._checked.clear()
            self._dense_outputs = None
            survey.load(self._chosen(survey=True), self._checked)
            self._survey = survey
            try:
                for group in survey.groups():
                    gathered = survey.gather(group)
                    for wave in group:
                        survey.advance()
                        for node in wave.sites:
                            r = self._reached[node.output[0]]
                            moments = self._result(r, gathered)
                            if isinstance(moments, Moments):
                                moments = Moments.dense(moments, r.weight())
                            if moments is not None:
                                visit(r.site, moments)
            finally:
                self._survey = None

    def sequence(self, visit: Visit, counts: Mapping[str, RowCounts] | None = None) -> None:
        """See `ModelActivations`.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        if not self.sites:
            return
        became: dict[str, gp.SplitFactors] = {}  # factors of the wave before, by weight
        with LiveValues() as dense, LiveValues() as compressed:
            streams = TwoStreams(
                self._program,
                self._path,
                self._reached,
                self._readings,
                dense,
                compressed,
                provider=self._provider,
                counts=counts or {},
            )
            streams.load(self._chosen())
            if self._run_share < 1:
                streams.forget_counts()
            for wave in self._program.waves:
                if not wave.sites:
                    break
                gathered = streams.advance(wave, became)
                became = {}
                for node in wave.sites:
                    r = self._reached[node.output[0]]
                    moments = self._result(r, gathered)
                    replacement = None if moments is None else visit(r.site, moments)
                    if replacement is not None:
                        became[r.graph.weight] = graph_factors(replacement, r.graph)

    def distance(self, replacements: Mapping[str, Replacement]) -> Distance:
        """See `ModelActivations`; on the `CheckSamples`, at the first floating output, without padding.

        Raises:
            ModelError: the dense output holds NaN or infinite values, or no output is floating.
        """
        if self._dense_outputs is None:
            dense = self._outputs({})
            if not torch.isfinite(dense).all():
                raise ModelError(
                    f"{self._path.name}: its output on the calibration data holds NaN or infinite values"
                    f"; take those samples out of --calib, or repair the model"
                )
            self._dense_outputs = dense
        reached = [r for r in self._reached.values() if r.site.name in replacements]
        if self._survey is not None and len(reached) == 1 and self._survey.has(reached[0]):
            (r,) = reached
            other = _stacked(self._survey.outputs(r, replacements[r.site.name], self._ends), self._ends)
        else:
            other = self._outputs({r.graph.weight: graph_factors(replacements[r.site.name], r.graph) for r in reached})
        return output_distance(self._dense_outputs, other)

    def sensitivities(self) -> Mapping[str, OutputSensitivity]:
        """See `ModelActivations`; computed once; empty where torch does not know an operator behind the sites.

        They are those of all sites, also in `only`: a plan is then fitted to the same numbers as the export that made
        it.
        """
        return self._sensitivities()

    def _computed_sensitivities(self) -> Mapping[str, OutputSensitivity]:
        return sensitivities_or_empty(
            lambda: output_sensitivities(
                self._program,
                self._path,
                self._reached,
                self._feeds(),
                samples=self._samples,
                provider=self._provider,
                seed=self._seed,
            )
        )

    def _chosen(self, *, survey: bool = False) -> Iterator[Feeds]:
        """Yield all batches, or of much text evenly spaced ones."""
        due, self._run_share = 0.0, 1.0
        for batch in self._feeds():
            share = self._readings.share(batch, survey=survey)
            self._run_share = min(self._run_share, share)
            due += share
            if due >= 1 - 1e-9:
                due -= 1
                yield batch

    def _in_order(self) -> Iterator[Reached]:
        return (self._reached[node.output[0]] for wave in self._program.waves for node in wave.sites)

    def _result(self, r: Reached, gathered: dict[str, SiteAccumulator]) -> Moments | Samples | None:
        gathering = gathered.pop(r.graph.output)
        self._rows[r.site.name] = gathering.rows
        if not gathering.rows:
            self.unreachable[r.site.name] = NEVER
        return in_order(r, gathering.result())

    @property
    def _ends(self) -> list[str]:
        """The graph's outputs, except inputs and constants, which no split changes."""
        made = {name for node in self._model.graph.node for name in node.output} - self._program.fixed
        return [value.name for value in self._model.graph.output if value.name in made]

    def _outputs(self, factors: Mapping[str, gp.SplitFactors]) -> Tensor:
        """Return the first floating output on the check samples, with these weights split."""
        nodes = self._model.graph.node
        with Segment(self._program, self._path, nodes, Taps(), self._ends, factors, provider=self._provider) as run:
            return _stacked(((batch, run(batch)) for batch in self._checked.batches_of(self._feeds)), self._ends)


def _for_work(provider: str, macs: int) -> str:
    """Return the provider for runs of so many MACs (0: unknown): one thread of the CPU where they are few."""
    spec = parse_provider(provider)
    if short_name(spec.name) != "cpu" or "threads" in spec.session or not 0 < macs < SMALL_WORK:
        return provider
    return str(replace(spec, session={**spec.session, "threads": "1"}))


def _fixed_batch(model: ModelProto) -> int:
    """Return the samples in a run of a model that fixes its batch; 0 where it does not."""
    weights = {tensor.name for tensor in model.graph.initializer}
    dims = (value.type.tensor_type.shape.dim[:1] for value in model.graph.input if value.name not in weights)
    return max((dim[0].dim_value for dim in dims if dim), default=0)


def _in_parts(feeds: Callable[[], Iterable[Feeds]], axes: BatchAxes) -> Iterator[Feeds]:
    """Yield the batches in parts of at most `INPUT_BYTES`; batches of fixed size stay whole."""
    for batch in feeds():
        count = axes.samples(batch)
        size = max(sum(array.nbytes for array in batch.values()), ID_BYTES * token_count(batch))
        step = count if axes.fixed is not None else max(1, count * INPUT_BYTES // max(size, 1))
        for begin in range(0, count, step):
            yield batch if step >= count else axes.cut(batch, slice(begin, begin + step))


def _stacked(outputs: Iterable[tuple[Feeds, Feeds]], names: Sequence[str]) -> Tensor:
    """Join the first floating output of each batch along the samples, without padding.

    Args:
        outputs: batches of inputs with the outputs on them, by name.
        names: names of the outputs, in order.
    """
    found = []
    for batch, values in outputs:
        arrays = (array for name in names for array in arrays_of_output(name, values[name]).values())
        array = next((value for value in arrays if value.dtype.kind == "f" and value.ndim and value.size), None)
        if array is None:
            raise ModelError(
                f"no output of the model is floating ({', '.join(names)}), and no value before it: no distance can be "
                "measured; leave out --calib and choose a size with --rank"
            )
        found.append(_tokens_alone(array.astype(np.float32), batch))
    if len({array.shape[1:] for array in found}) > 1:
        found = [array.reshape(-1, 1, array.shape[-1]) for array in found]
    return torch.from_numpy(np.concatenate(found))


def _tokens_alone(output: Array, batch: Feeds) -> Array:
    """Return an output `(N, L, ...)` without padding as `(tokens, 1, ...)`, which differs from `(N, classes)`."""
    mask = padding_mask(batch)
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask][:, None]
