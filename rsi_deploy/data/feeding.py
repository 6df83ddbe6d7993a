"""Samples become what a model is fed: for one model's inputs, the right arrays in the right types.

the data hold                                        a model with one input gets      with several inputs
pictures or one array                                that one                         refused
arrays that have the names of the model's inputs     the one of its name              one each
a single named array                                 that one, whatever its name      refused

An input without a batch axis gets one value a run: the rows of the data must be equal there.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import Array, Batch, Dataset, Inputs, Labels, for_inputs
from rsi_deploy.data.model_pictures import ModelPictures
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sample_rows import near_names
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec
from rsi_deploy.runtime.feeds.values import is_text

Feeds = dict[str, Array]


class Feeding:
    """A data set as the feeds of one model.

    Args:
        dataset: the samples.
        specs: the model's inputs.
        steps: from 8-bit pictures to inputs; ready inputs go through none.
        option: where the data were named, for messages.
        model: the model's name, for messages.

    Attributes:
        dataset: the samples, with one array for each input where there are several.
        axes: the batch axes of the inputs.

    Raises:
        UsageError: the data do not hold what the model takes.
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

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Feeds, Labels | None]]:
        """Feeds and labels, `size` samples at a time.

        Raises:
            UsageError: arrays that do not fit the model's inputs.
        """
        for inputs, labels in self.inputs(size, limit):
            yield self.fitted(inputs), labels

    def inputs(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """What `fitted` takes, and labels: so that several models are fed by one pass over the data."""
        yield from self.dataset.batches(size, self._pictures, limit)

    def notes(self) -> list[str]:
        """What a reader should know of the samples that were read."""
        return [] if self._pictures is None else self._pictures.notes(self._option)

    def fitted(self, inputs: Inputs) -> Feeds:
        """A batch as this model's feeds.

        Raises:
            UsageError: arrays that do not fit its inputs.
        """
        names = [spec.name for spec in self._specs]
        if not isinstance(inputs, Mapping):
            inputs = {names[0]: inputs}
        elif len(names) == len(inputs) == 1:
            inputs = {names[0]: next(iter(inputs.values()))}
        if absent := [name for name in names if name not in inputs]:
            raise UsageError(
                f"{self._option}: {self._model} takes {', '.join(absent)}, but a batch holds {', '.join(inputs)}"
                f"; give an array for each input in every batch"
            )
        return {spec.name: self._input(inputs[spec.name], spec) for spec in self._specs}

    def shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs as the first sample has them, with a batch of this size.

        Raises:
            UsageError: arrays that do not fit the model's inputs.
        """
        feeds, _ = next(self.batches(1, 1))
        return self.axes.with_batch({name: array.shape for name, array in feeds.items()}, self.axes.fixed or batch)

    def _input(self, rows: Array, spec: InputSpec) -> Array:
        """The rows of one input `(n, ...)` as the model takes it."""
        axis, options = self.axes.axes[spec.name], {"option": self._option, "model": self._model}
        is_once = axis is None or (rows.ndim == len(spec.shape) + 1 and isinstance(spec.shape[axis], int))
        if not is_once:
            moved = np.moveaxis(rows, 0, axis) if axis is not None and axis < rows.ndim else rows
            return as_input(moved, spec, axis, **options)
        value = as_input(np.asarray(rows[0]), spec, None, **options)
        known = self._once.setdefault(spec.name, np.asarray(rows[0]))
        differ = (rows != known).reshape(len(rows), -1).any(axis=1)
        if differ.any():
            another = _shown(np.asarray(rows[differ][0]))
            raise UsageError(
                f"{self._option}: {self._model} takes {spec} once for a whole run, for it has no batch axis, but the "
                f"data hold several values: {_shown(known)} and {another}; store one for all samples, "
                f"numpy.savez(..., {spec.name}={_shown(known)}), or split the data by it"
            )
        return value

    def _view(self, dataset: Dataset) -> Dataset:
        names = [spec.name for spec in self._specs]
        with named_option(self._option):
            dataset = for_inputs(dataset, self._specs)
        columns = getattr(dataset, "columns", ())
        # The default is given as it is: pictures go through the preprocessing, whatever the model calls its input.
        by_name = set(names) <= set(columns) and names != [getattr(dataset, "default", "")]
        if by_name:
            return dataset.select(names)
        if len(names) == 1 and (dataset.kind != "named" or len(columns) == 1):
            return dataset if dataset.kind != "named" else dataset.select(columns)
        there = f"the data hold {', '.join(columns)}" if columns else "the data hold one array"
        one_for_each = (
            "give an .npz with one array for each of them"
            if len(names) > 1
            else "give data with an array or column of that name, or an .npz with images (or x)"
        )
        raise UsageError(
            f"{self._option}: {self._model} has the input{'s' * (len(names) > 1)} {', '.join(names)}, but {there}"
            f"{near_names(names, columns)}; {one_for_each}"
        )


@contextmanager
def named_option(option: str) -> Iterator[None]:
    """What is wrong with the data names the option."""
    try:
        yield
    except UsageError as error:
        raise type(error)(f"{option}: {str(error).removeprefix('data: ').removeprefix(f'{option}: ')}") from error


def as_input(values: Array, spec: InputSpec, axis: int | None = 0, *, option: str, model: str = "the model") -> Array:
    """The values in the input's dtype and checked against its shape.

    One floating type may become another, and integers and booleans each other where no value changes.

    Args:
        values: for the input.
        spec: of the input.
        axis: its batch axis, whose size is free; None where it has none.
        option: where the data were named, for messages.
        model: the model's name, for messages.

    Raises:
        UsageError: says what the model takes and what came.
    """
    sizes: list[Any] = list(values.shape)
    if axis is not None and axis < len(sizes):
        sizes[axis] = "samples"
    came = f"{values.dtype} ({', '.join(map(str, sizes))})"
    kinds = {values.dtype.kind, spec.dtype.kind}
    if values.dtype != spec.dtype and not any(kinds <= set(same) for same in ("f", "iub", "OU")):
        raise UsageError(f"{option}: {model} takes {spec}, but the data are {came}; {_other_type(values, spec)}")
    fits = values.ndim == len(spec.shape) and all(
        at == axis or not isinstance(dim, int) or dim == size
        for at, (dim, size) in enumerate(zip(spec.shape, values.shape, strict=True))
    )
    if not fits:
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data are {came}; set --resize, --crop or --layout where they are "
            f"pictures, or give data of that shape"
        )
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise UsageError(f"{option}: the data for {spec.name} hold NaN; take those samples out")
    converted = values if is_text(spec.dtype) else values.astype(spec.dtype, copy=False)
    if kinds <= {"i", "u", "b"} and not np.array_equal(converted, values):
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data hold {values.min()} to {values.max()}, which do not fit it"
        )
    return np.ascontiguousarray(converted) if values.ndim else converted


def _other_type(values: Array, spec: InputSpec) -> str:
    """What to do about numbers of another kind."""
    ready = f"ready inputs the model's own type: array.astype({str(spec.dtype)!r})"
    is_picture = values.dtype == np.uint8 and values.ndim > 2
    return f"{'8-bit pictures need a preprocessing (--mean, --std, ...), ' * is_picture}{ready}"


def _shown(value: Array) -> str:
    """A value in a message, short."""
    text = np.array2string(value, precision=4, threshold=6, edgeitems=2).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
