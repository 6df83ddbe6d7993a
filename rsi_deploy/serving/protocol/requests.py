"""A request and its answer, as both transports see them."""

from collections.abc import Mapping
from dataclasses import dataclass

from rsi_deploy.serving.protocol.signature import Feeds, Outputs, Signature


@dataclass(frozen=True, kw_only=True)
class InferRequest:
    """Inputs as they were decoded; whether they fit the model is not yet known.

    Attributes:
        feeds: input name -> array.
        id: to be given back; "" where there was none.
        outputs: name -> whether it is wanted as binary; empty asks for all of them.
        binary: whether outputs that are not named are wanted as binary.
    """

    feeds: Feeds
    id: str = ""
    outputs: Mapping[str, bool]
    binary: bool = False


@dataclass(frozen=True, kw_only=True)
class InferResponse:
    """What a model says to a request.

    Attributes:
        name, version: of the model that has answered.
        signature: of that model.
        outputs: those that were asked for, in that order.
        waited, ran: seconds in the queue and in the batch.
        rows: of the batch.
    """

    name: str
    version: str
    signature: Signature
    outputs: Outputs
    waited: float
    ran: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A request's outputs, and how it ran: seconds in the queue and in its batch, and rows and requests of that."""

    outputs: Outputs
    waited: float
    ran: float
    rows: int
    requests: int
