"""`Streams` of an ONNX graph: calibration data run through it in onnxruntime, wave by wave.

    survey       the dense stream: alive values --wave--> alive values, rows x of every site of the wave
    sequence     the dense one, and beside it the compressed one, whose sites are what they became, to rows x^
    distance     a survey's stream onwards from where it stands, on some samples, with one site replaced

All streams go wave by wave, a batch at a time; what is alive between two waves waits in memory or on disk, so the
network runs once a stream and not once a site, and only one wave's moments are in memory. A site's target is its dense
response; where its output is added to another stream, plus what that stream has lost on the way (`res - res^`), so each
branch mends what it is added to.
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
from rsi_deploy.calibration.accumulator import Gathered
from rsi_deploy.calibration.activations import CalibratedSite, Distance, Metric, Replacement, RowCounts, output_distance
from rsi_deploy.calibration.live_values import LiveValues
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.output_sensitivity import metrics_or_none
from rsi_deploy.core.errors import ModelError
from rsi_deploy.evaluation.answer_outputs import with_readable_output
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.onnx_models.calibration.check_samples import CheckSamples
from rsi_deploy.onnx_models.calibration.dense_pass import Survey
from rsi_deploy.onnx_models.calibration.gradients import output_metrics
from rsi_deploy.onnx_models.calibration.paired_passes import TwoStreams
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached, found_sites, reach
from rsi_deploy.onnx_models.calibration.row_sampling import Readings, axes_of, in_order, padding_mask
from rsi_deploy.onnx_models.calibration.rows import Taps
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import cut, thinned
from rsi_deploy.onnx_models.site_factorizer import graph_factors
from rsi_deploy.runtime.feeds.values import arrays_of
from rsi_deploy.runtime.provider_spec import parse
from rsi_deploy.runtime.providers import short_name

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Visit = Callable[[CalibratedSite, Moments | Samples], Replacement | None]

NEVER = "never executed on the calibration data"
SMALL_WORK = 20_000_000
"""MACs of a run below which one thread is as fast as several, which wait for each other at every operator."""


class OnnxStreams:
    """The streams of the ONNX file at `path`.

    Args:
        path: the dense model, its large weights in a data file beside it; temporary models are written beside it.
        feeds: gives a fresh iterator over the calibration data, a batch of model inputs at a time.
        samples: how many samples they are.
        wanted: says by name which sites may be split; the others stay dense and are not looked at.
        macs: multiply-accumulates a sample, by node name.
        provider: onnxruntime's, to run on.
        seed: of the choice of rows.
        compensate: let a branch make up for what the stream it is added to has lost.
        before_ids: where the model gives class ids alone, measure at the scores that they are read from.
        metrics: those of the same model, data and seed, where they are known: they are not computed again.
        proto: the model, where it is parsed already.
        sites: its sites, where they are known already.
    """

    def __init__(
        self,
        path: Path,
        feeds: Callable[[], Iterator[Feeds]],
        samples: int,
        *,
        wanted: Callable[[str], bool] = lambda name: True,
        macs: Mapping[str, int] | None = None,
        provider: str = "cpu",
        seed: int = 0,
        compensate: bool = True,
        before_ids: bool = False,
        metrics: Mapping[str, Metric] | None = None,
        proto: ModelProto | None = None,
        sites: Sequence[gp.Site] | None = None,
    ) -> None:
        self._path, self._feeds = path, feeds
        proto = proto or read_proto(path)
        self._model = with_readable_output(proto) if before_ids else proto
        self._provider = _for_work(provider, _fixed_batch(self._model) * sum((macs or {}).values()))
        self._dense_outputs: Tensor | None = None
        self._rows: dict[str, int] = {}
        self._samples, self._seed = samples, seed
        self._checked = CheckSamples(axes_of(self._model), samples)
        self._survey: Survey | None = None
        self._metrics = functools.cache(self._computed_metrics if metrics is None else lambda: metrics)
        self._reached, self.unreachable = reach(
            self._model,
            found_sites(path) if sites is None else sites,
            wanted=wanted,
            macs=macs or {},
            compensate=compensate,
        )
        self._program = cut(self._model, self._reached)
        self._readings = Readings(
            self._program, path, self._reached.values(), samples=samples, seed=seed, provider=provider
        )

    @property
    def sites(self) -> tuple[CalibratedSite, ...]:
        """See `Streams`."""
        return tuple(r.site for r in self._in_order())

    def rows_of(self, name: str) -> int:
        """How many rows the moments of a site were taken from; 0 before any were."""
        return self._rows.get(name, 0)

    def only(self, names: Collection[str]) -> "OnnxStreams":
        """The same streams, of which these sites alone are gathered and visited; the others are run as they are."""
        fewer = copy.copy(self)
        wanted = {output for output, r in self._reached.items() if r.site.name in names}
        fewer._program = thinned(self._program, wanted)
        return fewer

    def survey(self, visit: Callable[[CalibratedSite, Moments | Samples], None]) -> None:
        """See `Streams`; in execution order. Within `visit`, the distance of the visited site alone is cheap.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        if not self.sites:
            return
        with Survey(self._program, self._path, self._reached, self._readings, provider=self._provider) as survey:
            self._checked.clear()
            self._dense_outputs = None
            survey.load(self._feeds(), self._checked)
            self._survey = survey
            try:
                for wave in self._program.waves:
                    if not wave.sites:
                        break
                    gathered = survey.advance(wave)
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
        """See `Streams`.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        if not self.sites:
            return
        became: dict[str, gp.Factors] = {}  # of the wave before, by weight
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
            streams.load(self._feeds())
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
        """See `Streams`; of some samples (see `CheckSamples`), the first floating output; padding is left out.

        Raises:
            ModelError: an output with NaN or infinite values where nothing is replaced, or no floating output.
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

    def metrics(self) -> Mapping[str, Metric]:
        """See `Streams`; computed once. None where torch does not know what stands behind the sites.

        They are those of all sites, in `only` some of them too: a plan is then fitted to the same numbers as the export
        that made it.
        """
        return self._metrics()

    def _computed_metrics(self) -> Mapping[str, Metric]:
        return metrics_or_none(
            lambda: output_metrics(
                self._program,
                self._path,
                self._reached,
                self._feeds(),
                samples=self._samples,
                provider=self._provider,
                seed=self._seed,
            )
        )

    def _in_order(self) -> Iterator[Reached]:
        return (self._reached[node.output[0]] for wave in self._program.waves for node in wave.sites)

    def _result(self, r: Reached, gathered: dict[str, Gathered]) -> Moments | Samples | None:
        gathering = gathered.pop(r.graph.output)
        self._rows[r.site.name] = gathering.rows
        if not gathering.rows:
            self.unreachable[r.site.name] = NEVER
        return in_order(r, gathering.result())

    @property
    def _ends(self) -> list[str]:
        """The graph's outputs, but for inputs and constants, which do not move."""
        made = {name for node in self._model.graph.node for name in node.output} - self._program.fixed
        return [value.name for value in self._model.graph.output if value.name in made]

    def _outputs(self, factors: Mapping[str, gp.Factors]) -> Tensor:
        """The first floating output on some samples, with these weights split."""
        nodes = self._model.graph.node
        with Segment(self._program, self._path, nodes, Taps(), self._ends, factors, provider=self._provider) as run:
            return _stacked(((batch, run(batch)) for batch in self._checked.batches_of(self._feeds)), self._ends)


