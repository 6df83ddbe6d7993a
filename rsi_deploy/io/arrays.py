"""Read arrays from `.npz` files: pickles are refused, and every header is checked against the size of its entry."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from rsi_deploy.core.types import Array
from rsi_deploy.io.archives import check_archive

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_SUFFIX = ".npy"
_NOT_DATA = ("__MACOSX/", ".DS_Store")  # macOS adds these when it repacks an archive


def read_npz(path: str | Path) -> dict[str, Array]:
    """Read all arrays of an archive that `numpy.savez` wrote, by name; byte strings (dtype S) become text (dtype U).

    Raises:
        ValueError: The archive is missing parts or damaged, holds pickled (object) arrays, would unpack to far more
            than its size, or a header declares more data than there are.
        OSError: The file cannot be read.
    """
    entries = [entry for entry in check_archive(Path(path)) if not entry.filename.startswith(_NOT_DATA)]
    if strange := [entry.filename for entry in entries if not entry.filename.endswith(_SUFFIX)]:
        raise ValueError(f"{strange[0]!r} in it is not an array; write it with numpy.savez")
    arrays: dict[str, Array] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in entries:
                name = entry.filename.removesuffix(_SUFFIX)
                with archive.open(entry) as file:
                    _check_header(file, entry.file_size, name)
                with archive.open(entry) as file:
                    arrays[name] = _decoded(np.lib.format.read_array(file, allow_pickle=False), name)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"the archive is damaged: {error}") from error
    return arrays


def _decoded(array: Array, name: str) -> Array:
    """Decode byte strings, because onnxruntime would read past the end of each one."""
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"array {name!r} holds bytes that are not UTF-8; store text (dtype U)") from error


def _check_header(file: IO[bytes], size: int, name: str) -> None:
    """Check that the header of an entry of `size` bytes declares exactly the bytes that follow it."""
    try:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, MemoryError, RecursionError, SyntaxError, TypeError, KeyError) as error:
        raise ValueError(f"array {name!r} has a header that cannot be read; write it with numpy.savez") from error
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds pickled objects, which are refused; store numbers, or text as dtype U")
    stored, claimed = size - file.tell(), math.prod(shape) * dtype.itemsize
    if any(dim < 0 for dim in shape) or claimed != stored:
        raise ValueError(f"array {name!r} claims {shape} of {dtype}, {claimed} bytes, but has {stored}")
