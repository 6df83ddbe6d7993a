"""The samples on which a distance of outputs is measured: a part of every batch, as the data may be sorted by class.

batch --add--> a share of its samples --> batches of neighbours of one shape
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from rsi_deploy.calibrate.onnx_readings import samples_of
from rsi_deploy.calibrate.streams import distance_samples

Feeds = Mapping[str, npt.NDArray[Any]]


class Checked:
    """Takes its share of the data.

    Args:
        model: whose inputs they are; where they fix the batch, batches are taken whole.
        samples: how many there are in all.
    """

    def __init__(self, model: ModelProto, samples: int) -> None:
        self._share = min(1.0, distance_samples(samples) / max(samples, 1))
        self._fixed = any(
            value.type.tensor_type.shape.dim[:1] and value.type.tensor_type.shape.dim[0].HasField("dim_value")
            for value in model.graph.input
        )
        self._parts = list[Feeds]()
        self._whole: dict[int, Feeds] = {}  # by number: the batches that were taken as they are
        self._seen = 0
        self._due = 0.0
        self._size = 0

    def clear(self) -> None:
        """Begin again."""
        self._parts, self._whole, self._seen, self._due = [], {}, 0, 0.0

    def add(self, batch: Feeds) -> Feeds:
        """Take the share of a batch; gives it back."""
        count = samples_of(batch)
        self._size = max(self._size, count)
        self._due += self._share * count
        take = count if self._fixed else min(count, math.floor(self._due + 1e-9))
        if self._due + 1e-9 >= take > 0:
            self._due -= take
            self._parts.append(batch if take == count else _spread(batch, count, take))
            if take == count:
                self._whole[self._seen] = batch
        self._seen += 1
        return batch

    def number_of(self, batch: Feeds) -> int | None:
        """The number among the data of one of `batches`; None where it is a part of theirs."""
        return next((number for number, whole in self._whole.items() if whole is batch), None)

    def batches(self) -> list[Feeds]:
        """What was taken, no more in a batch than the data have in theirs."""
        joined: list[Feeds] = []
        for part in self._parts:
            last = joined[-1] if joined and not self._fixed else {}
            fits = _row_shapes(last) is not None and _row_shapes(last) == _row_shapes(part)
            if fits and samples_of(last) + samples_of(part) <= self._size:
                joined[-1] = {name: np.concatenate([last[name], array]) for name, array in part.items()}
            else:
                joined.append(part)
        self._parts = joined
        return joined

    def batches_of(self, feeds: Callable[[], Iterable[Feeds]]) -> Iterator[Feeds]:
        """What was taken; of these data, where nothing was yet."""
        if not self._parts:
            for batch in feeds():
                self.add(batch)
        yield from self.batches()


def _spread(batch: Feeds, count: int, take: int) -> Feeds:
    """Some of the `count` samples of a batch, evenly spaced."""
    at = np.arange(take) * count // take
    return {name: a[at] if a.ndim and len(a) == count else a for name, a in batch.items()}


def _row_shapes(batch: Feeds) -> dict[str, tuple[Any, ...]] | None:
    """The type and shape of one sample of each array; None where not all of them have as many samples."""
    count = samples_of(batch)
    if not batch or any(not array.ndim or len(array) != count for array in batch.values()):
        return None
    return {name: (array.dtype, *array.shape[1:]) for name, array in batch.items()}
