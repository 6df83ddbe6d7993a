"""Samples in memory: an array, or an `.npz` file of arrays.

The keys of an `.npz` are `images` (or `x`) and, where there are labels, `labels` (or `y`). For a model with several
inputs, or whose input has another name, the keys are the names of its inputs:

    numpy.savez("texts.npz", input_ids=ids, attention_mask=mask, labels=labels)
"""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rsi_deploy.errors import UsageError
from rsi_deploy.gateway.arrays import read_npz
from rsi_deploy.measure.dataset import (
    LABEL_NAMES,
    Array,
    Batch,
    Kind,
    Labels,
    Steps,
    as_samples,
    checked_columns,
    checked_labels,
    row_batches,
)

INPUT_NAMES = ("images", "x")


class ArrayData:
    """Samples in memory, `values (N, ...)`, with `labels (N,)` or without.

    Args:
        values: pictures or ready inputs.
        labels: class numbers.
        name: of the data, for messages.
        others: arrays that are read by name alone, `values` among them where it has one.
        default: the name of `values`.
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
        self.kind, self._values = as_samples(values, name)
        self.labels = None if labels is None else checked_labels(labels, len(values), name)
        self._named, self.default = dict(others or {}), default
        self._name = name

    @classmethod
    def from_npz(cls, path: Path) -> "ArrayData | NamedData":
        """Read all arrays of an archive; pickled (object) arrays are refused.

        Raises:
            UsageError: no such archive, damaged, or not to be told what the samples are.
        """
        if not zipfile.is_zipfile(path):
            raise UsageError(
                f"data: {path} is not an .npz file; write one with numpy.savez(path, images=..., labels=...)"
            )
        try:
            arrays = read_npz(path)
        except (ValueError, OSError) as error:
            raise UsageError(
                f"data: {path} cannot be read: {error}; copy it again, or write it with numpy.savez"
            ) from error
        inputs, labels = ([key for key in keys if key in arrays] for keys in (INPUT_NAMES, LABEL_NAMES))
        if len(inputs) > 1 or len(labels) > 1:
            found = ", ".join(arrays)
            raise UsageError(f"data: {path} holds {found}; expected images (or x), and labels (or y) or none")
        given = arrays[labels[0]] if labels else None
        named = {key: array for key, array in arrays.items() if key not in labels}
        if inputs or len(named) == 1:  # a single array is the samples, whatever its name
            default = inputs[0] if inputs else next(iter(named))
            return cls(arrays[default], given, str(path), named, default)
        return NamedData(named, given, str(path))

    def __len__(self) -> int:
        return len(self._values)

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys of the archive, but for the labels."""
        return tuple(self._named)

    def select(self, names: Sequence[str]) -> "NamedData":
        """See `Dataset.select`."""
        return NamedData(self._named, self.labels, self._name).select(names)

    def fingerprint(self) -> str:
        """The sha256 of shapes, dtypes and bytes of inputs and labels."""
        return _digest([self._values] if self.labels is None else [self._values, self.labels])

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        for rows in row_batches(len(self), batch_size, limit):
            values = self._values[rows]
            if self.kind == "images" and preprocessing is not None:
                values = preprocessing.apply(values)
            yield values, None if self.labels is None else self.labels[rows]


class NamedData:
    """One array `(N, ...)` for each model input, by its name, with `labels (N,)` or without."""

    kind: Kind = "named"
    classes: tuple[str, ...] = ()
    default = ""

    def __init__(self, arrays: Mapping[str, Array], labels: Array | None = None, name: str = "arrays"):
        self._arrays, self._name = dict(arrays), name
        counts = [len(array) if array.ndim else 0 for array in arrays.values()]
        samples = len(labels) if labels is not None and labels.ndim else max(counts, default=0)
        if labels is not None and max(counts, default=0) and samples not in counts:
            raise UsageError(
                f"data: {name} holds {max(counts)} inputs but {samples} labels; store one label for each input"
            )
        if not samples or samples not in counts:
            raise UsageError(
                f"data: {name} holds {_listed(arrays) or 'nothing'}; expected images (or x), or one array for each "
                f"input of the model with one row a sample, and labels (or y) or none"
            )
        self.labels: Labels | None = None if labels is None else checked_labels(labels, samples, name)
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the arrays."""
        return tuple(self._arrays)

    def select(self, names: Sequence[str]) -> "NamedData":
        """See `Dataset.select`."""
        wanted = {key: self._arrays[key] for key in checked_columns(names, self.columns, self._name)}
        counts = {key: len(array) if array.ndim else 0 for key, array in wanted.items()}
        if len({*counts.values()} | ({len(self)} if self.labels is not None else set())) != 1:
            labels = "" if self.labels is None else f" for {len(self)} labels"
            raise UsageError(
                f"data: {self._name}: every input needs as many samples as the others, but got {counts}{labels}"
            )
        return NamedData(wanted, self.labels, self._name)

    def fingerprint(self) -> str:
        """The sha256 of names, shapes, dtypes and bytes of all arrays and the labels."""
        arrays = [self._arrays[key] for key in sorted(self._arrays)]
        names = np.frombuffer("\0".join(sorted(self._arrays)).encode(), np.uint8)
        return _digest([names, *arrays, *([] if self.labels is None else [self.labels])])

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`; arrays of another length than the samples are left out."""
        arrays = {key: array for key, array in self._arrays.items() if array.ndim and len(array) == len(self)}
        for rows in row_batches(len(self), batch_size, limit):
            yield (
                {key: array[rows] for key, array in arrays.items()},
                None if self.labels is None else self.labels[rows],
            )


def _listed(arrays: Mapping[str, Array]) -> str:
    return ", ".join(f"{key} {array.shape}" for key, array in arrays.items())


def _digest(arrays: Sequence[Array]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        # only numbers are sure to have a buffer; others (names of files, dates) are small
        digest.update(np.ascontiguousarray(array).data if array.dtype.kind in "fiub" else array.tobytes())
    return digest.hexdigest()
