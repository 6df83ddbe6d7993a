"""Convert outputs that are not tensors of numbers to arrays: text, sequences, maps and optional values.

    output of onnxruntime         arrays
    an array                      itself
    a list of arrays              NAME[0], NAME[1], ...            a sequence of tensors
    a list of dicts, equal keys   NAME: (samples, keys)            a sequence of maps, such as ZipMap's scores
    a dict                        NAME[key], ...                   a map
    None                          none                             an absent optional value

Text is an array of Python strings (dtype object), as onnxruntime returns it, or of dtype U, as `.npz` files store it.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rsi_deploy.core.types import Array, Floats

Value = Any
"""An output of onnxruntime: an array, a list, a dict, None, or a number or text within those."""

TEXT = np.dtype(object)
"""The dtype of a string tensor's `InputSpec`."""


def is_text(dtype: np.dtype[Any]) -> bool:
    """Return whether arrays of this dtype hold text."""
    return dtype.kind in "OU"


def describe_array(array: Array) -> str:
    """Describe the type and shape of an array.

    Example:
        >>> describe_array(np.array(["a", "bc"])), describe_array(np.zeros((2, 3), np.float32))
        ('string (2,)', 'float32 (2, 3)')
    """
    return f"{'string' if is_text(array.dtype) else array.dtype} {array.shape}"


def arrays_of_output(name: str, value: Value, keys: Sequence[Any] | None = None) -> dict[str, Array]:
    """Return the arrays that an output consists of, by name.

    Args:
        name: name of the output.
        value: output of onnxruntime.
        keys: order of the columns of a sequence of maps; None takes the order of the first map.

    Example:
        >>> arrays_of_output("p", [{"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}])["p"].tolist()
        [[0.25, 0.75], [0.5, 0.5]]
        >>> list(arrays_of_output("s", [np.zeros(1), np.zeros(2)])), arrays_of_output("o", None)
        (['s[0]', 's[1]'], {})
    """
    if value is None:
        return {}
    if isinstance(value, list) and (table := _table(value, keys)) is not None:
        return {name: table}
    if isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            part: array
            for key, each in items
            for part, array in arrays_of_output(f"{name}[{key!r}]", each, keys).items()
        }
    return {name: np.asarray(value, TEXT) if isinstance(value, str) else np.asarray(value)}


def arrays_of_outputs(names: Sequence[str], values: Sequence[Value]) -> dict[str, Array]:
    """Return the arrays of all outputs, in their order."""
    return {
        part: array
        for name, value in zip(names, values, strict=True)
        for part, array in arrays_of_output(name, value).items()
    }


def as_numbers(array: Array) -> Floats:
    """Convert an array to float64; each text becomes its CRC-32 scaled to 0 to 1."""
    if not is_text(array.dtype):
        return array.astype(np.float64)
    numbers = [zlib.crc32(str(text).encode()) / 2**32 for text in array.ravel()]
    return np.array(numbers, np.float64).reshape(array.shape)


def _table(value: Sequence[Value], keys: Sequence[Any] | None) -> Array | None:
    """Convert a sequence of maps with equal keys and numbers to an array `(maps, keys)`; None for anything else."""
    if not value or not all(isinstance(row, Mapping) and row.keys() == value[0].keys() for row in value):
        return None
    columns = [key for key in keys or value[0] if key in value[0]]
    if len(columns) != len(value[0]) or any(np.ndim(each) for each in value[0].values()):
        return None
    return np.array([[row[key] for key in columns] for row in value], np.float32)
