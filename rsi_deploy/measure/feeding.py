"""Samples become what a model is fed: for one model's inputs, the right arrays in the right types.

the data hold                                        a model with one input gets      with several inputs
pictures or one array                                that one                         refused
arrays that have the names of the model's inputs     the one of its name              one each
a single named array                                 that one, whatever its name      refused
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rsi_deploy.errors import UsageError
from rsi_deploy.measure.dataset import Array, Batch, Dataset, Inputs, Labels
from rsi_deploy.measure.inputs import InputSpec
from rsi_deploy.measure.preprocess import Preprocessing
from rsi_deploy.measure.values import is_text

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
        self.dataset = self._view(dataset)
        self._steps = steps if self.dataset.kind == "images" else None

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Feeds, Labels | None]]:
        """Feeds and labels, `size` samples at a time.

        Raises:
            UsageError: arrays that do not fit the model's inputs.
        """
        for inputs, labels in self.inputs(size, limit):
            yield self.fitted(inputs), labels

    def inputs(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """What `fitted` takes, and labels: so that several models are fed by one pass over the data."""
        yield from self.dataset.batches(size, self._steps, limit)

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
        return {
            spec.name: as_input(inputs[spec.name], spec, option=self._option, model=self._model) for spec in self._specs
        }

    def _view(self, dataset: Dataset) -> Dataset:
        names = [spec.name for spec in self._specs]
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
            f"{self._option}: {self._model} has the input{'s' * (len(names) > 1)} {', '.join(names)}, but {there}; "
            f"{one_for_each}"
        )


def as_input(values: Array, spec: InputSpec, *, option: str, model: str = "the model") -> Array:
    """The values in the input's dtype and checked against its shape.

    One floating type may become another, and integers and booleans each other where no value changes.

    Raises:
        UsageError: says what the model takes and what came.
    """
    came = f"{values.dtype} ({', '.join(map(str, ['samples', *values.shape[1:]]))})"
    kinds = {values.dtype.kind, spec.dtype.kind}
    if values.dtype != spec.dtype and not any(kinds <= set(same) for same in ("f", "iub", "OU")):
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data are {came}; 8-bit pictures need a "
            f"preprocessing (mean, std, ...), ready inputs the model's own type"
        )
    fits = values.ndim == len(spec.shape) and all(
        not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape[1:], values.shape[1:], strict=True)
    )
    if not fits:
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data are {came}; set resize, crop or layout where they are "
            f"pictures, or give data of that shape"
        )
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise UsageError(f"{option}: the data for {spec.name} hold NaN; take those samples out")
    converted = values if is_text(spec.dtype) else values.astype(spec.dtype, copy=False)
    if kinds <= {"i", "u", "b"} and not np.array_equal(converted, values):
        raise UsageError(
            f"{option}: {model} takes {spec}, but the data hold {values.min()} to {values.max()}, which do not fit it"
        )
    return np.ascontiguousarray(converted)
