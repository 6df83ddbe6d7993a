"""Samples in memory: an array, or the arrays of an `.npz` file.

The keys of an `.npz` are `images` (or `x`) and optionally `labels` (or `y`). For a model with several inputs, or whose
input has another name, the keys are the names of its inputs:

    numpy.savez("texts.npz", input_ids=ids, attention_mask=mask, labels=labels)

An array with the name of an input is that input, even if its name is `y` or `labels`. An input without a batch axis (a
temperature, the mean of the pictures) is stored once, in its own shape.
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.dataset import (
    LABEL_NAMES,
    Batch,
    ColumnError,
    Kind,
    Labels,
    Steps,
    checked_columns,
    checked_labels,
    classify_samples,
    row_batches,
)
from rsi_deploy.data.sample_rows import sample_rows
from rsi_deploy.io.arrays import read_npz
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec

INPUT_NAMES = ("images", "x")


class ArrayData:
    """Samples `values (N, ...)` in memory, with or without `labels (N,)`.

    Args:
        values: pictures or ready inputs.
        labels: class numbers.
        name: name of the data for messages.
        others: arrays that can be selected by name, including `values` if it has a name.
        default: name of `values`.
    """

    classes: tuple[str, ...] = ()

    def __init__(
        self,
        values: Array,
        labels: Array | None = None,
        name: str = "arrays",
        others: Mapping[str, Array] | None = None,
        default: str = "",
    ):
        self.kind: Kind
        self.kind, self._values = classify_samples(values, name)
        self.labels = None if labels is None else checked_labels(labels, len(values), name)
        self._named, self.default = dict(others or {}), default
        self._name = name
        self._stored: Mapping[str, Array] = {}

    @classmethod
    def from_npz(cls, path: Path) -> "ArrayData | NamedData":
        """Read all arrays of an archive; pickled (object) arrays are refused.

        Raises:
            UsageError: The archive does not exist or is damaged, or it is not clear which array holds the samples.
        """
        return identify_arrays(read_arrays(path), str(path))

    def for_inputs(self, specs: Sequence[InputSpec]) -> "ArrayData | NamedData":
        """See `dataset.for_inputs`."""
        if self._stored:
            return identify_arrays(self._stored, self._name, specs)
        names = {spec.name for spec in specs}
        if names <= self._named.keys() and names != {self.default}:
            return NamedData(self._named, self.labels, self._name).for_inputs(specs)
        return self

    def __len__(self) -> int:
        return len(self._values)

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of the archive without the labels."""
        return tuple(self._named)

    def select(self, names: Sequence[str]) -> "NamedData":
        """See `Dataset.select`."""
        return NamedData(self._named, self.labels, self._name).select(names)

    def fingerprint(self) -> str:
        """Return the sha256 of shapes, dtypes and bytes of inputs and labels."""
        return _digest([self._values] if self.labels is None else [self._values, self.labels])

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        for rows in row_batches(len(self), batch_size, limit):
            values = self._values[rows]
            if self.kind == "images" and preprocessing is not None:
                values = preprocessing.apply(values)
            yield values, None if self.labels is None else self.labels[rows]


