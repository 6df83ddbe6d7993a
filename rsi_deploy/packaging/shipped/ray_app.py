"""A Ray Serve application: the Open Inference Protocol v2 over HTTP for the model in this folder.

    GET  /v2  /v2/health/live  /v2/health/ready  /v2/models/NAME[/versions/1][/ready]
    POST /v2/models/NAME[/versions/1]/infer      JSON, or JSON followed by tensors as bytes

It needs only ray[serve], numpy and onnxruntime. Type `serve run config.yaml` in this folder. If `max_batch` in
config.yaml is above 1, requests of the same shapes share a run; if that run fails, each of them runs alone. A wrong
request is answered with 4xx and the protocol's error object.
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
KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}  # kind of a tensor -> kinds of JSON values that it accepts
MAX_BYTES = 64 << 20  # most bytes of a request


class RefusedError(Exception):
    """A request that is answered with an error object."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@serve.deployment
class Model:
    """A replica: an onnxruntime session and the protocol.

    Args:
        name: name of the model in the protocol.
        max_batch: most requests that share a run; 1 runs each alone.
        max_delay_ms: milliseconds that a request may wait for others.
        threads: threads inside one operator.
    """

    def __init__(self, name: str, max_batch: int, max_delay_ms: float, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other replicas need the cores
        path = Path(__file__).parent / "model" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name = name
        self.inputs = {value.name: (TYPES[value.type], list(value.shape)) for value in self.session.get_inputs()}
        self.outputs = {value.name: (TYPES[value.type], list(value.shape)) for value in self.session.get_outputs()}
        self.batched = max_batch > 1
        self.run_batch.set_max_batch_size(max_batch)
        self.run_batch.set_batch_wait_timeout_s(max_delay_ms / 1000)

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        try:
            return await self.respond(request)
        except RefusedError as refused:
            return JSONResponse({"error": str(refused)}, refused.status)

    async def respond(self, request: Request) -> Response:
        """Answer a request by its path."""
        parts = [part for part in request.url.path.split("/") if part]
        if parts[:1] != ["v2"]:
            raise RefusedError(404, f"there is no {request.url.path}; the protocol is under /v2")
        if parts[1:2] == ["models"] and len(parts) > 2:
            return await self.respond_model(request, parts[2], parts[3:])
        if request.method != "GET":
            raise RefusedError(405, f"{request.method} {request.url.path}: only GET is supported there")
        if parts == ["v2"]:
            extensions = ["binary_tensor_data"]
            return JSONResponse({"name": "ray-serve", "version": onnxruntime.__version__, "extensions": extensions})
        if parts in (["v2", "health", "live"], ["v2", "health", "ready"]):
            return JSONResponse({parts[2]: True})
        raise RefusedError(404, f"there is no {request.url.path}")

    async def respond_model(self, request: Request, name: str, rest: list[str]) -> Response:
        """Answer a request to the model."""
        if name != self.name:
            raise RefusedError(404, f"there is no model {name[:80]!r}; expected {self.name}")
        if rest[:1] == ["versions"]:
            if rest[1:2] != ["1"]:
                raise RefusedError(404, f"{name} has version 1 only")
            rest = rest[2:]
        if rest == ["infer"]:
            if request.method != "POST":
                raise RefusedError(405, "infer needs POST")
            return await self.infer(request)
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

    async def infer(self, request: Request) -> Response:
        """Run the model on a request's inputs."""
        body = await _body(request)
        document, rest = _split(body, request.headers.get(HEADER))
        feeds = self.read_feeds(document, rest)
        requested = self.requested(document)
        found = await (self.run_batch(feeds) if self.batched else asyncio.to_thread(self.run, feeds))
        if isinstance(found, Exception):
            raise RefusedError(400, f"the model could not run these inputs: {found}")
        outputs = {name: found[name] for name in requested}
        return _answer(self.name, document.get("id", ""), outputs, requested, self.outputs)

    def read_feeds(self, document: Mapping[str, Any], rest: memoryview) -> Arrays:
        """Return the arrays of a request, after a check of names, types and shapes."""
        feeds: Arrays = {}
        for entry in _entries(document, "inputs"):
            name = str(entry.get("name"))
            if name not in self.inputs or name in feeds:
                takes = ", ".join(self.inputs)
                raise RefusedError(400, f"input {name[:80]!r} is unknown or repeated; {self.name} takes {takes}")
            (kind, dtype), shape = self.inputs[name]
            if entry.get("datatype") != kind:
                raise RefusedError(400, f"input {name} is {kind}, but got {str(entry.get('datatype'))[:80]!r}")
            sizes = _shape(name, entry.get("shape"), shape)
            feeds[name], rest = _array(name, entry, sizes, np.dtype(dtype), rest)
        if missing := [name for name in self.inputs if name not in feeds]:
            raise RefusedError(400, f"inputs are missing: {missing}")
        if len(rest):
            raise RefusedError(400, f"{len(rest)} bytes of tensors are left over")
        return feeds

    def requested(self, document: Mapping[str, Any]) -> dict[str, bool]:
        """Return requested output -> whether to send it as bytes."""
        binary = _parameters(document).get("binary_data_output") is True
        if "outputs" not in document:
            return dict.fromkeys(self.outputs, binary)
        entries = _entries(document, "outputs")
        if unknown := [name[:80] for entry in entries if (name := str(entry.get("name"))) not in self.outputs]:
            raise RefusedError(400, f"outputs {unknown} are unknown; expected some of {[*self.outputs]}")
        return {str(entry["name"]): _parameters(entry).get("binary_data", binary) is True for entry in entries}

    def run(self, feeds: Arrays) -> Arrays | Exception:
        """Return the outputs of one run, or onnxruntime's error."""
        try:
            return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        except Exception as error:  # the base class of onnxruntime's exceptions
            return error

    @serve.batch(  # type: ignore[untyped-decorator]
        max_batch_size=8, batch_wait_timeout_s=0.001
    )
    async def run_batch(self, requests: list[Arrays]) -> list[Arrays | Exception]:
        """Return the outputs of requests that Ray has joined, one entry each."""
        return await asyncio.to_thread(self.run_joined, requests)

    def run_joined(self, requests: list[Arrays]) -> list[Arrays | Exception]:
        """Run the requests with samples of the same shapes in one run."""
        groups: dict[Any, list[int]] = {}
        for at, feeds in enumerate(requests):
            rows = {len(array) for array in feeds.values()}
            key = tuple(array.shape[1:] for array in feeds.values()) if len(rows) == 1 else at
            groups.setdefault(key, []).append(at)
        answers: dict[int, Arrays | Exception] = {}
        for members in groups.values():
            parts = [requests[at] for at in members]
            found = self.run({name: np.concatenate([feeds[name] for feeds in parts]) for name in self.inputs})
            if isinstance(found, Exception):
                answers |= {at: self.run(requests[at]) for at in members}
                continue
            ends = np.cumsum([len(next(iter(feeds.values()))) for feeds in parts])[:-1]
            cut = {name: np.split(array, ends) for name, array in found.items()}
            answers |= {at: {name: pieces[k] for name, pieces in cut.items()} for k, at in enumerate(members)}
        return [answers[at] for at in range(len(requests))]


def build(args: dict[str, str]) -> serve.Application:
    """Return the application for the `args` of config.yaml."""
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
        if size > MAX_BYTES:
            raise RefusedError(413, f"a request may have {MAX_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _split(body: bytes, length: str | None) -> tuple[dict[str, Any], memoryview]:
    """Return the JSON of a body, and the bytes of tensors after it."""
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


def _shape(name: str, sizes: Any, model: list[Any]) -> tuple[int, ...]:
    fits = isinstance(sizes, list) and len(sizes) == len(model) and all(type(d) is int and d >= 0 for d in sizes)
    if not fits or any(isinstance(m, int) and m != d for m, d in zip(model, sizes, strict=True)):
        raise RefusedError(400, f"input {name} has shape {model}, but got {str(sizes)[:80]}")
    if math.prod(sizes) > MAX_BYTES:
        raise RefusedError(400, f"input {name}: {str(sizes)[:80]} is more than a request may have")
    return tuple(sizes)


def _array(
    name: str, entry: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any], rest: memoryview
) -> tuple[npt.NDArray[Any], memoryview]:
    """Return one input, from its JSON or from the next bytes, and the bytes after it."""
    size = _parameters(entry).get("binary_data_size")
    if size is not None:
        needed = math.prod(shape) * dtype.itemsize
        if type(size) is not int or size != needed or size > len(rest):
            came = f"binary_data_size {str(size)[:40]} and {len(rest)} bytes"
            raise RefusedError(400, f"input {name} needs {needed} bytes, but got {came}")
        return np.frombuffer(rest[:size], dtype).reshape(shape), rest[size:]
    try:
        values = np.array(entry.get("data"))
        array = values.astype(dtype).reshape(shape)
        fits = not values.size or values.dtype.kind in KINDS[dtype.kind]
        if not fits or (dtype.kind in "iu" and (array != values.reshape(shape)).any()):
            raise ValueError(f"it is {values.dtype}")
    except (ValueError, TypeError, OverflowError) as error:
        raise RefusedError(
            400, f"input {name}: data is no {dtype} of shape {list(shape)}: {str(error)[:160]}"
        ) from None
    return array, rest


def _answer(
    model: str, identity: Any, outputs: Arrays, binary: Mapping[str, bool], types: Mapping[str, Any]
) -> Response:
    """Return the protocol's answer: JSON, or JSON and bytes."""
    described, tensors = [], []
    for name, array in outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": types[name][0][0], "shape": list(array.shape)}
        if binary[name]:
            tensors.append(np.ascontiguousarray(array).tobytes())
            entry["parameters"] = {"binary_data_size": len(tensors[-1])}
        elif array.dtype.kind == "f" and not np.isfinite(array).all():
            raise RefusedError(
                400, f"output {name} holds NaN or infinity, which JSON cannot hold; request it as binary data"
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
