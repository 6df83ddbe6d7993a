"""Turn samples into feeds for a model: the right arrays in the right types for its inputs.

data                                                 a model with one input           with several inputs
pictures or one array                                uses it                          refuses it
arrays with the names of the model's inputs          uses the one with its name       uses one for each input
a single array with another name                     uses it                          refuses it

An input without a batch axis gets one value per run, so all rows of its data must be equal.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array, Shape
from rsi_deploy.data.dataset import Batch, Dataset, Inputs, Labels, for_inputs
from rsi_deploy.data.model_pictures import ModelPictures
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sample_rows import suggest_names
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes, has_shape, open_axis
from rsi_deploy.runtime.feeds.inputs import InputSpec
from rsi_deploy.runtime.feeds.values import is_text


class Feeding:
    """The feeds of one model from a data set.

    Args:
        dataset: samples.
        specs: inputs of the model.
        steps: preprocessing of pictures; ready inputs are not processed.
        option: command-line option of the data, for messages.
        model: model name for messages.

    Attributes:
        dataset: samples, with one array for each input if there are several.
        axes: batch axes of the inputs.

    Raises:
        UsageError: The data do not fit the model's inputs.
    """

    def __init__(
        self,
        dataset: Dataset,
        specs: Sequence[InputSpec],
        steps: Preprocessing | None,
        *,
        option: str = "--data",
        model: str = "the model",
    ):
        self._specs, self._option, self._model = list(specs), option, model
        self.axes = BatchAxes.of({spec.name: spec.shape for spec in self._specs})
        self._once: dict[str, Array] = {}
        self.dataset = self._view(dataset)
        self._pictures = (
            ModelPictures.of_input(steps, specs[0], f"{option}: {model}") if self.dataset.kind == "images" else None
        )

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[dict[str, Array], Labels | None]]:
        """Yield feeds and labels, `size` samples at a time.

        Raises:
            UsageError: Arrays do not fit the model's inputs.
        """
        for inputs, labels in self.inputs(size, limit):
            yield self.to_feeds(inputs), labels

    def inputs(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield the input of `to_feeds`, and labels, so that one pass over the data can feed several models."""
        yield from self.dataset.batches(size, self._pictures, limit)

    def notes(self) -> list[str]:
        """Return notes on the samples read so far."""
        own = [f"{self._option}: {note}" for note in getattr(self.dataset, "notes", ())]
        return own if self._pictures is None else [*own, *self._pictures.notes(self._option)]

    def to_feeds(self, inputs: Inputs) -> dict[str, Array]:
        """Convert a batch to the feeds of this model.

        Raises:
            UsageError: Arrays do not fit its inputs.
        """
        names = [spec.name for spec in self._specs]
        if not isinstance(inputs, Mapping):
            inputs = {names[0]: inputs}
        elif len(names) == len(inputs) == 1:
            inputs = {names[0]: next(iter(inputs.values()))}
        if absent := [name for name in names if name not in inputs]:
            raise UsageError(
                f"{self._option}: {self._model} takes {', '.join(absent)}, but a batch holds {', '.join(inputs)}",
                hint="give an array for each input in every batch",
            )
        return {spec.name: self._input(inputs[spec.name], spec) for spec in self._specs}

    def shapes(self, batch: int) -> dict[str, Shape]:
        """Return the shapes of the inputs, taken from the first sample, for this batch size.

        Raises:
            UsageError: Arrays do not fit the model's inputs.
        """
        feeds, _ = next(self.batches(1, 1))
        return self.axes.with_batch({name: array.shape for name, array in feeds.items()}, self.axes.fixed or batch)

    def _input(self, rows: Array, spec: InputSpec) -> Array:
        """Convert the rows of one input `(n, ...)` to the model's type and batch axis."""
        axis, options = self.axes.axes[spec.name], {"option": self._option, "model": self._model}
        is_once = axis is None or (rows.ndim == len(spec.shape) + 1 and isinstance(spec.shape[axis], int))
        if not is_once:
            moved = np.moveaxis(rows, 0, axis) if axis is not None and axis < rows.ndim else rows
            return as_input(moved, spec, axis, **options)
        value = as_input(np.asarray(rows[0]), spec, None, **options)
        known = self._once.setdefault(spec.name, np.asarray(rows[0]))
        differ = (rows != known).reshape(len(rows), -1).any(axis=1)
        if differ.any():
            another = _short_text(np.asarray(rows[differ][0]))
            raise UsageError(
                f"{self._option}: {self._model} takes {spec} once for a whole run, as it has no batch axis, but the "
                f"data have several values: {_short_text(known)} and {another}",
                hint=f"store one for all samples, numpy.savez(..., {spec.name}={_short_text(known)}), or split the "
                "data by it",
            )
        return value

    def _view(self, dataset: Dataset) -> Dataset:
        names = [spec.name for spec in self._specs]
        with errors_for_option(self._option):
            dataset = for_inputs(dataset, self._specs)
        columns = getattr(dataset, "columns", ())
        # The default column is used as it is: pictures are preprocessed, whatever the name of the model's input.
        by_name = set(names) <= set(columns) and names != [getattr(dataset, "default", "")]
        if by_name:
            return dataset.select(names)
        if len(names) == 1 and (dataset.kind != "named" or len(columns) == 1):
            return dataset if dataset.kind != "named" else dataset.select(columns)
        present = f"the data hold {', '.join(columns)}" if columns else "the data hold one array"
        one_for_each = (
            "give an .npz with one array for each of them"
            if len(names) > 1
            else "give data with an array or column of that name, or an .npz with images (or x)"
        )
        raise UsageError(
            f"{self._option}: {self._model} has the input{'s' * (len(names) > 1)} {', '.join(names)}, but "
            f"{present}{suggest_names(names, columns)}",
            hint=one_for_each,
        )


