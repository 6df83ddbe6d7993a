"""Requests and answers, independent of the transport."""

from collections.abc import Mapping
from dataclasses import dataclass

from rsi_deploy.serving.protocol.signature import Feeds, Outputs


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """A decoded request. Its inputs have not been compared with the model's yet.

    Attributes:
        feeds: input name -> array.
        id: identifier that the answer repeats, or "".
        outputs: requested output -> whether to send it as binary; empty requests all outputs.
        binary: whether to send outputs that are not in `outputs` as binary.
    """

    feeds: Feeds
    id: str = ""
    outputs: Mapping[str, bool]
    binary: bool = False


@dataclass(frozen=True, kw_only=True)
class InferResponse:
    """The answer of a model to a request.

    Attributes:
        name, version: name and version of the model.
        outputs: the requested outputs, in the requested order.
        waited, ran: seconds in the queue and in the batch.
        rows: number of rows of the batch.
    """

    name: str
    version: str
    outputs: Outputs
    waited: float
    ran: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The outputs of a request, its seconds in the queue and in its batch, and the batch's rows and requests."""

    outputs: Outputs
    waited: float
    ran: float
    rows: int
    requests: int
