"""Schemes: the ways in which onnxruntime computes a model with fewer bits."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Kind = Literal["float32", "float16", "static int8", "dynamic int8", "int4 weights"]
Ranges = Literal["minmax", "percentile", "entropy"]

CONVOLUTIONS = frozenset({"Conv"})
PRODUCTS = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model's weights are stored and its products computed.

    Attributes:
        kind: "float32" as it is; "float16"; "static int8": uint8 activations of calibrated ranges, int8 weights per
            channel, as QDQ; "dynamic int8": products with activations whose range is found at run time, float
            convolutions, int8 embedding tables; "int4 weights": onnxruntime's MatMulNBits.
        ranges: how static ranges follow from the calibration data; None for other kinds.
        block: number of inputs that share a scale in "int4 weights".
    """

    kind: Kind
    ranges: Ranges | None = None
    block: int = 32

    @property
    def name(self) -> str:
        """The scheme in words."""
        if self.ranges is not None:
            return f"{self.kind} ({self.ranges})"
        return f"{self.kind} (block {self.block})" if self.kind == "int4 weights" else self.kind


FLOAT32 = Scheme(kind="float32")
FLOAT16 = Scheme(kind="float16")
DYNAMIC = Scheme(kind="dynamic int8")
WEIGHTS4 = Scheme(kind="int4 weights")


def static(ranges: Ranges) -> Scheme:
    """Return static int8 with these ranges."""
    return Scheme(kind="static int8", ranges=ranges)


def rivals(operators: Collection[str], *, provider: str, is_calibrated: bool) -> list[Scheme]:
    """Return the schemes that onnxruntime offers for a dense model.

    Args:
        operators: types of the nodes with weights.
        provider: "cpu", "cuda", ...
        is_calibrated: whether there are data for static ranges.
    """
    found = [FLOAT16] if provider == "cuda" else []
    if is_calibrated:
        found.append(static("minmax"))
    if PRODUCTS & set(operators):
        found += [DYNAMIC, WEIGHTS4]
    return found
