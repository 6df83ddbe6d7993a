"""Conversion between the protocol's tensors and numpy arrays.

datatype   BOOL  UINT8 UINT16 UINT32 UINT64  INT8 INT16 INT32 INT64  FP16 FP32 FP64  BYTES
binary     the values in row-major order, little-endian; a BOOL is one byte; BYTES are UTF-8 texts, each after its
           length in 4 bytes
JSON       a list of numbers or texts, flat or nested like the shape; its values must be of the datatype: no 1.5 for an
           INT64, no 300 for a UINT8, texts for BYTES alone, no null
"""

import math
import struct
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.runtime.feeds.values import TEXT
from rsi_deploy.serving.protocol.refusal import Refusal

Array = npt.NDArray[Any]

DATATYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("bool"),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits}") for kind in ("UINT", "INT") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BYTES": TEXT,
}
NAMES = {dtype: name for name, dtype in DATATYPES.items()}
MAX_AXES = 32
MAX_TEXTS = 1 << 20
"""Most texts in one tensor: each takes about sixty bytes more in memory than in the request."""
_LENGTH = struct.Struct("<I")
_UNSUPPORTED = ("shared_memory_region", "classification")


def dtype_of(datatype: object, tensor: str) -> np.dtype[Any]:
    """Return the numpy dtype of a datatype's name.

    Raises:
        Refusal: 400, the datatype is unknown or not supported.
    """
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise Refusal(400, f"{tensor}: datatype must be one of {', '.join(DATATYPES)}, but got {short_repr(datatype)}")
    return DATATYPES[datatype]


def checked_shape(shape: object, tensor: str) -> tuple[int, ...]:
    """Return the shape as a tuple. A size may be 0, as for an empty cache.

    Raises:
        Refusal: 400, the shape is not a list of sizes.
    """
    fits = isinstance(shape, list | tuple) and len(shape) <= MAX_AXES
    if not fits or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):  # type: ignore[attr-defined]
        raise Refusal(400, f"{tensor}: shape must be a list of sizes of 0 or more, but got {short_repr(shape)}")
    return tuple(shape)  # type: ignore[arg-type]


def from_binary(raw: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], tensor: str) -> Array:
    """Return the array with this shape from little-endian bytes, without a copy.

    Raises:
        Refusal: 400, the number of bytes does not fit the shape.
    """
    if dtype == TEXT:
        return _as_texts(_split_texts(bytes(raw), shape, tensor), shape, tensor)
    needed = math.prod(shape) * dtype.itemsize
    if len(raw) != needed:
        name = NAMES[dtype]
        raise Refusal(400, f"{tensor}: {name} {list(shape)} is {needed} bytes, but {len(raw)} bytes came")
    if not needed:
        return np.empty(shape, dtype)
    if dtype == np.bool_:
        found = np.frombuffer(raw, np.uint8)
        if found.size and found.max() > 1:
            raise Refusal(400, f"{tensor}: a BOOL is a byte of 0 or 1, but got {found.max()}")
        return found.view(np.bool_).reshape(shape)
    return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype, copy=False).reshape(shape)


def to_binary(array: Array) -> bytes:
    """Return the array's values in row-major order, little-endian."""
    if array.dtype == TEXT:
        encoded = [str(text).encode() for text in array.ravel()]
        return b"".join(part for text in encoded for part in (_LENGTH.pack(len(text)), text))
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def from_values(values: object, dtype: np.dtype[Any], shape: tuple[int, ...], tensor: str) -> Array:
    """Return the array with this shape from a flat or nested list (JSON, or the typed contents of gRPC).

    Raises:
        Refusal: 400, the number of values is wrong, the list is ragged, or a value is not of the datatype.
    """
    name = NAMES[dtype]
    if not isinstance(values, list):
        raise Refusal(400, f"{tensor}: data must be a list of {name} values, but got {short_repr(values)}")
    if dtype == TEXT:
        return _as_texts(values, shape, tensor)
    if not math.prod(shape) and not _count(values):
        return np.empty(shape, dtype)
    try:
        array = np.asarray(values)
        if dtype == np.uint64 and array.dtype.kind in "fO":  # numpy turns small and large integers into floats
            array = np.asarray(values, np.dtype(object))
            array = array.astype(np.uint64) if all(type(v) is int and v >= 0 for v in array.flat) else array
    except (ValueError, OverflowError):
        raise Refusal(400, f"{tensor}: data is a ragged list; expected the shape {list(shape)}") from None
    if array.shape not in (shape, (math.prod(shape),)):
        raise Refusal(400, f"{tensor}: data has the shape {list(array.shape)}, but shape says {list(shape)}")
    allowed = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if array.dtype.kind not in allowed:
        raise Refusal(400, f"{tensor}: data holds values that are no {name}")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise Refusal(400, f"{tensor}: data holds values outside {name}, {limits.min} to {limits.max}")
    with np.errstate(over="ignore"):
        found = array.astype(dtype).reshape(shape)
    if dtype.kind == "f" and not np.isfinite(found).all():
        raise Refusal(400, f"{tensor}: data holds values outside {name}, which reaches {np.finfo(dtype).max}")
    return found


def _count(values: object) -> int:
    """Return the number of values in a nested list."""
    return sum(map(_count, values)) if isinstance(values, list) else 1


def _split_texts(raw: bytes, shape: tuple[int, ...], tensor: str) -> list[bytes]:
    """Return the texts in the binary form of BYTES."""
    texts: list[bytes] = []
    at = 0
    while at < len(raw) and len(texts) <= MAX_TEXTS:
        start = at + _LENGTH.size
        end = start + (_LENGTH.unpack_from(raw, at)[0] if start <= len(raw) else 0)
        if end > len(raw) or start > len(raw):
            raise Refusal(400, f"{tensor}: BYTES are texts, each after its length in 4 bytes; the last one is cut off")
        texts.append(raw[start:end])
        at = end
    return texts


def _as_texts(values: list[Any], shape: tuple[int, ...], tensor: str) -> Array:
    """Return an array of the texts in a flat or nested list; bytes are UTF-8."""
    count = math.prod(shape)
    if count > MAX_TEXTS:
        raise Refusal(413, f"{tensor}: {count} texts are more than {MAX_TEXTS}, the most for one tensor")
    flat: list[Any] = values
    for size in shape[1:] if flat and isinstance(flat[0], list) else ():
        if not all(isinstance(row, list) and len(row) == size for row in flat):
            raise Refusal(400, f"{tensor}: data is a ragged list; expected the shape {list(shape)}")
        flat = [text for row in flat for text in row]
    if len(flat) != count:
        raise Refusal(400, f"{tensor}: {len(flat)} texts came, but shape says {list(shape)}")
    try:
        texts = [text.decode() if isinstance(text, bytes) else text for text in flat]
    except UnicodeDecodeError:
        raise Refusal(400, f"{tensor}: BYTES must be texts in UTF-8") from None
    if not all(isinstance(text, str) for text in texts):
        raise Refusal(400, f"{tensor}: data holds values that are no texts")
    return np.array(texts, TEXT).reshape(shape)


def short_repr(value: object) -> str:
    """Return a value as a text that is short enough for a message."""
    text = repr(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_extensions(parameters: Iterable[str], what: str) -> None:
    """Check that the parameters of a request, input or output use no extension that this server lacks.

    Raises:
        Refusal: 400, with the parameter.
    """
    for name in _UNSUPPORTED:
        if name in parameters:
            raise Refusal(400, f"{what}: the extension of parameter {name} is not supported")
