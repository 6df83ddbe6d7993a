"""A Ray Serve application: the model beside this file behind the Open Inference Protocol v2 over HTTP.

    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME[/versions/1][/ready]
    POST /v2/models/NAME[/versions/1]/infer      JSON, or JSON followed by tensors as bytes

Needs ray[serve], numpy and onnxruntime, nothing else; `serve run config.yaml` in this folder. Requests of one shape
that arrive together share a run where `max_batch` in config.yaml is above 1; where that run fails each goes alone.
What is wrong with a request is answered with 4xx and the protocol's error object.
"""

import asyncio
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime starts: nothing is sent
import onnxruntime
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

Arrays = dict[str, npt.NDArray[Any]]
HEADER = "inference-header-content-length"
TYPES = {
    "tensor(bool)": ("BOOL", "bool"),
    "tensor(uint8)": ("UINT8", "uint8"),
    "tensor(uint16)": ("UINT16", "uint16"),
    "tensor(uint32)": ("UINT32", "uint32"),
    "tensor(uint64)": ("UINT64", "uint64"),
    "tensor(int8)": ("INT8", "int8"),
    "tensor(int16)": ("INT16", "int16"),
    "tensor(int32)": ("INT32", "int32"),
    "tensor(int64)": ("INT64", "int64"),
    "tensor(float16)": ("FP16", "float16"),
    "tensor(float)": ("FP32", "float32"),
    "tensor(double)": ("FP64", "float64"),
}
KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # what JSON's values may be for each kind of tensor
MOST_BYTES = 64 << 20  # of a request


