"""Whether a graph makes more than it may out of what is stored in it: a kilobyte can declare a gigabyte.

    ConstantOfShape([2^30])             evaluated by a runtime when it loads the model, before anything is run
    Tile(x, [1000]), three in a row     the same in steps; also Expand, Pad, Resize, Range, OneHot, Concat(x, x), ...
    f(x) = g(g(x)), g(x) = h(h(x))      the same through local functions

Shapes are followed as lower bounds, and only where they are certain: a dimension that is not known counts as 1, a
value of unknown shape is passed over. So no model is refused for what it might do, only for what it surely does: more
than `MADE_NUMBERS` in one value, and more than `MADE_RATIO` for each number that is stored in it or fed to it.
"""

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import EXPANDED_NODES, MADE_NUMBERS, MADE_RATIO, called, shown
from rsi_deploy.io.onnx_checks.names import FunctionKey, functions_of
from rsi_deploy.io.onnx_checks.parts import all_tensors, subgraphs
from rsi_deploy.io.onnx_checks.sizes import INTEGERS, SHAPES, SMALL, Known, Shape, attributes, small

GENERATORS = frozenset(
    ("ConstantOfShape", "Expand", "EyeLike", "OneHot", "RandomNormal", "RandomUniform", "Range", "Tile")
)
"""Operators that may be evaluated when a model is loaded, and whose outputs are then all there at once."""

_LONGEST = 1 << 63


def check_growth(model: ModelProto, name: str) -> None:
    """Follow the sizes of all values through the model.

    Args:
        model: whose tensors, names and nodes have been checked.
        name: of its file, for messages.

    Raises:
        ModelError: names the node and how many numbers it makes of how many.
    """
    stored = sum(math.prod(tensor.dims) for tensor in all_tensors(model))
    fed = 0
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in initializers and (shape := _declared(value)) is not None:
            size = math.prod(shape)
            if size > MADE_NUMBERS:
                raise ModelError(
                    f"{name}: input {shown(value.name)} is declared with {size} numbers; up to {MADE_NUMBERS} are "
                    "read: export the model with a smaller or a dynamic shape"
                )
            fed += size
    walk = _Walk(name=name, most=max(MADE_NUMBERS, MADE_RATIO * (stored + fed)), functions=functions_of(model))
    scope = _Scope()
    for value in model.graph.input:
        scope.shapes[value.name] = _declared(value)
    walk.graph(model.graph.node, model.graph.initializer, scope)


@dataclass(kw_only=True)
class _Scope:
    """What is known of the values that a graph sees: shapes, and small integers."""

    shapes: MutableMapping[str, Shape | None] = field(default_factory=dict)
    numbers: MutableMapping[str, tuple[float, ...]] = field(default_factory=dict)

    def inner(self) -> "_Scope":
        """One that sees this one and leaves it alone."""
        return _Scope(shapes=ChainMap({}, self.shapes), numbers=ChainMap({}, self.numbers))


@dataclass(kw_only=True)
class _Walk:
    """One walk through a model.

    Attributes:
        name: of the file.
        most: numbers that one value may have.
        functions: that may be called.
        visited: nodes so far.
        made: numbers so far that came out of generators, which are evaluated when a model is loaded.
    """

    name: str
    most: int
    functions: Mapping[FunctionKey, FunctionProto]
    visited: int = 0
    made: int = 0

    def graph(self, nodes: Iterable[NodeProto], initializers: Iterable[TensorProto], scope: _Scope) -> None:
        """All nodes in their order, with what stands before them."""
        for tensor in initializers:
            scope.shapes[tensor.name] = tuple(tensor.dims)
            if (numbers := small(tensor)) is not None:
                scope.numbers[tensor.name] = numbers
        for node in nodes:
            self.visited += 1
            if self.visited > EXPANDED_NODES:
                raise ModelError(f"{self.name}: more than {EXPANDED_NODES} nodes; so many are not read")
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
            given=attributes(node),
        )
        try:
            shape = SHAPES[node.op_type](known) if node.op_type in SHAPES else None
            numbers = INTEGERS[node.op_type](known) if node.op_type in INTEGERS else None
        except (ArithmeticError, IndexError, LookupError, TypeError, ValueError):  # nonsense, which a runtime refuses
            return
        if numbers is not None and len(numbers) <= SMALL and all(-_LONGEST < n < _LONGEST for n in numbers):
            scope.numbers[node.output[0]] = numbers
        if shape is not None:
            self._check(node, shape)
            scope.shapes[node.output[0]] = shape

    def _call(self, node: NodeProto, function: FunctionProto, scope: _Scope) -> None:
        """What a local function makes of these arguments."""
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
            self.made += max(size, 0)
        if size > self.most or self.made > 4 * self.most:
            raise ModelError(
                f"{self.name}: node {called(node)} makes {size} numbers out of little, more than a file of this size "
                f"may ({self.most} at once, four times that in all); have the caller feed them as an input"
            )


def _declared(value: ValueInfoProto) -> Shape | None:
    """The declared shape of an input, dynamic dimensions as 1; None where it has none."""
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(max(dim.dim_value, 1) for dim in value.type.tensor_type.shape.dim)