def _for_work(provider: str, macs: int) -> str:
    """The provider for runs of so many MACs, 0 for an unknown number: one thread of the CPU where they are few."""
    spec = parse(provider)
    if short_name(spec.name) != "cpu" or "threads" in spec.session or not 0 < macs < SMALL_WORK:
        return provider
    return str(replace(spec, session={**spec.session, "threads": "1"}))


def _fixed_batch(model: ModelProto) -> int:
    """Samples a run of a model that fixes its batch; 0 for any number."""
    weights = {tensor.name for tensor in model.graph.initializer}
    dims = (value.type.tensor_type.shape.dim[:1] for value in model.graph.input if value.name not in weights)
    return max((dim[0].dim_value for dim in dims if dim), default=0)


def _stacked(outputs: Iterable[tuple[Feeds, Feeds]], names: Sequence[str]) -> Tensor:
    """The first floating one, among `names`, of each batch's outputs, behind each other; padding is left out.

    Args:
        outputs: batches with the graph's outputs on them, by name.
        names: of the outputs, in order.
    """
    found = []
    for batch, values in outputs:
        arrays = (array for name in names for array in arrays_of(name, values[name]).values())
        array = next((value for value in arrays if value.dtype.kind == "f" and value.ndim and value.size), None)
        if array is None:
            raise ModelError(
                f"no output of the model is floating ({', '.join(names)}), and nothing floating is before it: nothing "
                "to measure a distance by; leave out --calib and choose a size with --rank"
            )
        found.append(_tokens_alone(array.astype(np.float32), batch))
    if len({array.shape[1:] for array in found}) > 1:
        found = [array.reshape(-1, 1, array.shape[-1]) for array in found]
    return torch.from_numpy(np.concatenate(found))


def _tokens_alone(output: Array, batch: Feeds) -> Array:
    """An output `(N, L, ...)` without its padding, `(tokens, 1, ...)`: never to be taken for `(N, classes)`."""
    mask = padding_mask(batch)
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask][:, None]
