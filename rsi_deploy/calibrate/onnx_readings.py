"""Which rows of a batch every site's moments are taken from, and the taps that read them in both streams.

As many of every sample as `moments.rows_for` allows in all, chosen once a batch from (seed, site, batch): both streams,
and what a response is added to, are read at the same places. Padding under a mask input is no row.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.calibrate.moments import rows_for
from rsi_deploy.calibrate.onnx_reach import Reached
from rsi_deploy.calibrate.onnx_rows import Taps, chosen, output_size, patch_index
from rsi_deploy.calibrate.onnx_segment import Segment
from rsi_deploy.calibrate.onnx_waves import Program
from rsi_deploy.rsi import stream_seed

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Shapes = Mapping[str, tuple[int, ...]]


class Readings:
    """Reads the rows of the sites of a program.

    Args:
        program: the dense model.
        path: its file.
        reached: the sites.
        samples: how many the calibration data have.
        seed: of the choice of rows.
        provider: onnxruntime's.
    """

    def __init__(
        self, program: Program, path: Path, reached: Iterable[Reached], *, samples: int, seed: int, provider: str
    ) -> None:
        self._program, self._path, self._provider = program, path, provider
        self._reached = list(reached)
        self._samples, self._seed = samples, seed
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Shapes] = {}

    def index(self, group: Iterable[Reached], batch: Feeds, number: int) -> dict[str, Array]:
        """What the taps of these sites are fed, for batch `number`."""
        shapes = self._shapes(batch)
        feeds: dict[str, Array] = {}
        for r in group:
            shape = shapes[r.graph.data]
            generator = np.random.default_rng(stream_seed(self._seed, f"{r.site.name}/{number}"))
            quota = rows_for(r.site.in_features) * samples_of(batch) / max(self._samples, 1)
            if r.graph.window is not None:
                size = shape[2:]
                at = chosen(math.prod(output_size(r.graph.window, size)), _whole(quota / max(shape[0], 1)), generator)
                feeds[f"{r.tag}/index"], feeds[f"{r.tag}/inside"] = patch_index(r.graph.window, size, at)
            else:
                at = chosen(math.prod(shape[:-1]), _whole(quota), generator, _tokens(batch, shape))
                feeds[f"{r.tag}/index"] = at
            feeds[f"{r.tag}/beside/index"] = at
        return feeds

    def alone(self, batch: Feeds) -> set[str]:
        """Outputs of the sites that are added to something of another shape than theirs, or to nothing."""
        shapes = self._shapes(batch)
        return {r.graph.output for r in self._reached if not r.beside or shapes[r.beside] != shapes[r.graph.output]}

    def _shapes(self, batch: Feeds) -> Shapes:
        """Shapes of what sites read, make and are added to, on a batch of these shapes."""
        key = tuple((name, array.shape) for name, array in sorted(batch.items()))
        if key not in self._known:
            values = {value for r in self._reached for value in (r.graph.data, r.graph.output, r.beside) if value}
            taps = Taps()
            for value in sorted(values):
                taps.shape(value, f"rsi_deploy/{value}")
            nodes = self._program.model.graph.node
            with Segment(self._program, self._path, nodes, taps, provider=self._provider) as run:
                found = run(batch)
            shapes = {value: found[f"rsi_deploy/{value}/shape"] for value in values}
            self._known[key] = {value: tuple(int(n) for n in shape) for value, shape in shapes.items()}
        return self._known[key]


def taps_of(group: Iterable[Reached], *, data: Collection[str] | None = None, beside: Collection[str] = ()) -> Taps:
    """Taps of what the sites read, where it is among `data` (None: all), and of what they are added to, likewise."""
    taps = Taps()
    for r in group:
        site = r.site
        if data is None or r.graph.data in data:
            if site.kernel:
                points = math.prod(site.kernel)
                taps.patches(r.graph.data, r.tag, site.groups * site.in_features // points, points)
            else:
                taps.rows(r.graph.data, r.tag, site.in_features)
        if r.beside in beside:
            gather = taps.positions if site.kernel else taps.rows
            gather(r.beside, f"{r.tag}/beside", site.groups * site.out_features)
    return taps


def padding_mask(batch: Feeds) -> Array | None:
    """The padding mask among the inputs, bool `(N, L)`, False for padding; None where there is none.

    An input called a mask, of zeros and ones alone, with a token at the begin of every row, or at the end of every
    row. So no mask that marks the padding itself is taken for one.
    """
    for name, array in batch.items():
        if "mask" in name.lower() and array.ndim == 2 and array.size and np.isin(array, (0, 1)).all():
            mask: Array = array == 1
            if mask[:, 0].all() or mask[:, -1].all():
                return mask
    return None


def samples_of(batch: Feeds) -> int:
    """Samples in a batch: the length of its first array."""
    return next((len(array) for array in batch.values() if array.ndim), 1)


def _tokens(batch: Feeds, shape: Sequence[int]) -> Array | None:
    """Flat positions of the rows of data of this shape that are no padding; None where no mask fits them."""
    mask = padding_mask(batch)
    if mask is None:
        return None
    if tuple(shape[:2]) == mask.shape and len(shape) > 2:
        return np.flatnonzero(np.repeat(mask, math.prod(shape[2:-1])))
    return np.flatnonzero(mask) if tuple(shape[:-1]) == (mask.size,) and mask.shape[1] > 1 else None


def _whole(rows: float) -> int:
    return max(1, round(rows))
