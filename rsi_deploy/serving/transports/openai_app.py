"""OpenAI's protocol over HTTP, for models that read text.

    GET  /v1/models   /v1/models/NAME
    POST /v1/completions                 a decoder continues a text
    POST /v1/chat/completions            a decoder answers messages, through the folder's chat template
    POST /v1/embeddings                  an encoder's vectors of texts

`model` is NAME or NAME:VERSION. With `"stream": true` the answer is a stream of server-sent events, which ends with
`data: [DONE]`. A refused request gets `{"error": {"message": "...", "type": "..."}}`.
"""

import asyncio
import base64
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rsi_deploy.serving.catalog import ServedModel
from rsi_deploy.serving.language.generation import TextPiece
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferResponse, RunResult
from rsi_deploy.serving.service import Service
from rsi_deploy.serving.transports.common import Access, Record
from rsi_deploy.serving.transports.openai_answers import GONE, AnswerForm, EventStream
from rsi_deploy.serving.transports.openai_body import (
    ChatBody,
    CompletionBody,
    EmbeddingsBody,
    GenerationBody,
    decode,
)

Handler = Callable[[HttpRequest, Record], Awaitable[Response | EventStream]]
ReadBody = Callable[[HttpRequest, Record], Awaitable[bytes]]
Value = TypeVar("Value")
PREFIX = "/v1/"


class OpenAi:
    """The handlers of OpenAI's paths.

    Args:
        service: the models.
        access: size limits.
        read_body: function that returns the body of a request.
        note: function that counts and logs a request whose stream has ended.
    """

    def __init__(self, service: Service, access: Access, read_body: ReadBody, note: Callable[[Record], None]):
        self._service, self._access, self._read_body, self._note = service, access, read_body, note

    def handlers(self) -> list[tuple[str, str, Handler]]:
        """Return method, path and function of each handler."""
        return [
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name}", self._model),
            ("POST", "/v1/completions", functools.partial(self._generate, CompletionBody)),
            ("POST", "/v1/chat/completions", functools.partial(self._generate, ChatBody)),
            ("POST", "/v1/embeddings", self._embed),
        ]

    async def _models(self, request: HttpRequest, record: Record) -> Response:
        models = [route.versions[route.main] for route in self._service.routes.values()]
        data = [_card(served) for served in models if served.bundle.kind != "tensors"]
        return _json({"object": "list", "data": data})

    async def _model(self, request: HttpRequest, record: Record) -> Response:
        return _json(_card(self._service.find(request.path_params["name"], "")))

    async def _embed(self, request: HttpRequest, record: Record) -> Response:
        body = decode(EmbeddingsBody, await self._read_body(request, record), max_json=self._access.max_json)
        vectors, tokens, record.answer = await self._service.embed(*body.name_and_version, body.texts)
        if body.encoding_format == "base64":
            values: list[Any] = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        else:
            values = list(vectors)
        data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _json({"object": "list", "data": data, "model": body.model, "usage": usage})

    async def _generate(
        self, kind: type[GenerationBody], request: HttpRequest, record: Record
    ) -> Response | EventStream:
        body = decode(kind, await self._read_body(request, record), max_json=self._access.max_json)
        wanted = body.request(most=self._access.max_tokens)
        served = self._service.generator(*body.name_and_version)

        def on_end(ran: RunResult) -> None:
            name, version = served.name, served.version
            record.answer = InferResponse(
                name=name, version=version, outputs={}, waited=ran.waited, ran=ran.ran, rows=1
            )

        pieces = self._service.generate(served, wanted, on_end)
        form = AnswerForm(body, served)
        if not body.stream:
            return _json(form.whole(await _unless_gone(request, _collect(pieces))))
        first = await _unless_gone(request, anext(pieces))  # a refusal has its own status
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(form.events(first, pieces, usage=usage), pieces, record, self._note)


async def _collect(pieces: AsyncIterator[TextPiece]) -> list[TextPiece]:
    return [piece async for piece in pieces]


async def _unless_gone(request: HttpRequest, work: Coroutine[Any, Any, Value]) -> Value:
    """Return the result of `work`, which is cancelled when the client closes its connection.

    Raises:
        Refusal: 499, the client has gone.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refusal(GONE, "the client has gone")
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _card(served: ServedModel) -> dict[str, Any]:
    created = max((stamp[3] for stamp in served.bundle.stamps), default=0) // 1_000_000_000
    return {"id": served.name, "object": "model", "created": created, "owned_by": "rsi-deploy"}


def _json(document: dict[str, Any]) -> Response:
    return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
