"""The interface of calibration and evaluation data: samples in batches, as one array or one array for each model input.

    kind      inputs of a batch                 processing
    images    uint8 or uint16 `(n, H, W, C)`    the model's channels and the preprocessing
    inputs    one array `(n, ...)`              none: ready model input
    named     name -> array `(n, ...)`          none: one array for each model input

Arrays of **uint8 or uint16 with shape `(N, H, W)` or `(N, H, W, C)`, C one of 1, 3, 4, are pictures**; every other
numeric array is ready model input.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.model_pictures import CHANNELS, ModelPictures
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.pictures import UnknownRangeError, read_picture
from rsi_deploy.runtime.feeds.inputs import InputSpec

Labels = npt.NDArray[np.int64]
Inputs = Array | Mapping[str, Array]
Batch = tuple[Inputs, Labels | None]
Steps = Preprocessing | ModelPictures
Kind = Literal["images", "inputs", "named"]

LABEL_NAMES = ("labels", "label", "y")


class ColumnError(UsageError):
    """Arrays or columns that are not valid samples or labels, or could be either unless the model's inputs decide."""


class Dataset(Protocol):
    """Calibration or evaluation data."""

    @property
    def kind(self) -> Kind:
        """Kind of a batch's inputs; see the module's docstring."""

    @property
    def labels(self) -> Labels | None:
        """Class numbers int64 `(N,)`, or None if there are no labels."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number; empty if unknown."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that `select` accepts; empty if the inputs have no names."""

    @property
    def default(self) -> str:
        """Column that `batches` returns if none is selected; "" if it has no name or all columns are returned."""

    def __len__(self) -> int: ...

    def select(self, names: Sequence[str]) -> "Dataset":
        """Return the same samples with one array for each of these columns (`kind` is `named`).

        Raises:
            UsageError: A column does not exist or has another number of samples.
        """

    def fingerprint(self) -> str:
        """Return the sha256 (hex) of the content (arrays, or paths and images), not of file times or compression."""

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """Yield the samples in order, `batch_size` at a time; the last batch may be smaller.

        Args:
            batch_size: samples per batch, at least 1.
            preprocessing: steps whose `apply` processes pictures; None yields them as `(n, H, W, C)`, those of files as
                8-bit RGB. Ready inputs are not processed.
            limit: largest number of samples, evenly spaced over all samples because data are often sorted by class.

        Yields:
            `(inputs (n, ...), labels int64 (n,) or None)`.

        Raises:
            UsageError: The batch size or limit is below 1, an image cannot be read, or images have different shapes
                after preprocessing.
        """


def for_inputs(dataset: Dataset, specs: Sequence[InputSpec]) -> Dataset:
    """Adapt a data set to a model's inputs: an array with the name of an input is that input, not the labels.

    Data sets whose arrays can be read in more than one way have a method `for_inputs`; others are returned unchanged.

    Raises:
        UsageError: The arrays do not fit the inputs, or it is not clear which arrays to use.
    """
    decide = getattr(dataset, "for_inputs", None)
    found: Dataset = dataset if decide is None else decide(specs)
    return found


class UndecidedData:
    """Data that can be read only once the model's inputs are known, for example whether `y` is an input or the labels.

    Args:
        problem: why they cannot be read yet; any other use raises it.
        decide: opens the data for a model's inputs.
    """

    def __init__(self, problem: UsageError, decide: Callable[[Sequence[InputSpec]], Dataset]):
        self._problem, self._decide = problem, decide

    def for_inputs(self, specs: Sequence[InputSpec]) -> Dataset:
        """See `for_inputs`."""
        return self._decide(specs)

    def __len__(self) -> int:
        return len(self.columns)  # raises

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        error = self._problem
        raise type(error)(str(error))


def classify_samples(values: Array, name: str) -> tuple[Kind, Array]:
    """Return whether an array holds pictures or ready inputs, and pictures with their channel axis.

    Args:
        values: array `(N, ...)`.
        name: name of the data for messages.

    Raises:
        ColumnError: There are no samples, values are not numbers, or 8-bit pictures have another number of channels.
    """
    if values.ndim < 1 or len(values) == 0:
        raise ColumnError(
            f"data: {name} has no samples (its inputs have shape {values.shape}); give data with one row per sample"
        )
    if values.dtype.kind not in "fiubU":
        raise ColumnError(f"data: {name}: inputs must be numbers or text, but got {values.dtype}")
    if values.dtype not in (np.uint8, np.uint16) or values.ndim not in (3, 4):
        return "inputs", values
    pictures = values[..., None] if values.ndim == 3 else values
    if pictures.shape[3] not in CHANNELS and values.dtype == np.uint16:
        return "inputs", values
    if pictures.shape[3] not in CHANNELS:
        raise ColumnError(
            f"data: {name}: 8-bit images must be (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels, "
            f"but got {pictures.shape}; transpose them, or store ready inputs as float32"
        )
    return "images", pictures