@contextmanager
def errors_for_option(option: str) -> Iterator[None]:
    """Make messages about the data begin with the option."""
    try:
        yield
    except UsageError as error:
        raise type(error)(f"{option}: {str(error).removeprefix('data: ').removeprefix(f'{option}: ')}") from error


def as_input(values: Array, spec: InputSpec, axis: int | None = 0, *, option: str, model: str = "the model") -> Array:
    """Return the values in the input's dtype after checking their shape.

    A floating type may become another one; integers and booleans may become each other if no value changes.

    Args:
        values: values for the input.
        spec: input of the model.
        axis: batch axis, which may have any size; None if there is none.
        option: command-line option of the data, for messages.
        model: model name for messages.

    Raises:
        UsageError: The values do not fit; the message says what the model takes and what it got.
    """
    sizes: list[Any] = list(values.shape)
    if axis is not None and axis < len(sizes):
        sizes[axis] = "samples"
    actual = f"{values.dtype} ({', '.join(map(str, sizes))})"
    kinds = {values.dtype.kind, spec.dtype.kind}
    if values.dtype != spec.dtype and not any(kinds <= set(same) for same in ("f", "iub", "OU")):
        raise UsageError(f"{option}: {model} takes {spec}, but the data are {actual}", hint=_other_type(values, spec))
    fits = has_shape(values.shape, spec.shape if axis is None else open_axis(spec.shape, axis))
    if not fits:
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data are {actual}",
            hint="set --resize, --crop or --layout for pictures, or give data of that shape",
        )
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise UsageError(f"{option}: the data for {spec.name} have NaN", hint="remove those samples")
    converted = values if is_text(spec.dtype) else values.astype(spec.dtype, copy=False)
    if kinds <= {"i", "u", "b"} and not np.array_equal(converted, values):
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data range from {values.min()} to {values.max()}, which does "
            "not fit"
        )
    return np.ascontiguousarray(converted) if values.ndim else converted


def _other_type(values: Array, spec: InputSpec) -> str:
    """Say how to convert numbers of another kind."""
    ready = f"ready inputs the model's own type: array.astype({str(spec.dtype)!r})"
    is_picture = values.dtype == np.uint8 and values.ndim > 2
    return f"{'8-bit pictures need a preprocessing (--mean, --std, ...), ' * is_picture}{ready}"


def _short_text(value: Array) -> str:
    """Format a value for a message in at most 60 characters."""
    text = np.array2string(value, precision=4, threshold=6, edgeitems=2).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
