"""What the survey asks of a split pass."""

from __future__ import annotations

from typing import Protocol

import onnx_ir as ir

from graph_passes.records import Form
from graph_passes.weights import NoWeight, Weight
from graph_passes.window import Window


class Family(Protocol):
    """One operator: where its weight stands, and how it turns."""

    @property
    def domain(self) -> str:
        """The operator's domain."""

    @property
    def op_type(self) -> str:
        """The operator."""

    @property
    def operands(self) -> tuple[int, ...]:
        """Inputs where the weight may stand, likeliest first."""

    def canonical(self, node: ir.Node, operand: int, weight: Weight, /) -> Weight | NoWeight:
        """The operand turned to `(groups, out, in)`, or why it cannot be."""

    def forms(self, shape: tuple[int, ...], /) -> tuple[Form, ...]:
        """The forms that a weight of this shape can take, the default first."""

    def window(self, node: ir.Node, shape: tuple[int, ...], /) -> Window | None:
        """How a convolution moves over its data."""

    def is_plain(self, node: ir.Node, operand: int, weight: Weight, /) -> bool:
        """Whether the response is `data @ weight^T` over the last axis, or the ordinary convolution."""
