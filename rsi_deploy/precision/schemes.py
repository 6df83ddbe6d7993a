"""Schemes: the ways in which onnxruntime computes a model with fewer bits."""

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["float32", "float16", "static int8", "dynamic int8", "int4 weights", "few bits, float32 products"]
Ranges = Literal["minmax", "percentile", "entropy"]

PRODUCTS = frozenset({"MatMul", "Gemm"})


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a model's weights are stored and its products computed.

    Attributes:
        kind: "float32" as it is; "float16"; "static int8": uint8 activations of calibrated ranges, int8 weights per
            channel, as QDQ; "dynamic int8": products with activations whose range is found at run time, float
            convolutions, int8 embedding tables; "int4 weights": onnxruntime's MatMulNBits; "few bits, float32
            products": weights in few bits that onnxruntime unpacks when it loads the model.
        ranges: how static ranges follow from the calibration data; None for other kinds.
        block: number of inputs that share a scale in "int4 weights".
        is_symmetric: whether static activations are int8 with the zero point 0, and biases stay in float.
        uint8_products: whether static weights of products are uint8 with one scale for the whole weight.
    """

    kind: Kind
    ranges: Ranges | None = None
    block: int = 32
    is_symmetric: bool = False
    uint8_products: bool = False

    @property
    def name(self) -> str:
        """The scheme in words."""
        if self.ranges is not None:
            more = f"{', symmetric' * self.is_symmetric}{', uint8 products' * self.uint8_products}"
            return f"{self.kind} ({self.ranges}{more})"
        return f"{self.kind} (block {self.block})" if self.kind == "int4 weights" else self.kind


FLOAT32 = Scheme(kind="float32")
FLOAT16 = Scheme(kind="float16")
DYNAMIC = Scheme(kind="dynamic int8")
FEW_BITS = Scheme(kind="few bits, float32 products")
WEIGHTS4 = Scheme(kind="int4 weights")


def static(ranges: Ranges) -> Scheme:
    """Return static int8 with these ranges."""
    return Scheme(kind="static int8", ranges=ranges)


def timed_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme whose times a scheme has: few bits are unpacked before the first call, and any ranges do."""
    if scheme is FEW_BITS:
        return FLOAT32
    return scheme if scheme.ranges is None else replace(scheme, ranges="minmax")


def has_bits(scheme: Scheme) -> bool:
    """Return whether the weights of a scheme have bits of their own, site by site."""
    return is_int8(scheme) or scheme is FEW_BITS


def is_int8(scheme: Scheme) -> bool:
    """Return whether products are computed in int8."""
    return scheme.kind in ("static int8", "dynamic int8")
