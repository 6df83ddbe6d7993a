"""The Open Inference Protocol over HTTP.

    GET  /v2   /v2/health/live   /v2/health/ready   /v2/models   /v2/models/NAME[/versions/N][/ready]
    POST /v2/models/NAME[/versions/N]/infer         JSON, or JSON and binary tensors
    POST /v2/models/NAME[/versions/N]/image         an image file; the bundle's preprocessing is applied
    POST /v2/repository/index                       names, versions and states, in Triton's form
    GET  /v2/models/NAME/shadow                     comparison with the shadow
    GET  /metrics                                   Prometheus
    /v1/...                                         OpenAI's protocol, see `openai_app`

A refused request gets `{"error": "..."}` with a status of 4xx or 503.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

import rsi_deploy
from rsi_deploy.serving.access_log import AccessLog
from rsi_deploy.serving.protocol.images import image_request
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferRequest
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.transports import http_body
from rsi_deploy.serving.transports.common import Access, Record
from rsi_deploy.serving.transports.openai_answers import EventStream, error_document
from rsi_deploy.serving.transports.openai_app import PREFIX, Handler, OpenAi

logger = logging.getLogger(__name__)

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]

JSON, BINARY = "application/json", "application/octet-stream"


def http_app(service: Service, access: Access, log: AccessLog, lifespan: Lifespan | None = None) -> Starlette:
    """Return the ASGI application for HTTP requests to the models of `service`.

    Args:
        service: the models.
        access: API key and size limits.
        log: access log.
        lifespan: startup and shutdown of the application, if its server does not start the service itself.
    """
    return _Http(service, access, log).app(lifespan)


class _Http:
    def __init__(self, service: Service, access: Access, log: AccessLog):
        self._service, self._access, self._log = service, access, log

    def app(self, lifespan: Lifespan | None) -> Starlette:
        model = "/v2/models/{name}"
        routes = []
        for path in (model, f"{model}/versions/{{version}}"):
            routes += [
                self._route("POST", f"{path}/infer", self._infer),
                self._route("POST", f"{path}/image", self._image),
                self._route("GET", path, self._model),
                self._route("GET", f"{path}/ready", self._model_ready),
            ]
        routes += [
            self._route("GET", "/v2/health/live", self._live, open_to_all=True),
            self._route("GET", "/v2/health/ready", self._ready, open_to_all=True),
            self._route("GET", "/v2", self._server),
            self._route("GET", "/v2/models", self._models),
            self._route("GET", f"{model}/shadow", self._shadow),
            self._route("POST", "/v2/repository/index", self._index),
            self._route("GET", "/metrics", self._metrics),
        ]
        openai = OpenAi(self._service, self._access, self._body, self._note)
        routes += [self._route(method, path, handler) for method, path, handler in openai.handlers()]
        return Starlette(routes=routes, exception_handlers={HTTPException: _no_such_path}, lifespan=lifespan)

    def _route(self, method: str, path: str, handler: Handler, *, open_to_all: bool = False) -> Route:
        async def endpoint(request: HttpRequest) -> Response:
            return await self._answer(request, handler, open_to_all)

        return Route(path, endpoint, methods=[method])

    async def _answer(self, request: HttpRequest, handler: Handler, open_to_all: bool) -> Response:
        """Run a handler, turn exceptions into error objects, and record the request."""
        client = request.client.host if request.client else ""
        record = Record(protocol="http", method=f"{request.method} {request.url.path}", client=client)
        headers = request.headers
        try:
            if not open_to_all:
                self._access.check_key(headers.get("authorization", ""), headers.get("x-api-key", ""))
            response = await handler(request, record)
        except Refusal as refusal:
            record.error = refusal.message
            response = _error(refusal, request.url.path)
        except ClientDisconnect:
            record.error = "the client has gone"
            response = _error(Refusal(400, record.error), request.url.path)
        except Exception:
            logger.exception("%s", record.method)
            record.error = "the server failed; its log says why"
            response = _error(Refusal(500, record.error), request.url.path)
        record.status = response.status_code
        if self._service.leaving:
            response.headers["connection"] = "close"
        if not isinstance(response, EventStream):  # which is noted at its end
            record.bytes_out = len(response.body)
            self._note(record)
        return response

    def _note(self, record: Record) -> None:
        record.note(self._service, self._log)

    async def _infer(self, request: HttpRequest, record: Record) -> Response:
        body = await self._body(request, record)
        header_length = request.headers.get(http_body.HEADER_LENGTH)
        decoded = http_body.decode(body, header_length, max_json=self._access.max_json)
        return await self._inferred(request, record, decoded)

    async def _image(self, request: HttpRequest, record: Record) -> Response:
        name, version = _named(request)
        served = self._service.find(name, version)
        body = await self._body(request, record)
        preprocessing, signature = served.bundle.preprocessing, self._service.signature(served)
        decoded = await asyncio.to_thread(image_request, body, preprocessing, signature, name)
        return await self._inferred(request, record, decoded)

    async def _inferred(self, request: HttpRequest, record: Record, decoded: InferRequest) -> Response:
        record.id = decoded.id
        record.answer = answer = await self._service.infer(*_named(request), decoded)
        content, header_length = http_body.encode(answer, decoded)
        if header_length is None:
            return Response(content, media_type=JSON)
        return Response(content, media_type=BINARY, headers={http_body.HEADER_LENGTH: str(header_length)})

    async def _body(self, request: HttpRequest, record: Record) -> bytes:
        """Return the whole body, or refuse it as soon as it is known to be too long."""
        limit = self._access.max_body
        length = request.headers.get("content-length", "0")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refusal(415, "compressed bodies are not supported")
        chunks, size = [], 0
        if not length.isdecimal() or int(length) > limit:
            raise Refusal(413, f"{length[:20]} bytes are more than {limit}, the most that a request may have")
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise Refusal(413, f"the body has more than {limit} bytes, the most that a request may have")
            chunks.append(chunk)
        record.bytes_in = size
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _live(self, request: HttpRequest, record: Record) -> Response:
        return _json({"live": True})

    async def _ready(self, request: HttpRequest, record: Record) -> Response:
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def _server(self, request: HttpRequest, record: Record) -> Response:
        extensions = ["binary_tensor_data", "model_repository(index)"]
        return _json({"name": "rsi-deploy", "version": rsi_deploy.__version__, "extensions": extensions})

    async def _models(self, request: HttpRequest, record: Record) -> Response:
        return _json({"models": list(self._service.routes)})

    async def _model(self, request: HttpRequest, record: Record) -> Response:
        return _json(self._service.metadata(*_named(request)))

    async def _model_ready(self, request: HttpRequest, record: Record) -> Response:
        name, version = _named(request)
        ready = self._service.can_answer(self._service.find(name, version))
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def _shadow(self, request: HttpRequest, record: Record) -> Response:
        name, _ = _named(request)
        return _json(await self._service.shadow_summary(name))

    async def _index(self, request: HttpRequest, record: Record) -> Response:
        return _json([{**entry, "reason": ""} for entry in self._service.index()])

    async def _metrics(self, request: HttpRequest, record: Record) -> Response:
        self._service.metrics.note_lost_lines(self._log.lost)
        return Response(await self._service.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _named(request: HttpRequest) -> tuple[str, str]:
    """Return name and version of the model in a path; the version is "" if the path has none."""
    parts = request.path_params
    return parts["name"], parts.get("version", "")


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type=JSON)


def _error(refusal: Refusal, path: str) -> Response:
    headers = {"retry-after": str(math.ceil(refusal.retry_after))} if refusal.retry_after else None
    # The message may repeat invalid text of the client (lone surrogates), which orjson refuses.
    message = refusal.message.encode("utf-8", "replace").decode()
    document = error_document(Refusal(refusal.status, message)) if path.startswith(PREFIX) else {"error": message}
    return Response(orjson.dumps(document), refusal.status, headers, media_type=JSON)


async def _no_such_path(request: HttpRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    path = request.url.path
    return _error(Refusal(status, f"{request.method} {path[:200]} is not part of the protocol"), path)
