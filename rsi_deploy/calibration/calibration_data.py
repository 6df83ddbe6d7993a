"""Unlabelled data for calibration, in two parts: a fit part, and a check part that fits nothing.

The data are those that evaluation accepts (see `rsi_deploy.data.sources` and `rsi_deploy.data.feeding`), or a mapping
from input name to array. Labels are ignored.

    data        0 1 2 3 4 5 6 7 8 9 ...        evenly spaced over all samples
    check part      2         7                one sample of each stretch of the data, chosen by the seed
    fit part    0 1   3 4 5 6   8 9 ...        dealt to four folds, neighbours to different ones

So both parts and all folds see every class of data that are sorted by class.
Of text, whole documents go to either part.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import Inputs, concatenate_inputs, row_count, select_rows
from rsi_deploy.data.feeding import Feeding, errors_for_option
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset, NamedData, check_exists, open_data
from rsi_deploy.data.text_data import TextRows
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]
Source = str | Path | Dataset | Mapping[str, Array]

BATCH = 32
FOLDS = 4
"""Number of folds of the fit part; batch number b of its feeds belongs to fold b % FOLDS."""
LEAST_CHECK = 64
"""Number of check samples below which the report gives no verdict."""
MOST_CHECK = 2048
"""Most samples of separate check data, where `check_size` is None."""
IN_SAMPLE = 512
"""Most samples of the fit part that outputs are compared on."""
IN_SAMPLE_TOKENS = 1 << 16
"""Most tokens of text, likewise."""
OPTION = "--calib"
CHECK_OPTION = "--calib-check"


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplePart:
    """A part of the samples, as batches of a model's inputs.

    Attributes:
        feeding: the data.
        limit: number of samples that are read, evenly spaced over the data.
        rows: int64 `(samples,)`, ascending: the numbers of the part's samples among those that are read.
        batch: number of samples in a batch; the last ones of each fold and shape may be smaller.
        folds: number of folds that the batches go through in turn.
        seed: random seed for the fold of each sample.
    """

    feeding: Feeding
    limit: int
    rows: Rows
    batch: int
    folds: int = 1
    seed: int = 0

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.rows)

    def feeds(self) -> Iterator[dict[str, Array]]:
        """Yield the batches; the order is the same each time, and few of them are in memory at once."""
        for inputs in _batches(self._pieces(), self.batch, self.folds):
            yield self.feeding.to_feeds(inputs)

    def _pieces(self) -> Iterator[tuple[Inputs, Rows]]:
        """Yield the part's samples in order, and the fold of each."""
        rng = np.random.default_rng([self.seed, *b"folds"])
        fold_of_each = _fold_of_each(self.samples, self.folds, self.feeding.axes.fixed or 1, rng)
        start = 0
        for inputs, _ in self.feeding.inputs(BATCH, self.limit):
            stop = start + row_count(inputs)
            first, last = np.searchsorted(self.rows, [start, stop])
            if last > first:
                yield select_rows(inputs, self.rows[first:last] - start), fold_of_each[first:last]
            start = stop


