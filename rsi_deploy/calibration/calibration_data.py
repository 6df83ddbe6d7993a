"""Unlabelled data for calibration, as batches of a model's inputs.

It is what evaluation takes (see `rsi_deploy.data.sources` and `rsi_deploy.data.feeding`), or a mapping of input name
to array; labels are not looked at.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.feeding import Feeding, errors_for_option
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset, NamedData, check_exists, open_data
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec

Array = npt.NDArray[Any]

BATCH = 32
OPTION = "--calib"


class CalibrationData:
    """Samples for one model, `size` of them at most, evenly spaced over the data.

    Args:
        source: data by name, an opened data set, or input name -> array `(N, ...)`.
        specs: the model's inputs.
        preprocessing: from 8-bit pictures to inputs.
        size: at most so many samples.

    Attributes:
        available: how many samples there are.
        samples: how many of them are used; whole batches, where the model fixes its batch.
        batch: how many go through the model at a time.
        axes: the batch axes of the model's inputs.

    Raises:
        UsageError: data that do not fit the model, or too few for a model of a fixed batch.
    """

    def __init__(
        self,
        source: str | Path | Dataset | Mapping[str, Array],
        specs: Sequence[InputSpec],
        preprocessing: Preprocessing | None,
        size: int,
    ) -> None:
        self._specs = list(specs)
        self._feeding = Feeding(_opened(source, self._specs), self._specs, preprocessing, option=OPTION)
        self.axes = self._feeding.axes
        self.batch = self.axes.fixed or BATCH
        self.available = len(self._feeding.dataset)
        self.samples = min(size, self.available)
        if self.axes.fixed:
            self.samples -= self.samples % self.batch
        if self.samples < 1:
            raise UsageError(
                f"--calib: {min(size, self.available)} samples are fewer than the model's fixed batch of {self.batch}; "
                f"give more"
            )
        next(self._feeding.batches(1, 1))  # what does not fit must not wait

    def feeds(self) -> Iterator[dict[str, Array]]:
        """The batches, from the start."""
        for feeds, _ in self._feeding.batches(self.batch, self.samples):
            yield feeds

    @property
    def are_pictures(self) -> bool:
        """Whether they go through the preprocessing."""
        return self._feeding.dataset.kind == "images"

    def notes(self) -> list[str]:
        """What a reader should know of the samples that were read so far."""
        return self._feeding.notes()

    def digests(self, limit: int = 4096) -> set[bytes]:
        """A hash of each sample, as it enters the model."""
        found: set[bytes] = set()
        for feeds in self.feeds():
            found |= set(sample_digests(feeds, self.axes))
            if len(found) >= limit:
                break
        return found


def example_shapes(
    sources: Mapping[str, Any], specs: Sequence[InputSpec], steps: Preprocessing | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of the inputs with one sample, of the first data there are; empty without any.

    Args:
        sources: option -> data as `CalibrationData` takes them, or None.
        specs: the model's inputs.
        steps: from 8-bit pictures to inputs.

    Raises:
        UsageError: data that do not fit the model.
    """
    for option, source in sources.items():
        if source is not None:
            return Feeding(_opened(source, specs, option), specs, steps, option=option).shapes(1)
    return {}


def check_source(source: object) -> None:
    """Refuse, before any work, a path with no data at it.

    Raises:
        UsageError: says what was expected.
    """
    if isinstance(source, str | Path):
        with errors_for_option(OPTION):
            check_exists(source)


def sample_digests(feeds: Mapping[str, Array], axes: BatchAxes | None = None) -> Iterator[bytes]:
    """A hash of each sample's values, over all inputs; without `axes` the first axis of each is the batch."""
    axes = axes or BatchAxes(axes=dict.fromkeys(feeds, 0), fixed=None)
    for row in range(axes.samples(feeds)):
        sample = axes.cut(feeds, slice(row, row + 1))
        yield hashlib.sha256(b"".join(array.tobytes() for array in sample.values())).digest()


def refuse_shared(
    calibration: CalibrationData, evaluation: Dataset, specs: Sequence[InputSpec], steps: Preprocessing | None
) -> None:
    """Refuse calibration data that hold evaluation samples: what is tuned on them is not measured by them.

    Raises:
        UsageError: with how many of the evaluation samples are shared.
    """
    known = calibration.digests()
    seen = shared = 0
    feeding = Feeding(evaluation, specs, steps)
    for feeds, _ in feeding.batches(64, min(len(feeding.dataset), 2048)):
        digests = list(sample_digests(feeds, feeding.axes))
        seen += len(digests)
        shared += sum(digest in known for digest in digests)
    if shared:
        raise UsageError(
            f"--calib and --data share samples ({shared} of {seen} evaluation samples looked at): the accuracy would "
            f"be measured on what the factors were fitted to; give other data, or add --allow-shared-data"
        )


def _opened(
    source: str | Path | Dataset | Mapping[str, Array], specs: Sequence[InputSpec], option: str = OPTION
) -> Dataset:
    """The samples as a data set."""
    if isinstance(source, Mapping):
        if absent := [spec.name for spec in specs if spec.name not in source]:
            raise UsageError(f"{option}: no array for the input {', '.join(absent)}; there are {', '.join(source)}")
        with errors_for_option(option):
            return NamedData.of_rows({spec.name: source[spec.name] for spec in specs}, specs, None, "arrays")
    if not isinstance(source, str | Path):
        return source
    with errors_for_option(option):
        return open_data(source, specs=specs, labelled=False)