def checked_labels(labels: Array, samples: int, name: str) -> Labels:
    """Return labels as int64 `(N,)`, or raise if they are invalid."""
    if labels.dtype.kind not in "iu":
        raise ColumnError(f"data: {name}: labels must be integers (class numbers), but got {labels.dtype}")
    if labels.ndim != 1:
        raise ColumnError(f"data: {name}: labels must be class numbers (N,), but got shape {labels.shape}")
    if len(labels) != samples:
        raise ColumnError(f"data: {name} has {samples} inputs but {len(labels)} labels; store one label for each input")
    return labels.astype(np.int64)


def checked_columns(names: Sequence[str], columns: Sequence[str], name: str) -> tuple[str, ...]:
    """Return the names if all of them are columns.

    Raises:
        UsageError: Some are not; the message lists them and the existing columns.
    """
    if absent := [column for column in names if column not in columns]:
        raise UsageError(
            f"data: {name} has no column {', '.join(absent)}",
            hint=f"there are {', '.join(columns) or 'no named columns'}",
        )
    return tuple(names)


def spaced_rows(samples: int, batch_size: int, limit: int | None) -> Labels:
    """Return row numbers int64 `(min(N, limit),)`, evenly spaced and ascending.

    Raises:
        UsageError: The batch size or limit is below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(f"data: batch size and limit must be 1 or more, but got {batch_size} and {limit}")
    count = samples if limit is None else min(limit, samples)
    return np.arange(count, dtype=np.int64) * samples // count


def row_batches(samples: int, batch_size: int, limit: int | None) -> Iterator[Labels]:
    """Yield `spaced_rows` in batches."""
    rows = spaced_rows(samples, batch_size, limit)
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def stacked_pictures(
    pictures: Iterable[tuple[str, Array]], steps: Steps | None, shape: tuple[int, ...] | None = None
) -> Array:
    """Preprocess pictures of files `(H, W, C)` of any size and stack them: `(n, ...)`.

    Args:
        pictures: name and array of each picture.
        steps: preprocessing; None only converts to 8-bit RGB.
        shape: shape of earlier pictures, if any.

    Raises:
        UsageError: The pictures have different shapes after preprocessing.
    """
    arrays: list[Array] = []
    steps = steps if isinstance(steps, ModelPictures) else ModelPictures(steps=steps)
    for name, picture in pictures:
        array = steps.apply_file(picture)
        shape = array.shape if shape is None else shape
        if array.shape != shape:
            raise UsageError(
                f"data: {name} becomes {array.shape}, but the images before it {shape}",
                hint="make all equal with --resize HxW, or --resize N --crop HxW",
            )
        arrays.append(array)
    return np.stack(arrays)


def rebatch(pieces: Iterable[Inputs], size: int) -> Iterator[Inputs]:
    """Regroup pieces of any number of rows into batches of `size` rows; the last may be smaller."""
    waiting: list[Inputs] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += row_count(piece)
        while count >= size:
            whole = concatenate_inputs(waiting)
            yield select_rows(whole, slice(0, size))
            count -= size
            waiting = [select_rows(whole, slice(size, None))] if count else []
    if count:
        yield concatenate_inputs(waiting)


def row_count(inputs: Inputs) -> int:
    """Return the number of samples in a batch."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def select_rows(inputs: Inputs, rows: slice | Labels) -> Inputs:
    """Select rows of a batch."""
    return {key: array[rows] for key, array in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]


def concatenate_inputs(pieces: Sequence[Inputs]) -> Inputs:
    """Concatenate batches.

    Raises:
        UsageError: Their arrays have different shapes, types or names.
    """
    first = pieces[0]
    if len(pieces) == 1:
        return first
    try:
        if isinstance(first, Mapping):
            return {key: np.concatenate([piece[key] for piece in pieces]) for key in first}
        return np.concatenate(pieces)  # type: ignore[arg-type]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(
            f"data: the batches do not fit each other: {error}", hint="pad or resize them to one shape"
        ) from error


def read_image(source: Any, name: str) -> Array:
    """Read one image file (a path or an open file) as `(H, W, C)`; see `rsi_deploy.io.pictures`.

    Raises:
        UsageError: The image cannot be read, or its pixels have no known range.
    """
    try:
        return read_picture(source)
    except UnknownRangeError as error:
        raise UsageError(
            f"data: {name} has {error}", hint="store it with 8 or 16 bits a channel, or remove it"
        ) from error
    except ValueError as error:
        raise UsageError(
            f"data: {name} cannot be read as an image: {error}", hint="repair the file or remove it"
        ) from error


def require_existing(path: Path) -> Path:
    """Return the path if it exists.

    Raises:
        UsageError: It does not exist.
    """
    if not path.exists():
        raise UsageError(
            f"data: {path} does not exist",
            hint="expected an .npz, .parquet, .arrow, .txt or .jsonl file, a folder of class folders or of a saved "
            "Hugging Face data set, or package.module:function",
        )
    return path