class CalibrationData:
    """The fit part and the check part of the calibration data of one model.

    Args:
        source: path or name of the data, an open data set, or input name -> array `(N, ...)`.
        specs: inputs of the model.
        preprocessing: conversion of 8-bit pictures to inputs.
        size: largest number of samples of the fit part.
        check_size: number of samples of the check part, at most half of all; None takes a fifth of those read, at
            least 64 of 128 or more.
        check_source: separate data for the check part; the fit part then takes all of `source`.
        seed: random seed for the parts and folds.

    Attributes:
        available: number of samples in the data.
        fit: the fit part, in four folds. If the model has a fixed batch size, each part has whole batches.
        check: the check part; None where there is a single sample or batch.
        in_sample: at most 512 samples of the fit part, or 65,536 tokens of a text, evenly spaced.
        is_separate: whether the check part has data of its own.
        axes: batch axes of the model's inputs.

    Raises:
        UsageError: data that do not fit the model, fewer samples than the model's fixed batch, or check data that
            share samples with the fit part.
    """

    def __init__(
        self,
        source: Source,
        specs: Sequence[InputSpec],
        preprocessing: Preprocessing | None,
        size: int,
        *,
        check_size: int | None = None,
        check_source: Source | None = None,
        seed: int = 0,
    ) -> None:
        feeding = _feeding(source, specs, preprocessing, OPTION)
        self.axes = feeding.axes
        self.available = len(feeding.dataset)
        self.is_separate = check_source is not None
        unit = self.axes.fixed or 1
        rng, wanted = np.random.default_rng([seed, *b"check"]), 0 if self.is_separate else check_size
        if isinstance(feeding.dataset, TextRows):
            rows, chosen = document_parts(feeding.dataset, size, wanted, unit, rng)
            read = self.available
        else:
            fit, check = part_sizes(self.available, size, wanted, unit)
            read = fit + check
            chosen = _one_of_each(read, check, rng)
            rows = np.setdiff1d(np.arange(read), chosen)
        fit, check = len(rows), len(chosen)
        if fit < 1:
            raise _too_few(OPTION, min(size, self.available), unit)
        self._used = fit + check
        large = _largest_batch(feeding)
        batch = self.axes.fixed or min(large, max(1, fit // FOLDS))
        self.fit = SamplePart(feeding=feeding, limit=read, rows=rows, batch=batch, folds=FOLDS, seed=seed)
        most = IN_SAMPLE
        if isinstance(feeding.dataset, TextRows):
            most = min(most, int(IN_SAMPLE_TOKENS / feeding.dataset.tokens.mean()))
        some = min(fit, max(most // unit, 1) * unit)
        spaced = rows[np.arange(some) * fit // some]
        self.in_sample = SamplePart(feeding=feeding, limit=read, rows=spaced, batch=large)
        self.check: SamplePart | None = None
        if check_source is not None:
            self.check = _separate(check_source, specs, preprocessing, check_size or MOST_CHECK)
            self._refuse_repeated(self.check)
        elif check:
            self.check = SamplePart(feeding=feeding, limit=read, rows=chosen, batch=large)

    @property
    def samples(self) -> int:
        """Number of samples of the fit part."""
        return self.fit.samples

    @property
    def batch(self) -> int:
        """Number of samples in a batch of `feeds`."""
        return self.fit.batch

    @property
    def needed(self) -> int | None:
        """Number of samples that suffice for a verdict; None if the check part is large enough."""
        if self.check is not None and self.check.samples >= LEAST_CHECK:
            return None
        unit = self.axes.fixed or 1
        least = -(-LEAST_CHECK // unit) * unit
        return least if self.is_separate else 2 * least

    def samples_for(self, fit: int) -> int:
        """Return the number of samples of data whose fit part has `fit` samples."""
        return fit if self.is_separate else fit + max(LEAST_CHECK, -(-fit // 4))

    @property
    def has_more(self) -> bool:
        """Return whether the data have samples that are in no part."""
        return self.available > self._used

    def feeds(self) -> Iterator[dict[str, Array]]:
        """Yield the batches of the fit part; batch number b belongs to fold b % 4."""
        return self.fit.feeds()

    @property
    def are_pictures(self) -> bool:
        """Return whether the samples are pictures, which are preprocessed."""
        return self.fit.feeding.dataset.kind == "images"

    def notes(self) -> list[str]:
        """Return notes for the report about the samples that were read so far."""
        separate = self.check.feeding.notes() if self.check is not None and self.is_separate else []
        return [*self.fit.feeding.notes(), *separate]

    def digests(self) -> set[bytes]:
        """Return hashes of the samples of both parts as they enter the model."""
        parts = [self.fit] if self.check is None else [self.fit, self.check]
        feeds = chain.from_iterable(part.feeds() for part in parts)
        return set(chain.from_iterable(sample_digests(batch, self.axes) for batch in feeds))

    def _refuse_repeated(self, check: SamplePart) -> None:
        """Refuse check data that share samples with the fit part."""
        known = {digest for feeds in self.feeds() for digest in sample_digests(feeds, self.axes)}
        shared = sum(digest in known for feeds in check.feeds() for digest in sample_digests(feeds, self.axes))
        if shared:
            raise UsageError(
                f"{CHECK_OPTION} and {OPTION} share samples ({shared} of {check.samples} check samples), but a check "
                f"needs samples that factors are not fitted to; type other data, or leave out {CHECK_OPTION} (a fifth "
                f"of {OPTION} is then the check part)"
            )


def part_sizes(available: int, size: int, check_size: int | None = None, unit: int = 1) -> tuple[int, int]:
    """Return the numbers of samples of the fit part and of the check part.

    Args:
        available: number of samples in the data.
        size: largest number of samples of the fit part.
        check_size: number of samples of the check part; None for the usual one, 0 for none.
        unit: number that both are multiples of.

    Examples:
        >>> part_sizes(50_000, 1024), part_sizes(500, 1024), part_sizes(100, 1024), part_sizes(1, 1024)
        ((1024, 256), (400, 100), (80, 20), (1, 0))
        >>> part_sizes(50_000, 1024, 600), part_sizes(500, 1024, 600)
        ((1024, 600), (250, 250))
    """
    if check_size is None:
        few = available < 2 * LEAST_CHECK
        check_size = max(1, available // 5) if few else max(LEAST_CHECK, min(available, size + -(-size // 4)) // 5)
    check = min(-(-check_size // unit), available // 2 // unit) * unit
    return min(size, available - check) // unit * unit, check


def document_parts(
    text: TextRows, size: int, check_size: int | None, unit: int, rng: np.random.Generator
) -> tuple[Rows, Rows]:
    """Return the rows of text of the fit part and of the check part, ascending; no document has rows in both.

    Documents are drawn for the check part until it is large enough, but never more than half of all rows. The fit part
    has evenly spaced rows of the other documents.

    Args:
        text: rows of text.
        size: largest number of rows of the fit part; `text.most_tokens` may allow fewer.
        check_size: number of rows of the check part, at most; None for the usual one, 0 for none.
        unit: number that the sizes of both parts are multiples of.
        rng: draws the documents.
    """
    if text.most_tokens is not None:
        size = min(size, max(int(text.most_tokens / text.tokens.mean()), unit))
    _, wanted = part_sizes(len(text), size, check_size, unit)
    numbers, counts = np.unique(text.documents, return_counts=True)
    taken, drawn = 0, []
    for place in rng.permutation(len(numbers)):
        if taken < wanted and taken + counts[place] <= len(text) // 2:
            drawn.append(numbers[place])
            taken += counts[place]
    is_check = np.isin(text.documents, drawn)
    check, fit = np.flatnonzero(is_check), np.flatnonzero(~is_check)
    fitted = _evenly(fit, min(size, len(fit)) // unit * unit)
    while text.most_tokens is not None and len(fitted) > unit and text.tokens[fitted].sum() > text.most_tokens:
        fitted = _evenly(fit, len(fitted) - unit)
    return fitted, _evenly(check, min(wanted, len(check)) // unit * unit)


def _evenly(rows: Rows, count: int) -> Rows:
    """Return evenly spaced ones of the rows."""
    return rows[np.arange(count, dtype=np.int64) * len(rows) // max(count, 1)]


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


def check_source(source: object, option: str = OPTION) -> None:
    """Check that a path to data exists.

    Raises:
        UsageError: there is no data at the path.
    """
    if isinstance(source, str | Path):
        with errors_for_option(option):
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
    """Check that calibration data, both parts, and evaluation data share no samples.

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


def _opened(source: Source, specs: Sequence[InputSpec], option: str = OPTION) -> Dataset:
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


def _feeding(source: Source, specs: Sequence[InputSpec], steps: Preprocessing | None, option: str) -> Feeding:
    """Open the samples for a model, and read one to see whether they fit."""
    feeding = Feeding(_opened(source, specs, option), list(specs), steps, option=option)
    next(feeding.batches(1, 1), None)
    return feeding


def _separate(source: Source, specs: Sequence[InputSpec], steps: Preprocessing | None, size: int) -> SamplePart:
    """Open the data of `--calib-check`."""
    feeding = _feeding(source, specs, steps, CHECK_OPTION)
    available, unit = len(feeding.dataset), feeding.axes.fixed or 1
    samples = min(size, available) // unit * unit
    if samples < 1:
        raise _too_few(CHECK_OPTION, min(size, available), unit)
    return SamplePart(
        feeding=feeding, limit=samples, rows=np.arange(samples, dtype=np.int64), batch=_largest_batch(feeding)
    )


def _largest_batch(feeding: Feeding) -> int:
    """Return the model's fixed number of samples of a batch, or the most samples that one may have."""
    return feeding.axes.fixed or min(BATCH, getattr(feeding.dataset, "most_rows", None) or BATCH)


def _too_few(option: str, samples: int, unit: int) -> UsageError:
    """Return the error for fewer samples than one batch."""
    if unit == 1:
        return UsageError(f"{option}: the data have no samples; give more")
    return UsageError(f"{option}: {samples} samples are fewer than the model's fixed batch of {unit}; give more")


def _one_of_each(samples: int, count: int, rng: np.random.Generator) -> Rows:
    """Return `count` of the numbers below `samples`, ascending: one of each of `count` equal stretches."""
    ends = np.arange(count + 1, dtype=np.int64) * samples // max(count, 1)
    return rng.integers(ends[:-1], ends[1:])


def _fold_of_each(samples: int, folds: int, unit: int, rng: np.random.Generator) -> Rows:
    """Return the fold of each sample, int64 `(samples,)`, so that every fold is spread evenly over the samples.

    The sizes of the folds are multiples of `unit`, and differ by `unit` at most.
    """
    units = samples // unit
    sizes = [unit * (units // folds + (fold < units % folds)) for fold in range(folds)]
    places = np.concatenate([(np.arange(size) + rng.random(size)) / max(size, 1) for size in sizes])
    return np.repeat(np.arange(folds), sizes)[np.argsort(places, kind="stable")]


def _batches(pieces: Iterable[tuple[Inputs, Rows]], size: int, folds: int) -> Iterator[Inputs]:
    """Yield batches of at most `size` samples of one shape and one fold, from each fold in turn.

    Args:
        pieces: samples in order, and the fold of each.
        size: number of samples in a batch.
        folds: number of folds.
    """
    waiting: dict[object, _Waiting] = {}
    for inputs, fold_of_each in pieces:
        same = waiting.setdefault(_shapes(inputs), _Waiting(size, folds))
        yield from same.add(inputs, fold_of_each)
    for same in waiting.values():
        yield from same.rest()


class _Waiting:
    """Samples of one shape that wait for their batch.

    Args:
        size: number of samples in a batch.
        folds: number of folds.
    """

    def __init__(self, size: int, folds: int) -> None:
        self._size, self._turn = size, 0
        self._folds: list[list[Inputs]] = [[] for _ in range(folds)]

    def add(self, inputs: Inputs, fold_of_each: Rows) -> Iterator[Inputs]:
        """Add samples, and yield the batches that are full and whose turn it is."""
        for number, fold in enumerate(self._folds):
            if len(rows := np.flatnonzero(fold_of_each == number)):
                fold.append(select_rows(inputs, rows))
        while self._count() >= self._size:
            yield self._next()

    def rest(self) -> Iterator[Inputs]:
        """Yield the last batches, which may be smaller."""
        while any(self._folds):
            if self._count():
                yield self._next()
            else:
                self._turn = (self._turn + 1) % len(self._folds)

    def _count(self) -> int:
        return sum(map(row_count, self._folds[self._turn]))

    def _next(self) -> Inputs:
        """Take a batch of the fold whose turn it is."""
        fold = self._folds[self._turn]
        self._turn = (self._turn + 1) % len(self._folds)
        joined = concatenate_inputs(fold)
        fold[:] = [select_rows(joined, slice(self._size, None))] if row_count(joined) > self._size else []
        return select_rows(joined, slice(0, self._size))


def _shapes(inputs: Inputs) -> object:
    """Return the shapes of a sample, as a key."""
    if isinstance(inputs, Mapping):
        return tuple((name, array.shape[1:]) for name, array in inputs.items())
    return inputs.shape[1:]
