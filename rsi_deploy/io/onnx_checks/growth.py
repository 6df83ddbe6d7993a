"""Refuse graphs that generate far more data than they store: a kilobyte can declare a gigabyte.

    ConstantOfShape([2^30])             a runtime evaluates this when it loads the model
    Tile(x, [1000]), three in a row     grows in steps; also Expand, Pad, Resize, Range, OneHot, Concat(x, x), ...
    f(x) = g(g(x)), g(x) = h(h(x))      grows through local functions

Shapes are tracked as lower bounds: an unknown dimension counts as 1, and a value of unknown shape is skipped. So a
model is refused only if one value certainly has more than `GENERATED_NUMBERS` numbers and more than `GENERATED_RATIO`
for each number that is stored in the model or fed to it.
"""

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.types import Shape
from rsi_deploy.io.limits import EXPANDED_NODES, GENERATED_NUMBERS, GENERATED_RATIO, describe_node, quoted_name
from rsi_deploy.io.onnx_checks.names import FunctionKey, functions_of
from rsi_deploy.io.onnx_checks.parts import all_tensors, subgraphs
from rsi_deploy.io.onnx_checks.sizes import INTEGERS, SHAPES, SMALL, Known, attributes, small_numbers

GENERATORS = frozenset(
    ("ConstantOfShape", "Expand", "EyeLike", "OneHot", "RandomNormal", "RandomUniform", "Range", "Tile")
)
"""Operators that a runtime may evaluate when it loads a model, so that all their outputs exist at once."""

_LIMIT = 1 << 63


def check_growth(model: ModelProto, name: str) -> None:
    """Track the sizes of all values through the model.

    Args:
        model: model whose tensors, names and nodes have been checked.
        name: file name for messages.

    Raises:
        ModelError: A value is too large; the message names its node and size.
    """
    stored = sum(math.prod(tensor.dims) for tensor in all_tensors(model))
    fed = 0
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in initializers and (shape := _declared(value)) is not None:
            size = math.prod(shape)
            if size > GENERATED_NUMBERS:
                raise ModelError(
                    f"{name}: input {quoted_name(value.name)} is declared with {size} numbers",
                    hint=f"up to {GENERATED_NUMBERS} are read: export the model with a smaller or a dynamic shape",
                )
            fed += size
    walk = _Walk(
        name=name, most=max(GENERATED_NUMBERS, GENERATED_RATIO * (stored + fed)), functions=functions_of(model)
    )
    scope = _Scope()
    for value in model.graph.input:
        scope.shapes[value.name] = _declared(value)
    walk.graph(model.graph.node, model.graph.initializer, scope)


@dataclass(kw_only=True)
class _Scope:
    """Shapes and small integer values that are known in a graph."""

    shapes: MutableMapping[str, Shape | None] = field(default_factory=dict)
    numbers: MutableMapping[str, tuple[float, ...]] = field(default_factory=dict)

    def inner(self) -> "_Scope":
        """Return a scope for a subgraph, which reads this scope and does not change it."""
        return _Scope(shapes=ChainMap({}, self.shapes), numbers=ChainMap({}, self.numbers))


@dataclass(kw_only=True)
class _Walk:
    """The state of one pass over a model.

    Attributes:
        name: file name.
        most: numbers that one value may have.
        functions: local functions of the model.
        visited: number of nodes visited so far.
        generated: numbers that generators have produced so far; a runtime evaluates them when it loads the model.
    """

    name: str
    most: int
    functions: Mapping[FunctionKey, FunctionProto]
    visited: int = 0
    generated: int = 0

    def graph(self, nodes: Iterable[NodeProto], initializers: Iterable[TensorProto], scope: _Scope) -> None:
        """Visit the nodes in order; `scope` holds what is known before them."""
        for tensor in initializers:
            scope.shapes[tensor.name] = tuple(tensor.dims)
            if (numbers := small_numbers(tensor)) is not None:
                scope.numbers[tensor.name] = numbers
        for node in nodes:
            self.visited += 1
            if self.visited > EXPANDED_NODES:
                raise ModelError(
                    f"{self.name}: more than {EXPANDED_NODES} nodes once functions are inlined",
                    hint="export a smaller model",
                )
            self._node(node, scope)

    def _node(self, node: NodeProto, scope: _Scope) -> None:
        function = self.functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            self._call(node, function, scope)
            return
        for graph in subgraphs(node):
            inner = scope.inner()
            for value in graph.input:
                inner.shapes[value.name] = None
            self.graph(graph.node, graph.initializer, inner)
        if node.domain not in ("", "ai.onnx") or not node.output:
            return
        known = Known(
            shapes=[scope.shapes.get(each) if each else None for each in node.input],
            numbers=[scope.numbers.get(each) if each else None for each in node.input],
            attributes=attributes(node),
        )
        try:
            shape = SHAPES[node.op_type](known) if node.op_type in SHAPES else None
            numbers = INTEGERS[node.op_type](known) if node.op_type in INTEGERS else None
        except (
            ArithmeticError,
            IndexError,
            LookupError,
            TypeError,
            ValueError,
        ):  # an invalid node, which a runtime refuses
            return
        if numbers is not None and len(numbers) <= SMALL and all(-_LIMIT < n < _LIMIT for n in numbers):
            scope.numbers[node.output[0]] = numbers
        if shape is not None:
            self._check(node, shape)
            scope.shapes[node.output[0]] = shape

    def _call(self, node: NodeProto, function: FunctionProto, scope: _Scope) -> None:
        """Visit the body of a local function with the arguments of this call."""
        inner = _Scope()
        for formal, actual in zip(function.input, node.input, strict=False):
            inner.shapes[formal] = scope.shapes.get(actual)
            if actual in scope.numbers:
                inner.numbers[formal] = scope.numbers[actual]
        self.graph(function.node, (), inner)
        for formal, actual in zip(function.output, node.output, strict=False):
            scope.shapes[actual] = inner.shapes.get(formal)
            if formal in inner.numbers:
                scope.numbers[actual] = inner.numbers[formal]

    def _check(self, node: NodeProto, shape: Shape) -> None:
        size = math.prod(shape)
        if node.op_type in GENERATORS:
            self.generated += max(size, 0)
        if size > self.most or self.generated > 4 * self.most:
            raise ModelError(
                f"{self.name}: node {describe_node(node)} generates {size} numbers, more than a file of this size "
                f"may ({self.most} in one value, four times that in all)",
                hint="make them an input of the model",
            )


def _declared(value: ValueInfoProto) -> Shape | None:
    """Return the declared shape of an input with dynamic dimensions as 1, or None if it has none."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
