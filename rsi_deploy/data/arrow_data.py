"""Tables on disk: Parquet and Arrow files, and folders saved by Hugging Face `datasets`.

    FILE.parquet, FILE.arrow        one file
    saved by `save_to_disk`         `state.json` and Arrow files; with splits, `dataset_dict.json` and a folder for each
    downloaded from a hub           files such as `data/test-00000-of-00001.parquet`

Columns are found by type and name. Pictures are `{bytes, path}` structs, or binary columns named `image`, `img`...
Labels are named `label`, `labels` or `y`, or are the only column of Hugging Face's type ClassLabel. If several columns
match, the user chooses after a `#`: `cifar100#split=test,image=img,label=fine_label`. All other columns are arrays for
the model inputs with their names. Only the needed rows are decoded, 64 at a time.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.arrow_files import ArrowTable, column_array, is_inside, is_picture
from rsi_deploy.data.dataset import (
    LABEL_NAMES,
    Batch,
    ColumnError,
    Inputs,
    Kind,
    Labels,
    Steps,
    checked_columns,
    checked_labels,
    classify_samples,
    read_image,
    rebatch,
    row_batches,
    spaced_rows,
    stacked_pictures,
)
from rsi_deploy.runtime.feeds.inputs import InputSpec

PICTURE_NAMES = ("image", "images", "img", "picture", "pixel_values", "x")
DECODED = 64


class ArrowData:
    """Samples in tables on disk.

    Args:
        files: tables with one schema, in order.
        name: name of the data for messages.
        image: column of the pictures (or of a single ready input); "" finds it.
        label: column of the class numbers; "" finds it.
        inputs: names of the model's inputs, if they are known; columns with these names are not labels.
        labelled: whether labels are needed.

    Raises:
        UsageError: A column does not exist or several columns match, labels are invalid, or there are no samples.
    """

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        *,
        image: str = "",
        label: str = "",
        inputs: Sequence[str] = (),
        labelled: bool = True,
    ):
        self._table, self._name = ArrowTable(files, name), name
        self._model_inputs, self._labelled = tuple(inputs), labelled
        self._choices = {"image": image, "label": label}
        if not len(self._table):
            raise UsageError(f"data: {name} has no samples", hint="give another file or split")
        names = self._table.columns
        self._label = checked_columns([label], names, name)[0] if label else self._found_label()
        self._image = checked_columns([image], names, name)[0] if image else self._found_picture()
        self.classes = self._table.classes.get(self._label, ())
        self.labels: Labels | None = None
        if self._label and labelled:
            values = [self._array(batch, self._label) for batch in self._table.pieces([self._label])]
            self.labels = checked_labels(np.concatenate(values), len(self._table), f"{name}, column {self._label}")
        self._selected: tuple[str, ...] = ()
        self.kind: Kind = "named"
        if self._image:
            batch = next(self._table.pieces([self._image], np.zeros(1, np.int64)))
            is_file = is_picture(batch.schema.field(self._image).type)
            self.kind = "images" if is_file else classify_samples(self._array(batch, self._image), name)[0]
        elif not self.columns:
            raise UsageError(f"data: {name} has no column of pictures or numbers", hint=f"there are {', '.join(names)}")

    def for_inputs(self, specs: Sequence[InputSpec]) -> "ArrowData":
        """See `dataset.for_inputs`."""
        names = tuple(spec.name for spec in specs)
        if self._selected or names == self._model_inputs:
            return self
        return ArrowData(self._table.files, self._name, **self._choices, inputs=names, labelled=self._labelled)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of numbers except the labels."""
        return self._selected or tuple(column for column in self._table.numeric if column != self._label)

    @property
    def default(self) -> str:
        """Column of pictures, or of a single ready input."""
        return self._image

    def select(self, names: Sequence[str]) -> "ArrowData":
        """See `Dataset.select`."""
        chosen = object.__new__(ArrowData)
        chosen.__dict__.update(self.__dict__)
        chosen._selected, chosen._image = checked_columns(names, self.columns, self._name), ""
        chosen.kind = "named"
        return chosen

    def fingerprint(self) -> str:
        """Return the sha256 of all columns and of the chosen ones; file layout and compression do not matter."""
        names = sorted(self._table.columns)
        digests = {name: hashlib.sha256(name.encode()) for name in names}
        for batch in self._table.pieces(names):
            for name, digest in digests.items():
                for value in _values(batch, name):
                    digest.update(value)
        chosen = f"{self._image}\0{self._label}\0{len(self)}".encode()
        return hashlib.sha256(chosen + b"".join(digest.digest() for digest in digests.values())).hexdigest()

    def batches(self, batch_size: int, preprocessing: Steps | None, limit: int | None = None) -> Iterator[Batch]:
        """See `Dataset.batches`."""
        pieces = self._inputs(spaced_rows(len(self), batch_size, limit), preprocessing)
        for inputs, rows in zip(rebatch(pieces, batch_size), row_batches(len(self), batch_size, limit), strict=True):
            yield inputs, None if self.labels is None else self.labels[rows]

    def _inputs(self, rows: Labels, steps: Steps | None) -> Iterator[Inputs]:
        """Yield the inputs of these rows in pieces."""
        columns = [self._image] if self._image else list(self.columns)
        shape: tuple[int, ...] | None = None
        for batch in self._table.pieces(columns, rows, DECODED):
            if not self._image:
                yield {column: self._array(batch, column) for column in columns}
            elif is_picture(batch.schema.field(self._image).type):
                pictures = ((name, read_image(file, name)) for name, file in self._pictures(batch))
                piece = stacked_pictures(pictures, steps, shape)
                shape = piece.shape[1:]
                yield piece
            else:
                kind, values = classify_samples(self._array(batch, self._image), self._name)
                yield steps.apply(values) if kind == "images" and steps is not None else values

    def _pictures(self, batch: Any) -> Iterator[tuple[str, Any]]:
        """Yield name and open file (or path) of each picture."""
        for value in batch.column(self._image).to_pylist():
            content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            name = f"{self._name}, column {self._image}{f', {path}' if path else ''}"
            if content is not None:
                yield name, io.BytesIO(content)
            elif path and is_inside(file := self._table.folder / path, self._table.folder) and file.is_file():
                yield name, file
            else:
                raise UsageError(
                    f"data: {name}: a row has neither the bytes of a picture nor a file in the table's folder",
                    hint="store the pictures' bytes, or put the files into the folder",
                )

    def _array(self, batch: Any, column: str) -> Array:
        try:
            return column_array(batch.column(column))
        except ValueError as error:
            raise UsageError(f"data: {self._name}, column {column}: {error}") from error

    def _found_label(self) -> str:
        columns = [column for column in self._table.columns if column not in self._model_inputs]
        named = [column for column in columns if column in LABEL_NAMES]
        found = named or [column for column in columns if column in self._table.classes]
        return self._only(found if self._labelled else found[:1], "label")

    def _found_picture(self) -> str:
        columns = [column for column in self._table.columns if column != self._label]
        if self._model_inputs and set(self._model_inputs) <= set(columns):  # columns with an input's name are inputs
            columns = [column for column in columns if column in self._model_inputs]
            if len(columns) > 1:
                return ""
        pictures = [column for column in columns if column in self._table.pictures]
        named = [column for column in columns if column in PICTURE_NAMES and column in self._table.numeric]
        binaries = [column for column in columns if column in PICTURE_NAMES and column in self._table.binary]
        return self._only(pictures or binaries or named, "image")

    def _only(self, found: Sequence[str], role: str) -> str:
        if len(found) > 1:
            raise ColumnError(
                f"data: {self._name} has {len(found)} columns that may be the {role}: {', '.join(found)}; choose one: "
                f"{self._name}#{role}={found[0]}"
            )
        return found[0] if found else ""


def _values(batch: Any, column: str) -> Iterator[bytes]:
    """Yield each row's value as bytes with its type and shape, independent of how rows are grouped."""
    values = batch.column(column)
    try:
        arrays = [] if is_picture(values.type) else list(column_array(values))
    except ValueError:  # text, or rows of different lengths
        arrays = []
    if len(arrays) == len(values):
        yield from (f"{row.dtype.str}{row.shape}".encode() + row.tobytes() for row in map(np.asarray, arrays))
        return
    for value in values.to_pylist():
        inner = value.get("bytes") if isinstance(value, dict) and value.get("bytes") is not None else value
        yield inner if isinstance(inner, bytes) else repr(inner).encode()
