"""The precision section of a report: the delivered model among all that were compared."""

import pydantic

from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.core.types import Interval


class PrecisionPoint(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A model that might be delivered.

    Attributes:
        name: name for users, such as "onnxruntime's static int8 (minmax)" or "low rank, dynamic int8".
        scheme: name of its `Scheme`.
        is_rival: whether it is the dense model as onnxruntime's own tools quantize it.
        is_delivered: whether it is the one that is delivered.
        keeps_limit: whether it keeps the budget or limit of the request.
        bytes: bytes of its files; None where it could not be made.
        quality: its outputs on the check part; None where it could not be made, or where they are not finite.
        speedup: time of the dense model over its own, of one interleaved run; None where nothing was measured.
        speedup_interval: 99 % interval of `speedup`.
        error: message of onnxruntime where it could not be made; "" otherwise.
    """

    name: str
    scheme: str
    is_rival: bool
    is_delivered: bool = False
    keeps_limit: bool = True
    bytes: int | None = None
    quality: OutputQuality | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None
    error: str = ""


class PrecisionRecord(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The choice of a precision.

    Attributes:
        request: value of `--precision`.
        target: value of `--target`; "" without one.
        scheme: name of the delivered model's `Scheme`.
        rule: why the delivered model was chosen, in words.
        points: all models that were compared, the dense float32 one first.
        bits: name of a site -> bits in which its weight is stored, where the plan decided.
        tables: name of an embedding table -> bits in which it is stored, where the plan decided.
        in_float: names of sites that the delivered model computes in float32 all the same.
        repairs: name of a site -> rank of the low-rank repair of its weight.
        operators: operator -> number of nodes that onnxruntime runs of the delivered model, after its optimizations.
    """

    request: str
    target: str = ""
    scheme: str
    rule: str
    points: tuple[PrecisionPoint, ...]
    bits: dict[str, int] = {}
    tables: dict[str, int] = {}
    in_float: tuple[str, ...] = ()
    repairs: dict[str, int] = {}
    operators: dict[str, int] = {}

    @property
    def delivered(self) -> PrecisionPoint:
        """The point that is delivered."""
        return next(point for point in self.points if point.is_delivered)