class RefusedError(Exception):
    """A request that gets an error object, with its status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@serve.deployment
class Model:
    """One replica: a session, and the protocol in front of it.

    Args:
        name: of the model in the protocol.
        max_batch: requests that may share a run; 1 lets each go alone.
        max_delay_ms: how long a request may wait for others.
        threads: inside one operator.
    """

    def __init__(self, name: str, max_batch: int, max_delay_ms: float, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other replicas want the cores
        path = Path(__file__).parent / "model" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name = name
        self.inputs = {value.name: (TYPES[value.type], list(value.shape)) for value in self.session.get_inputs()}
        self.outputs = {value.name: (TYPES[value.type], list(value.shape)) for value in self.session.get_outputs()}
        self.batched = max_batch > 1
        self.joined.set_max_batch_size(max_batch)
        self.joined.set_batch_wait_timeout_s(max_delay_ms / 1000)

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        try:
            return await self.answered(request)
        except RefusedError as refused:
            return JSONResponse({"error": str(refused)}, refused.status)

    async def answered(self, request: Request) -> Response:
        """What the path asks for."""
        parts = [part for part in request.url.path.split("/") if part]
        if parts[:1] != ["v2"]:
            raise RefusedError(404, f"there is no {request.url.path}; the protocol is under /v2")
        if parts[1:2] == ["models"] and len(parts) > 2:
            return await self.of_model(request, parts[2], parts[3:])
        if request.method != "GET":
            raise RefusedError(405, f"{request.method} {request.url.path}: only GET is answered there")
        if parts == ["v2"]:
            extensions = ["binary_tensor_data"]
            return JSONResponse({"name": "ray-serve", "version": onnxruntime.__version__, "extensions": extensions})
        if parts in (["v2", "health", "live"], ["v2", "health", "ready"]):
            return JSONResponse({parts[2]: True})
        raise RefusedError(404, f"there is no {request.url.path}")

    async def of_model(self, request: Request, name: str, rest: list[str]) -> Response:
        """What is asked of a model."""
        if name != self.name:
            raise RefusedError(404, f"there is no model {name[:80]!r}; this is {self.name}")
        if rest[:1] == ["versions"]:
            if rest[1:2] != ["1"]:
                raise RefusedError(404, f"{name} has version 1 only")
            rest = rest[2:]
        if rest == ["infer"]:
            if request.method != "POST":
                raise RefusedError(405, "infer takes POST")
            return await self.inferred(request)
        if request.method != "GET" or rest not in ([], ["ready"]):
            raise RefusedError(404, f"there is no {request.method} {request.url.path}")
        if rest:
            return JSONResponse({"name": name, "ready": True})
        sides = {"inputs": self.inputs, "outputs": self.outputs}
        return JSONResponse(
            {
                "name": name,
                "versions": ["1"],
                "platform": "onnxruntime_onnx",
                **{
                    side: [
                        {"name": key, "datatype": kind, "shape": [d if isinstance(d, int) else -1 for d in shape]}
                        for key, ((kind, _), shape) in tensors.items()
                    ]
                    for side, tensors in sides.items()
                },
            }
        )

    async def inferred(self, request: Request) -> Response:
        """Run a request's inputs and write its outputs."""
        body = await _body(request)
        document, rest = _split(body, request.headers.get(HEADER))
        feeds = self.feeds(document, rest)
        wanted = self.wanted(document)
        found = await (self.joined(feeds) if self.batched else asyncio.to_thread(self.alone, feeds))
        if isinstance(found, Exception):
            raise RefusedError(400, f"the model refused these inputs: {found}")
        return _answer(self.name, document.get("id", ""), {name: found[name] for name in wanted}, wanted, self.outputs)

    def feeds(self, document: Mapping[str, Any], rest: memoryview) -> Arrays:
        """The arrays of a request, each of the name, type and shape that the model takes."""
        feeds: Arrays = {}
        for entry in _entries(document, "inputs"):
            name = str(entry.get("name"))
            if name not in self.inputs or name in feeds:
                takes = ", ".join(self.inputs)
                raise RefusedError(400, f"input {name[:80]!r} is unknown or given twice; {self.name} takes {takes}")
            (kind, dtype), shape = self.inputs[name]
            if entry.get("datatype") != kind:
                raise RefusedError(400, f"input {name} is {kind}, but got {str(entry.get('datatype'))[:80]!r}")
            given = _shape(name, entry.get("shape"), shape)
            array, rest = _array(name, entry, given, np.dtype(dtype), rest)
            feeds[name] = array
        if missing := [name for name in self.inputs if name not in feeds]:
            raise RefusedError(400, f"inputs are missing: {missing}")
        if len(rest):
            raise RefusedError(400, f"{len(rest)} bytes of tensors are left over")
        return feeds

    def wanted(self, document: Mapping[str, Any]) -> dict[str, bool]:
        """Output -> whether as bytes."""
        binary = _parameters(document).get("binary_data_output") is True
        if "outputs" not in document:
            return dict.fromkeys(self.outputs, binary)
        entries = _entries(document, "outputs")
        if unknown := [name[:80] for entry in entries if (name := str(entry.get("name"))) not in self.outputs]:
            raise RefusedError(400, f"outputs {unknown} are unknown; {self.name} gives {[*self.outputs]}")
        return {str(entry["name"]): _parameters(entry).get("binary_data", binary) is True for entry in entries}

    def alone(self, feeds: Arrays) -> Arrays | Exception:
        """The outputs of one request, or what onnxruntime says against it."""
        try:
            return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        except Exception as error:  # onnxruntime's exceptions derive from nothing narrower
            return error

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=8, batch_wait_timeout_s=0.001
    )
    async def joined(self, requests: list[Arrays]) -> list[Arrays | Exception]:
        """The outputs of requests that came together; Ray gives the list, and takes one answer for each."""
        return await asyncio.to_thread(self.together, requests)

    def together(self, requests: list[Arrays]) -> list[Arrays | Exception]:
        """One run for those whose samples have the same shapes."""
        groups: dict[Any, list[int]] = {}
        for at, feeds in enumerate(requests):
            rows = {len(array) for array in feeds.values()}
            key = tuple(array.shape[1:] for array in feeds.values()) if len(rows) == 1 else at
            groups.setdefault(key, []).append(at)
        answers: dict[int, Arrays | Exception] = {}
        for members in groups.values():
            parts = [requests[at] for at in members]
            found = self.alone({name: np.concatenate([feeds[name] for feeds in parts]) for name in self.inputs})
            if isinstance(found, Exception):
                answers |= {at: self.alone(requests[at]) for at in members}
                continue
            ends = np.cumsum([len(next(iter(feeds.values()))) for feeds in parts])[:-1]
            cut = {name: np.split(array, ends) for name, array in found.items()}
            answers |= {at: {name: pieces[k] for name, pieces in cut.items()} for k, at in enumerate(members)}
        return [answers[at] for at in range(len(requests))]


