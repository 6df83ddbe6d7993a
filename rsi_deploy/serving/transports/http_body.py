"""HTTP bodies of the protocol: JSON, or JSON followed by the bytes of tensors (the binary tensor extension).

Inference-Header-Content-Length: n      the first n bytes are JSON; the rest are the tensors in its order, each with the
                                        length in its parameter `binary_data_size`
"""

from typing import Any

import numpy as np
import orjson

from rsi_deploy.runtime.feeds.values import TEXT
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest, InferResponse
from rsi_deploy.serving.protocol.tensors import (
    NAMES,
    Array,
    check_extensions,
    checked_shape,
    dtype_of,
    from_binary,
    from_values,
    short_repr,
    to_binary,
)

HEADER_LENGTH = "inference-header-content-length"


def decode(body: bytes, header_length: str | None, *, max_json: int) -> InferRequest:
    """Return the request in a body.

    Args:
        body: the whole body.
        header_length: value of the header with the length of the JSON, or None.
        max_json: most bytes of JSON.

    Raises:
        Refusal: 400, with what is wrong; 413, the JSON is too long.
    """
    size = len(body) if header_length is None else _length(header_length, len(body))
    if size > max_json:
        raise Refusal(413, f"{size} bytes of JSON are more than {max_json}; send tensors as binary data")
    document = json_object(body[:size])
    rest = memoryview(body)[size:]
    feeds: dict[str, Array] = {}
    for entry in _entries(document, "inputs"):
        name = _name(entry, "input")
        if name in feeds:
            raise Refusal(400, f"input {name[:80]} is repeated")
        feeds[name], rest = _tensor(entry, name, rest, header_length is not None)
    if not feeds:
        raise Refusal(400, "inputs is empty; expected one entry for each input of the model")
    if len(rest):
        raise Refusal(400, f"{len(rest)} bytes of tensors are left over: no binary_data_size of an input covers them")
    whole = _parameters(document, "the request")
    binary = _flag(whole, "binary_data_output", False)
    outputs = {}
    for entry in _entries(document, "outputs") if "outputs" in document else ():
        name = _name(entry, "output")
        outputs[name] = _flag(_parameters(entry, f"output {name[:80]}"), "binary_data", binary)
    identity = document.get("id", "")
    if not isinstance(identity, str):
        raise Refusal(400, f"id must be a string, but got {short_repr(identity)}")
    return InferRequest(feeds=feeds, id=identity, outputs=outputs, binary=binary)


def encode(answer: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if tensors follow it, else None.

    Raises:
        Refusal: 400, an output that was requested as JSON holds NaN or infinity, which JSON cannot hold.
    """
    described, tensors = [], []
    for name, array in answer.outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
        if request.outputs.get(name, request.binary):
            tensors.append(to_binary(array))
            entry["parameters"] = {"binary_data_size": len(tensors[-1])}
        else:
            entry["data"] = _json_values(name, array)
        described.append(entry)
    document = {"model_name": answer.name, "model_version": answer.version, "outputs": described}
    if request.id:
        document["id"] = request.id
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (head, None) if not tensors else (b"".join((head, *tensors)), len(head))


def _json_values(name: str, array: Array) -> Array | list[str]:
    """Return the flat values for orjson, which would write NaN and infinity as null."""
    if array.dtype == TEXT:
        texts: list[str] = array.ravel().tolist()
        return texts
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refusal(400, f"output {name} holds NaN or infinity, which JSON cannot hold; request it as binary data")
    return np.ascontiguousarray(array).ravel()


def _length(text: str, available: int) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > 12 or not 0 < int(text) <= available:
        raise Refusal(
            400, f"{HEADER_LENGTH} must be a number of 1 to {available}, the bytes of the body, but got {text[:40]!r}"
        )
    return int(text)


def json_object(text: bytes) -> dict[str, Any]:
    """Return the JSON object that a body holds.

    Raises:
        Refusal: 400, it is none.
    """
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, f"the body is no JSON: {str(error)[:160]}") from None
    if not isinstance(document, dict):
        raise Refusal(400, f"the body must be a JSON object, but got {short_repr(document)}")
    return document


def _entries(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise Refusal(400, f"{key} must be a list of objects, but got {short_repr(entries)}")
    return entries


def _name(entry: dict[str, Any], what: str) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise Refusal(400, f"the name of an {what} must be a text, but got {short_repr(name)}")
    return name


def _parameters(entry: dict[str, Any], what: str) -> dict[str, Any]:
    found = entry.get("parameters", {})
    if not isinstance(found, dict):
        raise Refusal(400, f"{what}: parameters must be an object, but got {short_repr(found)}")
    check_extensions(found, what)
    return found


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Refusal(400, f"parameter {name} must be true or false, but got {short_repr(value)}")
    return value


def _tensor(entry: dict[str, Any], name: str, rest: memoryview, binary: bool) -> tuple[Array, memoryview]:
    """Return the array of one input, and the tensor bytes after it."""
    what = f"input {name[:80]}"
    dtype, shape = dtype_of(entry.get("datatype"), what), checked_shape(entry.get("shape"), what)
    parameters = _parameters(entry, what)
    if "binary_data_size" not in parameters:
        return from_values(entry.get("data"), dtype, shape, what), rest
    size = parameters["binary_data_size"]
    if "data" in entry:
        raise Refusal(400, f"{what} has both data and binary_data_size; send one of them")
    if not binary:
        raise Refusal(400, f"{what} has a binary_data_size, but the header {HEADER_LENGTH} is missing")
    if type(size) is not int or size < 0:
        raise Refusal(400, f"{what}: binary_data_size must be a number of bytes, but got {short_repr(size)}")
    if size > len(rest):
        raise Refusal(400, f"{what}: binary_data_size is {size}, but only {len(rest)} bytes are left in the body")
    return from_binary(rest[:size], dtype, shape, what), rest[size:]
