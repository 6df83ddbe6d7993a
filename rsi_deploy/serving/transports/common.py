"""What both transports share: the API key, the size limits, and the record of a request for metrics and log."""

import hmac
import time
from dataclasses import dataclass, field

from rsi_deploy.serving.access_log import AccessLog
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferResponse
from rsi_deploy.serving.service import Service

MAX_LOGGED = 200


@dataclass(frozen=True, kw_only=True)
class Access:
    """The API key and the size limits of requests.

    Attributes:
        api_key: key that every request but health must have; "" requires none.
        max_body: most bytes of a request.
        max_json: most bytes of JSON in a request.
        max_tokens: most tokens that a request may generate.
    """

    api_key: str = ""
    max_body: int = 64 << 20
    max_json: int = 8 << 20
    max_tokens: int = 1024

    def check_key(self, authorization: str, api_key: str) -> None:
        """Check the key of a request.

        Args:
            authorization: value of the header `Authorization: Bearer KEY`, or "".
            api_key: value of the header `X-API-Key: KEY`, or "".

        Raises:
            Refusal: 401, the key is missing or wrong.
        """
        if not self.api_key:
            return
        scheme, _, bearer = authorization.partition(" ")
        came = api_key or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not hmac.compare_digest(came.encode(), self.api_key.encode()):
            raise Refusal(401, "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")


@dataclass(kw_only=True)
class Record:
    """The facts about one request that go into metrics and the access log when it ends.

    Attributes:
        protocol: "http" or "grpc".
        method: HTTP method and path, or gRPC method.
        client: address of the client.
        bytes_in, bytes_out: sizes of request and answer.
        id: identifier from the request, or "".
        status: HTTP status.
        answer: the model's answer, or None.
        error: error message, or "".
        started: time of arrival, by `time.perf_counter`.
    """

    protocol: str
    method: str
    client: str
    bytes_in: int = 0
    bytes_out: int = 0
    id: str = ""
    status: int = 500
    answer: InferResponse | None = None
    error: str = ""
    started: float = field(default_factory=time.perf_counter)

    def note(self, service: Service, log: AccessLog) -> None:
        """Add the request to the metrics and to the log."""
        seconds, answer = time.perf_counter() - self.started, self.answer
        name, version = (answer.name, answer.version) if answer else ("", "")
        waited = answer.waited if answer else None
        service.metrics.note_request(name, version, self.protocol, self.status, seconds=seconds, waited=waited)
        entry = {
            "protocol": self.protocol,
            "client": self.client,
            "what": self.method[:MAX_LOGGED],
            "status": self.status,
            "ms": round(1e3 * seconds, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        if self.id:
            entry["id"] = self.id[:MAX_LOGGED]
        if answer:
            entry |= {"model": name, "version": version, "batch_rows": answer.rows}
            entry |= {"queue_ms": round(1e3 * answer.waited, 3), "batch_ms": round(1e3 * answer.ran, 3)}
        if self.error:
            entry["error"] = self.error[:MAX_LOGGED]
        log.note(**entry)
