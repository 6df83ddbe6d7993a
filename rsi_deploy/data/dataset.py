"""What calibration and evaluation read: samples in batches, as one array or as one array for each model input.

    kind      a batch's inputs                  goes through
    images    uint8 or uint16 `(n, H, W, C)`    the model's channels and the preprocessing
    inputs    one array `(n, ...)`              nothing: ready model input
    named     name -> array `(n, ...)`          nothing: one array for each model input

One rule decides which arrays are pictures: **uint8 or uint16 with the shape `(N, H, W)` or `(N, H, W, C)`, C one of 1,
3, 4, is pictures**; every other numeric array is ready model input.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.model_pictures import CHANNELS, ModelPictures
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.pictures import UnknownRangeError, read_picture
from rsi_deploy.runtime.feeds.inputs import InputSpec

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]
Inputs = Array | Mapping[str, Array]
Batch = tuple[Inputs, Labels | None]
Steps = Preprocessing | ModelPictures
Kind = Literal["images", "inputs", "named"]

LABEL_NAMES = ("labels", "label", "y")


class ColumnError(UsageError):
    """Arrays or columns that are no samples or labels, or may be several things: a model's inputs may decide."""


class Dataset(Protocol):
    """What calibration and evaluation read; `labels` is int64 `(N,)`, or None where there are none."""

    @property
    def kind(self) -> Kind:
        """What a batch's inputs are; see the module's docstring."""

    @property
    def labels(self) -> Labels | None:
        """Class numbers int64 `(N,)`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number; empty where the data tell none."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that `select` takes; empty where the inputs have none."""

    @property
    def default(self) -> str:
        """The column that `batches` gives where none was selected; "" where it has no name or they are all given."""

    def __len__(self) -> int: ...

    def select(self, names: Sequence[str]) -> "Dataset":
        """The same samples with one array for each of these columns (`kind` is `named`).

        Raises:
            UsageError: a column that is not there, or that has another number of samples.
        """

    def fingerprint(self) -> str:
        """The sha256 (hex) of the content (arrays, or paths and images), not of file times or compression."""

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """Walk the samples in order, `batch_size` at a time; the last batch may be smaller.

        Args:
            batch_size: samples a batch, at least 1.
            preprocessing: whose `apply` pictures go through; None gives them as `(n, H, W, C)`, those of files as
                8-bit RGB. Ready inputs pass by it.
            limit: read at most so many samples, evenly spaced over the whole set: data are often sorted by
                class, and the first thousand would be one class.

        Yields:
            `(inputs (n, ...), labels int64 (n,) or None)`.

        Raises:
            UsageError: a batch size or limit below 1, an unreadable image, images that end up in different
                shapes.
        """


def for_inputs(dataset: Dataset, specs: Sequence[InputSpec]) -> Dataset:
    """The data set once the model's inputs are known: what has the name of an input is that input, not the labels.

    Data sets that can tell their arrays apart in more than one way have a method `for_inputs`; others stay as they are.

    Raises:
        UsageError: the arrays do not fit the inputs, or leave a choice.
    """
    decide = getattr(dataset, "for_inputs", None)
    found: Dataset = dataset if decide is None else decide(specs)
    return found


class UndecidedData:
    """Data that only a model's inputs can tell apart: whether `y` is an input or the labels. Until then it is refused.

    Args:
        problem: why they cannot be read by the usual names alone.
        decide: opens them for a model's inputs.
    """

    def __init__(self, problem: UsageError, decide: Callable[[Sequence[InputSpec]], Dataset]):
        self._problem, self._decide = problem, decide

    def for_inputs(self, specs: Sequence[InputSpec]) -> Dataset:
        """See `for_inputs`."""
        return self._decide(specs)

    def __len__(self) -> int:
        return len(self.columns)  # refused

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        error = self._problem
        raise type(error)(str(error))


def as_samples(values: Array, name: str) -> tuple[Kind, Array]:
    """Whether an array is pictures or ready inputs, and pictures with their channel axis.

    Args:
        values: `(N, ...)`.
        name: of the data, for messages.

    Raises:
        ColumnError: no samples, no numbers, or 8-bit pictures with another number of channels.
    """
    if values.ndim < 1 or len(values) == 0:
        raise ColumnError(
            f"data: {name} holds no samples (its inputs have the shape {values.shape}); give data with one row a sample"
        )
    if values.dtype.kind not in "fiubU":
        raise ColumnError(f"data: {name}: inputs must be numbers or texts, but got {values.dtype}")
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
    """Labels as int64 `(N,)`, or the reason why they are none."""
    if labels.dtype.kind not in "iu":
        raise ColumnError(f"data: {name}: labels must be integers (class numbers), but got {labels.dtype}")
    if labels.ndim != 1:
        raise ColumnError(f"data: {name}: labels must be class numbers (N,), but got the shape {labels.shape}")
    if len(labels) != samples:
        raise ColumnError(
            f"data: {name} holds {samples} inputs but {len(labels)} labels; store one label for each input"
        )
    return labels.astype(np.int64)


