"""One executed node, the argument of a formula of multiply-accumulates (MACs), and the results of a formula."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

Shape: TypeAlias = tuple[int, ...]
Operator: TypeAlias = tuple[str, str]
"""Domain and op type; the domain of ONNX itself is ""."""


@dataclass(frozen=True, kw_only=True)
class ExecutedNode:
    """The shapes of one execution of a node, with its attributes.

    Attributes:
        domain: Domain of the operator; "" is ONNX itself.
        op_type: Name of the operator.
        inputs: Shape of every input by its position in the operator; None for an optional input that is absent.
        outputs: Shapes of the outputs in the same way.
        attributes: Attributes of the node by name; tensors and graphs may be left out.
    """

    domain: str
    op_type: str
    inputs: tuple[Shape | None, ...]
    outputs: tuple[Shape | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def input(self, position: int) -> Shape:
        """Return the shape of an input that must be there.

        Raises:
            LookupError: It is absent, and the node is not counted.
        """
        shape = self.find(position)
        if shape is None:
            raise LookupError(f"{self.op_type} has no input {position}; expected a tensor there")
        return shape

    def find(self, position: int) -> Shape | None:
        """Return the shape of an input, or None where it is absent."""
        return self.inputs[position] if position < len(self.inputs) else None

    @property
    def output(self) -> Shape:
        """The shape of the first output that is there."""
        return next(shape for shape in self.outputs if shape is not None)

    @property
    def output_size(self) -> int:
        """The number of elements in the first output."""
        return math.prod(self.output)

    def flag(self, name: str) -> bool:
        """Return whether an integer attribute is there and not 0."""
        return bool(self.attributes.get(name, 0))


class Macs(NamedTuple):
    """Multiply-accumulates of one execution.

    Attributes:
        product: MACs of products with an operand that may be a weight, which a factorization changes.
        attention: MACs of scores and mixture inside the node, which multiply activations only.
    """

    product: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """The sum of both."""
        return self.product + self.attention


@dataclass(frozen=True)
class NotCounted:
    """The reason why the MACs of a node are not known."""

    reason: str


Formula: TypeAlias = Callable[[ExecutedNode], Macs]
