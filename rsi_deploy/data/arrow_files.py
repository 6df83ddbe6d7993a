"""Read Parquet and Arrow files as one table: file lists, columns, and rows in pieces.

Needs pyarrow (`rsi-deploy[data]`). Parquet is read by row groups and Arrow is memory-mapped, so that memory holds only
the requested rows.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Array
from rsi_deploy.data.dataset import Labels
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.system_files import is_system_file

SUFFIXES = (".parquet", ".arrow")
MOST_ROWS = 50_000_000  # in a table; their row numbers take 400 MB
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_CACHES = ("cache-", "tmp")  # prefixes of files that `datasets` leaves beside the data


class ArrowTable:
    """Files with one schema, read as one table.

    Attributes:
        columns: names of the columns.
        classes: column of Hugging Face's type ClassLabel -> names of its classes.
        pictures: columns of `{bytes, path}` structs.
        binary: columns of bytes.
        numeric: columns of numbers, or lists of them.
        texts: columns of text.
        files: files of the table.
        folder: folder of the first file.
    """

    def __init__(self, files: Sequence[Path], name: str):
        self.files, self._name = list(files), name
        self.folder = self.files[0].parent
        schemas = [self._schema(file) for file in self.files]
        self.columns: tuple[str, ...] = tuple(schemas[0].names)
        for file, schema in zip(self.files, schemas, strict=True):
            if tuple(schema.names) != self.columns:
                raise UsageError(
                    f"data: {file} has the columns {', '.join(schema.names)}, but {self.files[0]} "
                    f"{', '.join(self.columns)}",
                    hint="store the same columns in every file",
                )
        types = {field.name: field.type for field in schemas[0]}
        self.pictures = tuple(name for name, kind in types.items() if is_picture(kind) and not _is_binary(kind))
        self.binary = tuple(name for name, kind in types.items() if _is_binary(kind))
        self.numeric = tuple(name for name, kind in types.items() if _is_numeric(kind))
        self.texts = tuple(name for name, kind in types.items() if _is_text(kind))
        self.classes = _class_names(schemas[0].metadata)
        self._rows = [self._row_count(file) for file in self.files]
        if sum(self._rows) > MOST_ROWS:
            raise UsageError(f"data: {name} declares {sum(self._rows)} rows", hint=f"the limit is {MOST_ROWS}")

    def __len__(self) -> int:
        return sum(self._rows)

    def pieces(self, columns: Sequence[str], rows: Labels | None = None, most: int = 4096) -> Iterator[Any]:
        """Yield record batches of these columns and (ascending) rows, at most `most` rows at a time.

        Raises:
            UsageError: A file cannot be read.
        """
        import pyarrow as pa

        start = 0
        for file, count in zip(self.files, self._rows, strict=True):
            chosen = None if rows is None else rows[(rows >= start) & (rows < start + count)] - start
            start += count
            if chosen is not None and not len(chosen):
                continue
            missing = count if chosen is None else len(chosen)
            try:
                for at, batch in _chunks(file, columns, chosen, most):
                    batch.validate(full=True)  # native code relies on the offsets afterwards
                    if chosen is not None:
                        inside = chosen[(chosen >= at) & (chosen < at + len(batch))] - at
                        batch = batch.take(pa.array(inside)) if len(inside) != len(batch) else batch
                    missing -= len(batch)
                    yield from (batch.slice(begin, most) for begin in range(0, len(batch), most))
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(file, error) from error
            if missing:
                raise UsageError(f"data: {file} has {missing} rows fewer than it declares", hint="copy it again")

    def _schema(self, file: Path) -> Any:
        import pyarrow as pa

        try:
            schema = _parquet(file).schema_arrow if file.suffix == ".parquet" else _arrow(file).schema
            _ = schema.names  # raises if the names cannot be decoded
            return schema
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _unreadable(file, error) from error

    def _row_count(self, file: Path) -> int:
        import pyarrow as pa

        try:
            if file.suffix == ".parquet":
                return int(_parquet(file).metadata.num_rows)
            return sum(len(batch) for batch in _arrow_batches(file))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def table_files(path: Path, split: str = "") -> list[Path]:
    """List the files of a table or of one of its splits; empty if `path` is another kind of folder.

    Raises:
        UsageError: There are several splits and none is chosen, or the chosen one does not exist.
    """
    if path.is_file():
        _refuse_split(path, split)
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = [str(name) for name in _json(path / "dataset_dict.json").get("splits", [])]
        return table_files(path / _chosen(path, split, splits))
    if (path / "state.json").is_file():
        _refuse_split(path, split)
        entries = _json(path / "state.json").get("_data_files")
        names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)] if entries else []
        if not names or not all(is_inside(path / name, path) and (path / name).is_file() for name in names):
            raise UsageError(
                f"data: {path} does not have all files that its state.json lists", hint="copy the whole folder again"
            )
        return [path / name for name in names]
    groups: dict[str, list[Path]] = {}
    for file in sorted([*path.glob("*"), *path.glob("data/*")]):
        is_data = not file.name.startswith(_CACHES) and not is_system_file(file.name)
        if file.suffix in SUFFIXES and is_data and file.is_file():
            groups.setdefault(_SHARD.sub("", file.stem), []).append(file)
    if not groups:
        _refuse_split(path, split)
        return []
    if len(groups) == 1 and not split:
        return next(iter(groups.values()))
    return groups[_chosen(path, split, list(groups))]


def is_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, with links resolved, stays in the folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def column_array(values: Any) -> Array:
    """Convert a column `(N,)` of numbers or of equally long (nested) lists to an array `(N, ...)`.

    Raises:
        ValueError: Cells are empty, lists have different lengths, or values are not numbers.
    """
    import pyarrow as pa

    shape = [len(values)]
    while True:
        if isinstance(values, pa.FixedShapeTensorArray):
            shape += list(values.type.shape)
            values = values.storage.flatten()
            break
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        if values.null_count:
            raise ValueError(f"{values.null_count} empty cells; fill them or remove those rows")
        if not _is_list(values.type):
            break
        lengths = set(values.value_lengths().unique().to_pylist()) if len(values) else {0}
        if len(lengths) != 1:
            raise ValueError(f"rows of different lengths ({min(lengths)} to {max(lengths)}); pad them to one length")
        shape.append(lengths.pop())
        values = values.flatten()
    array: Array = values.to_numpy(zero_copy_only=False) if _is_number(values.type) else np.asarray([], object)
    if array.dtype.kind not in "fiub" or array.size != math.prod(shape):
        raise ValueError(f"holds {values.type}, but model inputs and class numbers are numbers")
    return array.reshape(shape)


def is_picture(kind: Any) -> bool:
    """Return whether a column holds encoded picture files: `{bytes, path}` structs, or bytes."""
    import pyarrow as pa

    fields = {kind.field(i).name for i in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    return _is_binary(kind) or "bytes" in fields


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_numeric(kind: Any) -> bool:
    import pyarrow as pa

    while _is_list(kind) or isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return _is_number(kind)


def _chunks(file: Path, columns: Sequence[str], rows: Labels | None, most: int) -> Iterator[tuple[int, Any]]:
    """Yield first row and content of a file's record batches that contain any of the rows."""
    start = 0
    if file.suffix != ".parquet":
        for batch in _arrow_batches(file):
            if rows is None or ((rows >= start) & (rows < start + len(batch))).any():
                yield start, batch.select(columns)
            start += len(batch)
        return
    source = _parquet(file)
    for group in range(source.num_row_groups):
        count = source.metadata.row_group(group).num_rows
        if rows is None or ((rows >= start) & (rows < start + count)).any():
            at = start
            for batch in source.iter_batches(batch_size=most, row_groups=[group], columns=list(columns)):
                yield at, batch
                at += len(batch)
        start += count


