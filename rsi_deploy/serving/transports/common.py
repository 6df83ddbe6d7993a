"""What both transports do around a request: who may ask, how much they may send, and what is written down of it."""

import hmac
import time
from dataclasses import dataclass, field

from rsi_deploy.serving.access_log import AccessLog
from rsi_deploy.serving.protocol.refusal import Refusal
from rsi_deploy.serving.protocol.requests import InferResponse
from rsi_deploy.serving.service import Service

LONGEST_LOGGED = 200


@dataclass(frozen=True, kw_only=True)
class Access:
    """The rules of a transport.

    Attributes:
        api_key: that must come with everything but health; "" asks for none.
        max_body: bytes of a request.
        max_json: bytes of JSON in it.
    """

    api_key: str = ""
    max_body: int = 64 << 20
    max_json: int = 8 << 20

    def check_key(self, authorization: str, api_key: str) -> None:
        """Refuse what does not bring the key.

        Args:
            authorization: header `Authorization: Bearer KEY`, or "".
            api_key: header `X-API-Key: KEY`, or "".

        Raises:
            Refusal: 401.
        """
        if not self.api_key:
            return
        scheme, _, bearer = authorization.partition(" ")
        came = api_key or (bearer.strip() if scheme.lower() == "bearer" else "")
        if not hmac.compare_digest(came.encode(), self.api_key.encode()):
            raise Refusal(401, "an API key is needed: Authorization: Bearer KEY, or X-API-Key: KEY")


@dataclass(kw_only=True)
class Record:
    """One request on its way, and what is noted of it when it ends."""

    protocol: str
    what: str
    client: str
    bytes_in: int = 0
    bytes_out: int = 0
    id: str = ""
    status: int = 500
    answer: InferResponse | None = None
    error: str = ""
    started: float = field(default_factory=time.perf_counter)

    def note(self, service: Service, log: AccessLog) -> None:
        """Count it and log it."""
        seconds, answer = time.perf_counter() - self.started, self.answer
        name, version = (answer.name, answer.version) if answer else ("", "")
        waited = answer.waited if answer else None
        service.metrics.note_request(name, version, self.protocol, self.status, seconds=seconds, waited=waited)
        entry = {
            "protocol": self.protocol,
            "client": self.client,
            "what": self.what[:LONGEST_LOGGED],
            "status": self.status,
            "ms": round(1e3 * seconds, 3),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        if self.id:
            entry["id"] = self.id[:LONGEST_LOGGED]
        if answer:
            entry |= {"model": name, "version": version, "batch_rows": answer.rows}
            entry |= {"queue_ms": round(1e3 * answer.waited, 3), "batch_ms": round(1e3 * answer.ran, 3)}
        if self.error:
            entry["error"] = self.error[:LONGEST_LOGGED]
        log.note(**entry)
