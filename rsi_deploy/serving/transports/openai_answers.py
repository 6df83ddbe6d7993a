"""Answers in OpenAI's form: in one document, or as a stream of server-sent events."""

import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rsi_deploy.serving.catalog import ServedModel
from rsi_deploy.serving.language.generation import TextPiece
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.transports.common import Record
from rsi_deploy.serving.transports.openai_body import ChatBody, GenerationBody

logger = logging.getLogger(__name__)

GONE = 499
"""Status in the log and the metrics of an answer that the client did not wait for."""


class AnswerForm:
    """The documents of an answer: a completion, or a chat completion.

    Args:
        body: the request.
        served: the model that answers.
    """

    def __init__(self, body: GenerationBody, served: ServedModel):
        self._chat = isinstance(body, ChatBody)
        self._common = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": served.key,
        }

    def whole(self, pieces: list[TextPiece]) -> dict[str, Any]:
        """Return the answer in one document."""
        text, last = "".join(piece.text for piece in pieces), pieces[-1]
        shown = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **shown, "logprobs": None, "finish_reason": last.finish}
        return {**self._common, "choices": [choice], "usage": _usage(last)}

    async def events(self, first: TextPiece, pieces: AsyncIterator[TextPiece], *, usage: bool) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events."""
        if self._chat:
            yield self._event({"role": "assistant", "content": ""})
        piece: TextPiece | None = first
        while piece is not None:
            last = piece
            if last.text or (last.finish and not self._chat):
                shown = {"content": last.text} if self._chat else last.text
                yield self._event(shown, "" if self._chat else last.finish)
            if last.finish and self._chat:
                yield self._event({}, last.finish)
            piece = await anext(pieces, None)
        if usage:
            yield _event({**self._chunk, "choices": [], "usage": _usage(last)})
        yield b"data: [DONE]\n\n"

    @property
    def _chunk(self) -> dict[str, Any]:
        return self._common | ({"object": "chat.completion.chunk"} if self._chat else {})

    def _event(self, shown: Any, finish: str = "") -> bytes:
        choice = {"index": 0, "delta" if self._chat else "text": shown, "logprobs": None}
        return _event({**self._chunk, "choices": [{**choice, "finish_reason": finish or None}]})


class EventStream:
    """A stream of events. The generation stops, and the request is noted, when it ends or the client has gone.

    Args:
        events: the events.
        pieces: the generation that they come from.
        record: the request.
        note: function that counts and logs it.

    Attributes:
        status_code: HTTP status, if nothing fails later.
        headers: headers of the response.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        pieces: AsyncGenerator[TextPiece],
        record: Record,
        note: Callable[[Record], None],
    ):
        headers = {"cache-control": "no-cache"}
        self._response = StreamingResponse(self._sent(events), media_type="text/event-stream", headers=headers)
        self.status_code, self.headers = 200, self._response.headers
        self._pieces, self._record, self._note, self._complete = pieces, record, note, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await self._response(scope, receive, send)
        finally:
            if not self._complete:
                self._record.status, self._record.error = GONE, "the client has gone"
            await self._pieces.aclose()
            self._note(self._record)

    async def _sent(self, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        record = self._record
        try:
            async for event in events:
                record.bytes_out += len(event)
                yield event
        except Refusal as refusal:  # the worker died
            record.status, record.error = refusal.status, refusal.message
            yield _event(error_document(refusal))
        except Exception:
            logger.exception("%s", record.method)
            record.status, record.error = 500, "the server failed; its log says why"
            yield _event(error_document(Refusal(500, record.error)))
        self._complete = True


def error_document(refusal: Refusal) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": None}}


def _usage(last: TextPiece) -> dict[str, int]:
    counts = {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.tokens}
    return {**counts, "total_tokens": last.prompt_tokens + last.tokens}


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"
