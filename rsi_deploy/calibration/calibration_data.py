"""Unlabelled data for calibration, as batches of a model's inputs.

The data are those that evaluation accepts (see `rsi_deploy.data.sources` and `rsi_deploy.data.feeding`), or a mapping
from input name to array. Labels are ignored.
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
    """At most `size` samples for one model, evenly spaced over the data.

    Args:
        source: path or name of the data, an open data set, or input name -> array `(N, ...)`.
        specs: inputs of the model.
        preprocessing: conversion of 8-bit pictures to inputs.
        size: largest number of samples.

    Attributes:
        available: number of samples in the data.
        samples: number of samples used: a multiple of `batch` if the model has a fixed batch size.
        batch: number of samples in one run of the model.
        axes: batch axes of the model's inputs.

    Raises:
        UsageError: data that do not fit the model, or fewer samples than the model's fixed batch.
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
        next(self._feeding.batches(1, 1))  # raises now if the data do not fit

    def feeds(self) -> Iterator[dict[str, Array]]:
        """Yield the batches in order."""
        for feeds, _ in self._feeding.batches(self.batch, self.samples):
            yield feeds

    @property
    def are_pictures(self) -> bool:
        """Return whether the samples are pictures, which are preprocessed."""
        return self._feeding.dataset.kind == "images"

    def notes(self) -> list[str]:
        """Return notes for the report about the samples that were read so far."""
        return self._feeding.notes()

    def digests(self, limit: int = 4096) -> set[bytes]:
        """Return hashes of the samples as they enter the model, of at least the first `limit`."""
        digests: set[bytes] = set()
        for feeds in self.feeds():
            digests |= set(sample_digests(feeds, self.axes))
            if len(digests) >= limit:
                break
        return digests


def example_shapes(
    sources: Mapping[str, Any], specs: Sequence[InputSpec], steps: Preprocessing | None
) -> dict[str, tuple[int, ...]]:
    """Return the input shapes of one sample from the first source that is not None; empty if all are None.

    Args:
        sources: option -> data in a form that `CalibrationData` accepts, or None.
        specs: inputs of the model.
        steps: conversion of 8-bit pictures to inputs.

    Raises:
        UsageError: data that do not fit the model.
    """
    for option, source in sources.items():
        if source is not None:
            return Feeding(_opened(source, specs, option), specs, steps, option=option).shapes(1)
    return {}


def check_source(source: object) -> None:
    """Check that a path to data exists.

    Raises:
        UsageError: there is no data at the path.
    """
    if isinstance(source, str | Path):
        with errors_for_option(OPTION):
            check_exists(source)


def sample_digests(feeds: Mapping[str, Array], axes: BatchAxes | None = None) -> Iterator[bytes]:
    """Yield a hash of each sample over all inputs. Without `axes`, the first axis of every input is the batch."""
    axes = axes or BatchAxes(axes=dict.fromkeys(feeds, 0), fixed=None)
    for row in range(axes.samples(feeds)):
        sample = axes.cut(feeds, slice(row, row + 1))
        yield hashlib.sha256(b"".join(array.tobytes() for array in sample.values())).digest()


def refuse_shared(
    calibration: CalibrationData, evaluation: Dataset, specs: Sequence[InputSpec], steps: Preprocessing | None
) -> None:
    """Check that calibration and evaluation data share no samples.

    Raises:
        UsageError: some are shared; the message names their number.
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
            f"--calib and --data share samples ({shared} of {seen} evaluation samples checked), so the accuracy "
            f"would be measured on the data that factors are fitted to; type other data, or add --allow-shared-data"
        )


def _opened(
    source: str | Path | Dataset | Mapping[str, Array], specs: Sequence[InputSpec], option: str = OPTION
) -> Dataset:
    """Open the samples as a data set."""
    if isinstance(source, Mapping):
        if absent := [spec.name for spec in specs if spec.name not in source]:
            raise UsageError(f"{option}: no array for the input {', '.join(absent)}; there are {', '.join(source)}")
        with errors_for_option(option):
            return NamedData.of_rows({spec.name: source[spec.name] for spec in specs}, specs, None, "arrays")
    if not isinstance(source, str | Path):
        return source
    with errors_for_option(option):
        return open_data(source, specs=specs, labelled=False)