def _parquet(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file)


def _arrow(file: Path) -> Any:
    """Open an Arrow stream (as `datasets` writes it) or an Arrow file."""
    import pyarrow as pa

    mapped = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(mapped)
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_file(mapped)


def _arrow_batches(file: Path) -> Iterator[Any]:
    reader = _arrow(file)
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        yield from reader


def _class_names(metadata: Any) -> dict[str, tuple[str, ...]]:
    """Return the class names of every ClassLabel column from Hugging Face's schema metadata."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            name: tuple(map(str, feature["names"]))
            for name, feature in dict(features).items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _unreadable(file: Path, error: Exception) -> UsageError:
    """Return the error for a file that cannot be read, on one line."""
    return UsageError(f"data: {file} cannot be read: {' '.join(str(error).split())}", hint="copy it again")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_document(file))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        raise UsageError(f"data: {file} is not what datasets.save_to_disk writes", hint="save the data again")
    return found


def _chosen(path: Path, split: str, splits: Sequence[str]) -> str:
    if not split and len(splits) == 1:
        return splits[0]
    if split not in splits:
        problem = f"has no split {split!r}" if split else "has several splits and none was chosen"
        raise UsageError(
            f"data: {path} {problem}; there are {', '.join(splits) or 'none'}"
            + (f": type {path}#split={splits[-1]}" if splits else "")
        )
    return split


def _refuse_split(path: Path, split: str) -> None:
    if split:
        raise UsageError(f"data: {path} has no splits, but got split={split}", hint="leave it out")
