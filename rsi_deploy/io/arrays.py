"""Arrays from `.npz` files: nothing pickled, and no header believed before its bytes are counted."""

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.io.archives import check_archive

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_SUFFIX = ".npy"
_NOT_DATA = ("__MACOSX/", ".DS_Store")  # what macOS adds to an archive that it packs again


def read_npz(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """All arrays of an archive that `numpy.savez` wrote, by name; texts that are bytes (dtype S) as dtype U.

    Raises:
        ValueError: no such archive, a damaged one, pickled (object) arrays, one that would unpack to far more than its
            size, or a header that claims more than there is.
        OSError: it cannot be read.
    """
    entries = [entry for entry in check_archive(Path(path)) if not entry.filename.startswith(_NOT_DATA)]
    if strange := [entry.filename for entry in entries if not entry.filename.endswith(_SUFFIX)]:
        raise ValueError(f"{strange[0]!r} in it is no array; write it with numpy.savez")
    arrays: dict[str, npt.NDArray[Any]] = {}
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


def _decoded(array: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Bytes as the texts they encode: onnxruntime would read those beyond the end of each one."""
    if array.dtype.kind != "S":
        return array
    try:
        return np.char.decode(array, "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"array {name!r} holds bytes that are no UTF-8; store texts (dtype U)") from error


def _check_header(file: IO[bytes], size: int, name: str) -> None:
    """The array of an entry of `size` bytes is as large as its header says."""
    try:
        shape, _, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, MemoryError, RecursionError, SyntaxError, TypeError, KeyError) as error:  # no header of ours
        raise ValueError(f"array {name!r} has a header that cannot be read; write it with numpy.savez") from error
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds pickled objects, which are refused; store numbers, or texts as dtype U")
    there, claimed = size - file.tell(), math.prod(shape) * dtype.itemsize
    if any(dim < 0 for dim in shape) or claimed != there:
        raise ValueError(f"array {name!r} claims {shape} of {dtype}, {claimed} bytes, but has {there}")