def checked_columns(names: Sequence[str], columns: Sequence[str], name: str) -> tuple[str, ...]:
    """The names, where each is a column.

    Raises:
        UsageError: names those that are not, and those there are.
    """
    if absent := [wanted for wanted in names if wanted not in columns]:
        raise UsageError(
            f"data: {name} has no column {', '.join(absent)}; there are {', '.join(columns) or 'no named columns'}"
        )
    return tuple(names)


def spaced_rows(samples: int, batch_size: int, limit: int | None) -> Labels:
    """Row numbers int64 `(min(N, limit),)`, evenly spaced and ascending.

    Raises:
        UsageError: a batch size or limit below 1.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError(f"data: batch size and limit must be 1 or more, but got {batch_size} and {limit}")
    count = samples if limit is None else min(limit, samples)
    return np.arange(count, dtype=np.int64) * samples // count


def row_batches(samples: int, batch_size: int, limit: int | None) -> Iterator[Labels]:
    """`spaced_rows`, a batch at a time."""
    rows = spaced_rows(samples, batch_size, limit)
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def stacked_pictures(
    pictures: Iterable[tuple[str, Array]], steps: Steps | None, shape: tuple[int, ...] | None = None
) -> Array:
    """Pictures of files `(H, W, C)`, of any size, each with its name, through the preprocessing: `(n, ...)`.

    Args:
        pictures: name and array of each.
        steps: the preprocessing; None leaves them as they are, but for 8-bit RGB.
        shape: of the pictures before them, where there were some.

    Raises:
        UsageError: they end up in different shapes.
    """
    arrays: list[Array] = []
    steps = steps if isinstance(steps, ModelPictures) else ModelPictures(steps=steps)
    for name, picture in pictures:
        array = steps.apply_file(picture)
        shape = array.shape if shape is None else shape
        if array.shape != shape:
            raise UsageError(
                f"data: {name} gives {array.shape}, the images before it {shape}; "
                "make all equal with --resize HxW, or --resize N --crop HxW"
            )
        arrays.append(array)
    return np.stack(arrays)


def regrouped(pieces: Iterable[Inputs], size: int) -> Iterator[Inputs]:
    """Pieces of any number of rows as batches of `size` rows; the last may be smaller."""
    waiting: list[Inputs] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += row_count(piece)
        while count >= size:
            whole = joined(waiting)
            yield cut(whole, slice(0, size))
            count -= size
            waiting = [cut(whole, slice(size, None))] if count else []
    if count:
        yield joined(waiting)


def row_count(inputs: Inputs) -> int:
    """Samples in a batch."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def cut(inputs: Inputs, rows: slice | Labels) -> Inputs:
    """Some rows of a batch."""
    return {key: array[rows] for key, array in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]


def joined(pieces: Sequence[Inputs]) -> Inputs:
    """Batches one after another.

    Raises:
        UsageError: their arrays have other shapes, types or names.
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
            f"data: the batches do not fit each other: {error}; pad or resize them to one shape"
        ) from error


def decoded_picture(source: Any, name: str) -> Array:
    """One image file (a path or an open file) as `(H, W, C)`; see `rsi_deploy.io.pictures`.

    Raises:
        UsageError: it is no image that can be read, or its pixels have no known range.
    """
    try:
        return read_picture(source)
    except UnknownRangeError as error:
        raise UsageError(f"data: {name} has {error}; store it with 8 or 16 bits a channel, or take it out") from error
    except ValueError as error:
        raise UsageError(f"data: {name} cannot be read as an image: {error}; repair the file or take it out") from error


def existing(path: Path) -> Path:
    """The path, where there is something.

    Raises:
        UsageError: there is nothing.
    """
    if not path.exists():
        raise UsageError(
            f"data: {path} does not exist; expected an .npz, .parquet or .arrow file, a folder of class folders or of "
            f"a saved Hugging Face data set, or package.module:function"
        )
    return path