class NamedData:
    """One array `(N, ...)` for each model input by name, with or without `labels (N,)`."""

    kind: Kind = "named"
    classes: tuple[str, ...] = ()
    default = ""

    def __init__(self, arrays: Mapping[str, Array], labels: Array | None = None, name: str = "arrays"):
        self._arrays, self._name = dict(arrays), name
        counts = [len(array) if array.ndim else 0 for array in arrays.values()]
        samples = len(labels) if labels is not None and labels.ndim else max(counts, default=0)
        if labels is not None and max(counts, default=0) and samples not in counts:
            raise ColumnError(
                f"data: {name} holds {max(counts)} inputs but {samples} labels; store one label for each input"
            )
        if not samples or samples not in counts:
            raise ColumnError(
                f"data: {name} holds {_listed(arrays) or 'nothing'}; expected images (or x), or one array for each "
                f"input of the model with one row per sample, and optionally labels (or y)"
            )
        self.labels: Labels | None = None if labels is None else checked_labels(labels, samples, name)
        self._samples = samples
        self._stored: Mapping[str, Array] = {}
        self._origin = self._arrays
        self._has_rows = False

    @classmethod
    def of_rows(
        cls, arrays: Mapping[str, Array], specs: Sequence[InputSpec], labels: Array | None, name: str
    ) -> "NamedData":
        """Convert the arrays for a model's inputs to one row per sample each.

        Raises:
            UsageError: An input has no array, or arrays do not fit the inputs or each other.
        """
        count = None if labels is None else len(np.atleast_1d(labels))
        data = cls(sample_rows(arrays, specs, count, name), labels, name)
        data._origin, data._has_rows = dict(arrays), True
        return data

    def for_inputs(self, specs: Sequence[InputSpec]) -> "ArrayData | NamedData":
        """See `dataset.for_inputs`."""
        names = [spec.name for spec in specs]
        if self._has_rows and set(names) <= self._arrays.keys():
            return self
        if self._stored:
            return identify_arrays(self._stored, self._name, specs)
        if not set(names) <= self._arrays.keys():
            return self
        return NamedData.of_rows(self._arrays, specs, self.labels, self._name)

    def __len__(self) -> int:
        return self._samples

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._arrays)

    def select(self, names: Sequence[str]) -> "NamedData":
        """See `Dataset.select`."""
        chosen = {key: self._arrays[key] for key in checked_columns(names, self.columns, self._name)}
        counts = {key: len(array) if array.ndim else 0 for key, array in chosen.items()}
        if len({*counts.values()} | ({len(self)} if self.labels is not None else set())) != 1:
            labels = "" if self.labels is None else f" for {len(self)} labels"
            raise UsageError(
                f"data: {self._name}: every input needs as many samples as the others, but got {counts}{labels}"
            )
        found = NamedData(chosen, self.labels, self._name)
        found._has_rows, found._origin = self._has_rows, self._origin if self._has_rows else chosen
        return found

    def fingerprint(self) -> str:
        """Return the sha256 of names, shapes, dtypes and bytes of all arrays and the labels."""
        arrays = [self._origin[key] for key in sorted(self._origin)]
        names = np.frombuffer("\0".join(sorted(self._origin)).encode(), np.uint8)
        return _digest([names, *arrays, *([] if self.labels is None else [self.labels])])

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`; arrays whose length is not the number of samples are left out."""
        arrays = {key: array for key, array in self._arrays.items() if array.ndim and len(array) == len(self)}
        for rows in row_batches(len(self), batch_size, limit):
            yield (
                {key: array[rows] for key, array in arrays.items()},
                None if self.labels is None else self.labels[rows],
            )


def read_arrays(path: Path) -> dict[str, Array]:
    """Read all arrays of an archive.

    Raises:
        UsageError: The archive does not exist, is damaged or holds objects.
    """
    if not zipfile.is_zipfile(path):
        raise UsageError(
            f"data: {path} is not an .npz file", hint="write one with numpy.savez(path, images=..., labels=...)"
        )
    try:
        return read_npz(path)
    except (ValueError, OSError) as error:
        raise UsageError(
            f"data: {path} cannot be read: {error}", hint="copy it again, or write it with numpy.savez"
        ) from error


def identify_arrays(
    arrays: Mapping[str, Array], name: str, specs: Sequence[InputSpec] = (), *, labelled: bool = True
) -> "ArrayData | NamedData":
    """Decide which arrays are inputs and which are labels, by the names of the model's inputs, then by usual names.

    Args:
        arrays: all arrays by name.
        name: name of the data for messages.
        specs: inputs of the model, if they are known.
        labelled: whether labels are needed; if not, arrays that may be labels are ignored.

    Raises:
        ColumnError: It is not clear which arrays are samples and labels, or the labels are invalid.
        UsageError: The arrays do not fit the inputs.
    """
    names = [spec.name for spec in specs]
    inputs = [key for key in INPUT_NAMES if key in arrays]
    labels = [key for key in LABEL_NAMES if key in arrays and key not in names]
    by_name = bool(names) and set(names) <= arrays.keys()
    found = ", ".join(arrays)
    if labelled and by_name and len(labels) > 1:
        raise ColumnError(
            f"data: {name} holds {found}: besides the model's inputs ({', '.join(names)}), each of {', '.join(labels)} "
            f"may be the labels; rename all but one of them"
        )
    if not by_name and (len(inputs) > 1 or (labelled and len(labels) > 1)):
        raise ColumnError(f"data: {name} holds {found}; expected images (or x), and optionally labels (or y)")
    own = arrays[labels[0]] if labels and labelled else None
    named = {key: array for key, array in arrays.items() if key not in labels}
    default = names[0] if by_name else inputs[0] if inputs else next(iter(named), "")
    is_default = default in inputs or len(named) == 1  # a single array holds the samples, whatever its name
    data: ArrayData | NamedData
    if is_default and (not by_name or _is_plain(specs)):
        data = ArrayData(named[default], own, name, named, default)
    else:
        data = NamedData.of_rows(named, specs, own, name) if by_name else NamedData(named, own, name)
    data._stored = {} if specs else arrays
    return data


def _is_plain(specs: Sequence[InputSpec]) -> bool:
    """Return whether a model has a single input with the batch first."""
    return len(specs) == 1 and BatchAxes.of({spec.name: spec.shape for spec in specs}).axes[specs[0].name] == 0


def _listed(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{key} {array.shape}" for key, array in arrays.items())


def _digest(arrays: Sequence[Array]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        # only numbers always have a buffer; other arrays (file names, dates) are small
        digest.update(np.ascontiguousarray(array).data if array.dtype.kind in "fiub" else array.tobytes())
    return digest.hexdigest()
