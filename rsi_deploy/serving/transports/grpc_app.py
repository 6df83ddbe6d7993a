"""The Open Inference Protocol over gRPC: service `inference.GRPCInferenceService`, with tritonclient's messages.

A refusal becomes a gRPC status with the same text as the error object of HTTP.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb

import rsi_deploy
from rsi_deploy.serving.access_log import AccessLog
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
    to_binary,
)
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.transports.common import Access, Record

logger = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
OPEN_TO_ALL = ("ServerLive", "ServerReady")

Call = Callable[[Any, Any], Awaitable[Any]]

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> field of InferTensorContents that holds its values; FP16 has none and is sent as raw bytes."""


def grpc_server(service: Service, access: Access, log: AccessLog) -> Any:
    """Return a `grpc.aio.Server` with the protocol's service; the caller adds the ports."""
    limits = [("grpc.max_receive_message_length", access.max_body), ("grpc.max_send_message_length", -1)]
    server = grpc.aio.server(options=[*limits, ("grpc.so_reuseport", 0)])
    methods = {name: _typed(name, call) for name, call in grpc_calls(service, access, log).items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    return server


def grpc_calls(service: Service, access: Access, log: AccessLog) -> dict[str, Call]:
    """Return the protocol's methods: name -> function of the message and grpc's context."""
    return _Grpc(service, access, log).calls()


def _typed(name: str, call: Call) -> Any:
    """Return grpc's handler for a method, with the types of its messages."""
    request, response = (getattr(pb, f"{name}{kind}") for kind in ("Request", "Response"))
    return grpc.unary_unary_rpc_method_handler(
        call, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


class _Grpc:
    def __init__(self, service: Service, access: Access, log: AccessLog):
        self._service, self._access, self._log = service, access, log

    def calls(self) -> dict[str, Call]:
        """Return method name -> function."""
        handlers = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._model,
            "ModelInfer": self._infer,
            "RepositoryIndex": self._index,
        }
        return {name: self._call(name, handler) for name, handler in handlers.items()}

    def _call(self, name: str, handler: Callable[[Any, Record], Awaitable[Any]]) -> Call:
        async def called(message: Any, context: Any) -> Any:
            record = Record(protocol="grpc", method=name, client=context.peer(), bytes_in=message.ByteSize())
            try:
                if name not in OPEN_TO_ALL:
                    headers = dict(context.invocation_metadata() or ())
                    self._access.check_key(str(headers.get("authorization", "")), str(headers.get("x-api-key", "")))
                if record.bytes_in > self._access.max_body:  # only Ray Serve passes such messages on
                    raise Refusal(413, f"{record.bytes_in} bytes are more than {self._access.max_body}")
                response = await handler(message, record)
                record.status, record.bytes_out = 200, response.ByteSize()
                return response
            except Refusal as refusal:
                record.status, record.error = refusal.status, refusal.message
            except asyncio.CancelledError:
                record.status, record.error = 499, "the client has gone"
                raise
            except Exception:
                logger.exception("%s", name)
                record.error = "the server failed; its log says why"
            finally:
                record.note(self._service, self._log)
            return await context.abort(_CODES.get(record.status, grpc.StatusCode.INTERNAL), record.error)

        return called

    async def _live(self, message: Any, record: Record) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _ready(self, message: Any, record: Record) -> Any:
        return pb.ServerReadyResponse(ready=self._service.ready)

    async def _model_ready(self, message: Any, record: Record) -> Any:
        served = self._service.find(message.name, message.version)
        return pb.ModelReadyResponse(ready=self._service.can_answer(served))

    async def _server(self, message: Any, record: Record) -> Any:
        return pb.ServerMetadataResponse(name="rsi-deploy", version=rsi_deploy.__version__)

    async def _model(self, message: Any, record: Record) -> Any:
        return pb.ModelMetadataResponse(**self._service.metadata(message.name, message.version))

    async def _index(self, message: Any, record: Record) -> Any:
        return pb.RepositoryIndexResponse(models=self._service.index())

    async def _infer(self, message: Any, record: Record) -> Any:
        record.id = message.id
        request = decode(message)
        record.answer = answer = await self._service.infer(message.model_name, message.model_version, request)
        return encode(answer, message.id)


def decode(message: Any) -> InferRequest:
    """Return the request in a `ModelInferRequest`.

    Raises:
        Refusal: 400, with what is wrong.
    """
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise Refusal(400, f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs; expected one for each")
    feeds: dict[str, Array] = {}
    for index, tensor in enumerate(message.inputs):
        what = f"input {tensor.name[:80]}"
        if tensor.name in feeds:
            raise Refusal(400, f"{what} is repeated")
        check_extensions(tensor.parameters, what)
        dtype, shape = dtype_of(tensor.datatype, what), checked_shape(list(tensor.shape), what)
        if raw:
            feeds[tensor.name] = from_binary(raw[index], dtype, shape, what)
            continue
        if not math.prod(shape) and not tensor.contents.ListFields():
            feeds[tensor.name] = from_binary(b"", dtype, shape, what)
            continue
        if (name := _CONTENTS.get(tensor.datatype)) is None:
            raise Refusal(400, f"{what}: {tensor.datatype} has no contents; send raw_input_contents")
        filled = [field.name for field, _ in tensor.contents.ListFields()]
        if wrong := [field for field in filled if field != name]:
            raise Refusal(400, f"{what}: {tensor.datatype} is sent in {name}, but got {', '.join(wrong)}")
        if len(values := getattr(tensor.contents, name)) != math.prod(shape):
            raise Refusal(400, f"{what}: {len(values)} values came, but shape says {list(shape)}")
        feeds[tensor.name] = from_values(list(values), dtype, shape, what)
    if not feeds:
        raise Refusal(400, "there are no inputs; expected one for each input of the model")
    for output in message.outputs:
        check_extensions(output.parameters, f"output {output.name[:80]}")
    return InferRequest(
        feeds=feeds, id=message.id, outputs={output.name: True for output in message.outputs}, binary=True
    )


def encode(answer: InferResponse, identity: str) -> Any:
    """Return the `ModelInferResponse` of an answer, with its tensors as raw bytes."""
    return pb.ModelInferResponse(
        model_name=answer.name,
        model_version=answer.version,
        id=identity,
        outputs=[
            {"name": name, "datatype": NAMES[array.dtype], "shape": list(array.shape)}
            for name, array in answer.outputs.items()
        ],
        raw_output_contents=[to_binary(array) for array in answer.outputs.values()],
    )
