"""`Streams` of an ONNX graph: calibration data run through it in onnxruntime, wave by wave.

    survey       the dense stream: alive values --wave--> alive values, rows x of every site of the wave
    sequence     the dense one, and beside it the compressed one, whose sites are what they became, to rows x^
    distance     a survey's stream onwards from where it stands, on some samples, with one site replaced

All streams go wave by wave, a batch at a time; what is alive between two waves waits in memory or on disk, so the
network runs once a stream and not once a site, and only one wave's moments are in memory. A site's target is its dense
response; where its output is added to another stream, plus what that stream has lost on the way (`res - res^`), so each
branch mends what it is added to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibrate.gathered import Gathered
from rsi_deploy.calibrate.live_values import LiveValues
from rsi_deploy.calibrate.metric import metrics_or_none
from rsi_deploy.calibrate.moments import Moments, Samples
from rsi_deploy.calibrate.onnx_checked import Checked
from rsi_deploy.calibrate.onnx_gradients import output_metrics
from rsi_deploy.calibrate.onnx_reach import Reached, reach
from rsi_deploy.calibrate.onnx_readings import Readings, in_order, padding_mask
from rsi_deploy.calibrate.onnx_rows import Taps
from rsi_deploy.calibrate.onnx_segment import Segment
from rsi_deploy.calibrate.onnx_survey import Survey
from rsi_deploy.calibrate.onnx_two_streams import TwoStreams
from rsi_deploy.calibrate.onnx_waves import cut
from rsi_deploy.calibrate.streams import Distance, Metric, Replacement, RowCounts, StreamSite, output_distance
from rsi_deploy.errors import ModelError
from rsi_deploy.factor_source import graph_factors
from rsi_deploy.gateway.onnx_reader import read_proto
from rsi_deploy.measure.values import arrays_of

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Visit = Callable[[StreamSite, Moments | Samples], Replacement | None]

NEVER = "never executed on the calibration data"


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
        metrics: those of the same model, data and seed, where they are known: they are not asked for again.
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
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        self._path, self._feeds, self._provider = path, feeds, provider
        self._model = read_proto(path)
        self._dense_outputs: Tensor | None = None
        self._rows: dict[str, int] = {}
        self._samples, self._seed = samples, seed
        self._checked = Checked(self._model, samples)
        self._survey: Survey | None = None
        self._metrics = metrics
        self._reached, self.unreachable = reach(
            self._model, path, wanted=wanted, macs=macs or {}, compensate=compensate
        )
        self._program = cut(self._model, self._reached)
        self._readings = Readings(
            self._program, path, self._reached.values(), samples=samples, seed=seed, provider=provider
        )

    @property
    def sites(self) -> tuple[StreamSite, ...]:
        """See `Streams`."""
        return tuple(r.site for r in self._in_order())

    def rows_of(self, name: str) -> int:
        """How many rows the moments of a site were taken from; 0 before any were."""
        return self._rows.get(name, 0)

    def survey(self, visit: Callable[[StreamSite, Moments | Samples], None]) -> None:
        """See `Streams`; in execution order. Within `visit`, the distance of the visited site alone is cheap.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        if not self._reached:
            return
        with Survey(self._program, self._path, self._reached, self._readings, provider=self._provider) as survey:
            self._checked.clear()
            self._dense_outputs = None
            survey.load(map(self._checked.add, self._feeds()), self._checked.batches)
            self._survey = survey
            try:
                for wave in self._program.waves:
                    gathered = survey.advance(wave) if wave.sites else {}
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
        if not self._reached:
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
        """See `Streams`; of some samples (see `Checked`), the first floating output; padding is left out.

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
        factors = {r.graph.weight: graph_factors(replacements[r.site.name], r.graph) for r in reached}
        if self._survey is not None and len(reached) == 1 and self._survey.has(reached[0]):
            (split,) = factors.values()
            other = _stacked(self._survey.outputs(reached[0], split, self._ends), self._ends)
        else:
            other = self._outputs(factors)
        return output_distance(self._dense_outputs, other)

    def metrics(self) -> Mapping[str, Metric]:
        """See `Streams`; asked for once. None where torch does not know what stands behind the sites."""
        if self._metrics is None:
            self._metrics = metrics_or_none(
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
        return self._metrics

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


def _stacked(outputs: Iterable[tuple[Feeds, Feeds]], names: Sequence[str]) -> Tensor:
    """The first floating one, among `names`, of each batch's outputs, behind each other; padding is left out.

    Args:
        outputs: batches with the graph's outputs on them, by name.
        names: of the outputs, in order.
    """
    found = []
    for batch, values in outputs:
        arrays = (array for name in names for array in arrays_of(name, values[name]).values())
        array = next((array for array in arrays if array.dtype.kind == "f" and array.ndim), None)
        if array is None:
            raise ModelError("no output of the model is floating: nothing to measure a distance by; leave out --calib")
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
