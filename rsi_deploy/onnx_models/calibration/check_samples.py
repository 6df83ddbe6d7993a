"""Choose the samples on which a distance of outputs is measured.

They are a share of every batch, because the data may be sorted by class.

batch --add--> a share of its samples --> batches of neighbours of one shape
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.calibration.activations import distance_samples
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes

Feeds = Mapping[str, npt.NDArray[Any]]


class CheckSamples:
    """A share of the samples of every batch.

    Args:
        axes: batch axes of the model's inputs; where they fix the batch, whole batches are chosen.
        samples: number of samples in the data.
    """

    def __init__(self, axes: BatchAxes, samples: int) -> None:
        self._share = min(1.0, distance_samples(samples) / max(samples, 1))
        self._axes, self._fixed = axes, axes.fixed is not None
        self._parts = list[Feeds]()
        self._due = 0.0
        self._size = 0

    def clear(self) -> None:
        """Forget all batches."""
        self._parts, self._due = [], 0.0

    def add(self, batch: Feeds) -> Feeds:
        """Choose the share of a batch, and return the batch."""
        count = self._axes.samples(batch)
        self._size = max(self._size, count)
        self._due += self._share * count
        take = count if self._fixed else min(count, math.floor(self._due + 1e-9))
        if self._due + 1e-9 >= take > 0:
            self._due -= take
            at = np.arange(take) * count // take
            self._parts.append(batch if take == count else self._axes.cut(batch, at))
        return batch

    def batches(self) -> list[Feeds]:
        """Return the chosen samples in batches that are no larger than those of the data."""
        joined: list[Feeds] = []
        for part in self._parts:
            last = joined[-1] if joined and not self._fixed else {}
            fits = bool(last) and self._kinds(last) == self._kinds(part)
            if fits and self._axes.samples(last) + self._axes.samples(part) <= self._size:
                joined[-1] = self._axes.joined([last, part])
            else:
                joined.append(part)
        self._parts = joined
        return joined

    def batches_of(self, feeds: Callable[[], Iterable[Feeds]]) -> Iterator[Feeds]:
        """Yield the chosen batches; choose from `feeds` first where there are none."""
        if not self._parts:
            for batch in feeds():
                self.add(batch)
        yield from self.batches()

    def _kinds(self, batch: Feeds) -> dict[str, tuple[Any, ...]]:
        """Return the type and shape of one sample of each array."""
        return {name: (batch[name].dtype, *shape) for name, shape in self._axes.sample_shapes(batch).items()}
