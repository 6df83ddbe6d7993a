"""Unlabelled data for calibration, as batches of a model's inputs.

It is what evaluation takes (see `rsi_deploy.measure.data` and `rsi_deploy.measure.feeding`), or a mapping of input name
to array; labels are not looked at.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rsi_deploy.errors import UsageError
from rsi_deploy.measure.data import Dataset, NamedData, check_exists, open_data
from rsi_deploy.measure.feeding import Feeding
from rsi_deploy.measure.inputs import InputSpec
from rsi_deploy.measure.preprocess import Preprocessing

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
        fixed = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)}
        self.batch = fixed.pop() if len(fixed) == 1 else BATCH
        self.available = len(self._feeding.dataset)
        self.samples = min(size, self.available)
        if any(spec.shape and isinstance(spec.shape[0], int) for spec in specs):
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
            found |= set(sample_digests(feeds))
            if len(found) >= limit:
                break
        return found


def check_source(source: object) -> None:
    """Refuse, before any work, a path with no data at it.

    Raises:
        UsageError: says what was expected.
    """
    if isinstance(source, str | Path):
        with _named_option():
            check_exists(source)


def sample_digests(feeds: Mapping[str, Array]) -> Iterator[bytes]:
    """A hash of each sample's values, over all inputs."""
    for row in range(len(next(iter(feeds.values())))):
        yield hashlib.sha256(b"".join(array[row].tobytes() for array in feeds.values())).digest()


def refuse_shared(
    calibration: CalibrationData, evaluation: Dataset, specs: Sequence[InputSpec], steps: Preprocessing | None
) -> None:
    """Refuse calibration data that hold evaluation samples: what is tuned on them is not measured by them.

    Raises:
        UsageError: with how many of the evaluation samples are shared.
    """
    known = calibration.digests()
    seen = shared = 0
    for feeds, _ in Feeding(evaluation, specs, steps).batches(64, min(len(evaluation), 2048)):
        digests = list(sample_digests(feeds))
        seen += len(digests)
        shared += sum(digest in known for digest in digests)
    if shared:
        raise UsageError(
            f"--calib and --data share samples ({shared} of {seen} evaluation samples looked at): the accuracy would "
            f"be measured on what the factors were fitted to; give other data, or add --allow-shared-data"
        )


def _opened(source: str | Path | Dataset | Mapping[str, Array], specs: Sequence[InputSpec]) -> Dataset:
    """The samples as a data set."""
    if isinstance(source, Mapping):
        if absent := [spec.name for spec in specs if spec.name not in source]:
            raise UsageError(f"{OPTION}: no array for the input {', '.join(absent)}; there are {', '.join(source)}")
        with _named_option():
            return NamedData({spec.name: source[spec.name] for spec in specs})
    if not isinstance(source, str | Path):
        return source
    with _named_option():
        return open_data(source)


@contextmanager
def _named_option() -> Iterator[None]:
    """What is wrong with the data names the option."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{OPTION}: {str(error).removeprefix('data: ')}") from error
