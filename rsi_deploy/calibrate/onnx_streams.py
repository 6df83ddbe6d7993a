"""`Streams` of an ONNX graph: calibration data run through it in onnxruntime, wave by wave.

    dense        alive values --wave--> alive values, rows x of every site of the wave
    compressed   alive values --sites of the wave before, as they became; wave--> alive values, rows x^

Both streams stand at the same wave, a batch at a time; what is alive between two waves waits in memory or on disk, so
the network runs once a stream and not once a site. A site's target is its dense response; where its output is added to
another stream, plus what that stream has lost on the way (`res - res^`), so each branch mends what it is added to.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibrate.live_values import LiveValues
from rsi_deploy.calibrate.metric import metrics_or_none
from rsi_deploy.calibrate.moments import GRAM_LIMIT, Gathering, Moments, Samples, gathered_bytes, rows_for
from rsi_deploy.calibrate.onnx_gradients import output_metrics
from rsi_deploy.calibrate.onnx_reach import Reached, reach
from rsi_deploy.calibrate.onnx_readings import Readings, padding_mask, samples_of, taps_of
from rsi_deploy.calibrate.onnx_rows import Taps
from rsi_deploy.calibrate.onnx_segment import Segment
from rsi_deploy.calibrate.onnx_two_streams import TwoStreams, gather
from rsi_deploy.calibrate.onnx_waves import cut
from rsi_deploy.calibrate.streams import Distance, Replacement, StreamSite, output_distance
from rsi_deploy.errors import ModelError
from rsi_deploy.factor_source import graph_factors

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Visit = Callable[[StreamSite, Moments | Samples], Replacement | None]

GATHERED_LIMIT = 512 * 2**20
DISTANCE_SAMPLES = 128
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
    ) -> None:
        self._path, self._feeds, self._provider = path, feeds, provider
        self._model = onnx.load(path, load_external_data=False)
        self._dense_outputs: Tensor | None = None
        self._rows: dict[str, int] = {}
        self._seed = seed
        self._samples, self._some = samples, list[Feeds]()
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
        """See `Streams`; as many runs over the data as keep what is gathered in bounds.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        for group in self._groups():
            gathered = self._surveyed(group)
            for r in group:
                moments = self._result(r, gathered)
                if isinstance(moments, Moments):
                    moments = Moments.dense(moments.rows, moments.mean_x, moments.xx, r.weight())
                if moments is not None:
                    visit(r.site, moments)

    def sequence(self, visit: Visit) -> None:
        """See `Streams`.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        if not self._reached:
            return
        became: dict[str, gp.Factors] = {}  # of the wave before, by weight
        with LiveValues() as dense, LiveValues() as compressed:
            streams = TwoStreams(
                self._program, self._path, self._reached, self._readings, dense, compressed, provider=self._provider
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
        """See `Streams`; of about `DISTANCE_SAMPLES` samples, the first floating output; padding is left out.

        Raises:
            ModelError: an output with NaN or infinite values where nothing is replaced, or no floating output.
        """
        if self._dense_outputs is None:
            dense = self._outputs({})
            if not torch.isfinite(dense).all():
                raise ModelError(f"{self._path.name}: its output on the calibration data holds NaN or infinite values")
            self._dense_outputs = dense
        factors = {
            r.graph.weight: graph_factors(replacements[r.site.name], r.graph)
            for r in self._reached.values()
            if r.site.name in replacements
        }
        return output_distance(self._dense_outputs, self._outputs(factors))

    def metrics(self) -> Mapping[str, Tensor]:
        """See `Streams`; none where torch does not know what stands behind the sites."""
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

    def _groups(self) -> Iterator[list[Reached]]:
        """The sites, as many at a time as may be gathered together."""
        group: list[Reached] = []
        total = 0
        for r in self._in_order():
            site = r.site
            wide = site.out_features if site.in_features > GRAM_LIMIT else 0
            size = gathered_bytes(site.in_features, wide, site.groups, rows_for(site.in_features))
            if group and total + size > GATHERED_LIMIT:
                yield group
                group, total = [], 0
            group.append(r)
            total += size
        if group:
            yield group

    def _surveyed(self, group: list[Reached]) -> dict[str, Gathering]:
        """What these sites gather in one run over the data; responses of the wide ones alone."""
        gathered = {r.graph.output: Gathering(r.site.in_features) for r in group}
        weights = {r.graph.output: r.weight() for r in group if r.site.in_features > GRAM_LIMIT}
        with Segment(self._program, self._path, self._model.graph.node, taps_of(group), provider=self._provider) as run:
            for number, batch in enumerate(self._feeds()):
                rows = run({**batch, **self._readings.index(group, batch, number)})
                for r in group:
                    x = r.grouped(rows[f"{r.tag}/rows"])
                    weight = weights.get(r.graph.output)
                    y = x.new_zeros(*x.shape[:-1], 0) if weight is None else x @ weight.mT
                    gather(gathered[r.graph.output], x, y, r.site.name)
        return gathered

    def _result(self, r: Reached, gathered: dict[str, Gathering]) -> Moments | Samples | None:
        gathering = gathered.pop(r.graph.output)
        self._rows[r.site.name] = gathering.rows
        if not gathering.rows:
            self.unreachable[r.site.name] = NEVER
        return gathering.result()

    def _checked(self) -> list[Feeds]:
        """The samples that distances are measured on, from all over the data, which may be sorted by class."""
        if not self._some:
            share = min(1.0, DISTANCE_SAMPLES / max(self._samples, 1))
            fixed = any(
                value.type.tensor_type.shape.dim[:1] and value.type.tensor_type.shape.dim[0].HasField("dim_value")
                for value in self._model.graph.input
            )
            due = 0.0
            for batch in self._feeds():
                count = samples_of(batch)
                due += share * count
                take = count if fixed else min(count, math.floor(due + 1e-9))
                if due + 1e-9 < take or not take:
                    continue
                due -= take
                at = np.arange(take) * count // take
                self._some.append({name: a[at] if a.ndim and len(a) == count else a for name, a in batch.items()})
        return self._some

    def _outputs(self, factors: Mapping[str, gp.Factors]) -> Tensor:
        """The first floating output on some samples, with these weights split."""
        # What no node makes, an input or a constant, does not move.
        made = {name for node in self._model.graph.node for name in node.output}
        ends = [value.name for value in self._model.graph.output if value.name in made]
        nodes, found = self._model.graph.node, []
        with Segment(self._program, self._path, nodes, Taps(), ends, factors, provider=self._provider) as run:
            for batch in self._checked():
                values = run(batch)
                floating = (values[name] for name in ends if isinstance(values[name], np.ndarray))
                array = next((value for value in floating if value.dtype.kind == "f" and value.ndim), None)
                if array is None:
                    raise ModelError("no output of the model is floating: nothing to measure a distance by")
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