def build(args: dict[str, str]) -> serve.Application:
    """The application, from the `args` of config.yaml."""
    return Model.bind(  # type: ignore[attr-defined]
        name=args["name"],
        max_batch=int(args["max_batch"]),
        max_delay_ms=float(args["max_delay_ms"]),
        threads=int(args["threads"]),
    )


async def _body(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MOST_BYTES:
            raise RefusedError(413, f"a request may have {MOST_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _split(body: bytes, length: str | None) -> tuple[dict[str, Any], memoryview]:
    """The JSON of a body, and the bytes of tensors after it."""
    size = len(body) if length is None else int(length) if length.isascii() and length.isdecimal() else -1
    if not 0 < size <= len(body):
        raise RefusedError(
            400, f"{HEADER} must be 1 to {len(body)}, the bytes of the body, but got {str(length)[:40]!r}"
        )
    try:
        document = json.loads(body[:size])
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {str(error)[:160]}") from None
    if not isinstance(document, dict):
        raise RefusedError(400, "the body must be a JSON object")
    return document, memoryview(body)[size:]


def _entries(document: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = document.get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RefusedError(400, f"{key} must be a list of objects")
    return entries


def _parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    found = entry.get("parameters", {})
    if not isinstance(found, dict):
        raise RefusedError(400, "parameters must be an object")
    return found


def _shape(name: str, given: Any, wanted: list[Any]) -> tuple[int, ...]:
    fits = isinstance(given, list) and len(given) == len(wanted) and all(type(d) is int and d >= 0 for d in given)
    if not fits or any(isinstance(w, int) and w != d for w, d in zip(wanted, given, strict=True)):
        raise RefusedError(400, f"input {name} has shape {wanted}, but got {str(given)[:80]}")
    if math.prod(given) > MOST_BYTES:
        raise RefusedError(400, f"input {name}: {str(given)[:80]} is more than a request may have")
    return tuple(given)


def _array(
    name: str, entry: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any], rest: memoryview
) -> tuple[npt.NDArray[Any], memoryview]:
    """One input, from its JSON or from the bytes that are next, and the bytes after it."""
    size = _parameters(entry).get("binary_data_size")
    if size is not None:
        needed = math.prod(shape) * dtype.itemsize
        if type(size) is not int or size != needed or size > len(rest):
            told = str(size)[:40]
            raise RefusedError(400, f"input {name} has {needed} bytes, but told are {told}, and {len(rest)} are there")
        return np.frombuffer(rest[:size], dtype).reshape(shape), rest[size:]
    try:
        values = np.array(entry.get("data"))
        array = values.astype(dtype).reshape(shape)
        fits = not values.size or values.dtype.kind in KINDS[dtype.kind]
        if not fits or (dtype.kind in "iu" and (array != values.reshape(shape)).any()):
            raise ValueError(f"they are {values.dtype}")
    except (ValueError, TypeError, OverflowError) as error:
        said = str(error)[:160]
        raise RefusedError(400, f"input {name}: its data are no {dtype} of shape {list(shape)}: {said}") from None
    return array, rest


def _answer(
    model: str, identity: Any, outputs: Arrays, binary: Mapping[str, bool], types: Mapping[str, Any]
) -> Response:
    """The protocol's answer: JSON, or JSON and bytes."""
    described, tensors = [], []
    for name, array in outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": types[name][0][0], "shape": list(array.shape)}
        if binary[name]:
            tensors.append(np.ascontiguousarray(array).tobytes())
            entry["parameters"] = {"binary_data_size": len(tensors[-1])}
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RefusedError(
                400, f"output {name} holds NaN or infinity, which JSON cannot; ask for it as binary data"
            )
        else:
            entry["data"] = array.reshape(-1).tolist()
        described.append(entry)
    document = {
        "model_name": model,
        "model_version": "1",
        "outputs": described,
        **({"id": identity} if identity else {}),
    }
    head = json.dumps(document).encode()
    if not tensors:
        return Response(head, media_type="application/json")
    headers = {HEADER: str(len(head))}
    return Response(b"".join((head, *tensors)), media_type="application/octet-stream", headers=headers)
