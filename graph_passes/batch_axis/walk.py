"""Walk through a model node by node, and follow what is known of every value."""

from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from graph_passes.axis_rules.moves import Moves, outputs
from graph_passes.axis_rules.shapes import constant, folded, inferred, of_arrays
from graph_passes.axis_rules.values import MixesError, NodeCall, Value
from graph_passes.batch_axis.control import followed
from graph_passes.batch_axis.numbering import numbered, ranged
from graph_passes.operators import AXIS_RULES

RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
CONTROL = frozenset(("If", "Loop", "Scan"))
OF_SHAPES = frozenset(("ConstantOfShape", "Expand", "Shape", "Size"))
"""Operators whose rules apply to values without samples too."""
MOST_NODES = 200_000
"""Limit of the nodes in one walk, those in functions and turns of loops included."""

_WRITTEN = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}

Scope = ChainMap[str, Value]


class Walk:
    """Follows samples through the graphs and functions of a model.

    Args:
        model: the model, whose weights may be missing.
        sizes: trial sizes of the batch.
        open_shapes: whether the model runs on shapes other than those that are tried.
    """

    def __init__(self, model: onnx.ModelProto, sizes: Sequence[int], *, open_shapes: bool):
        self._functions = {(_domain(each.domain), each.name): each for each in model.functions}
        self._opsets = {_domain(each.domain): each.version for each in model.opset_import}
        self._sizes = tuple(sizes)
        self._open_shapes = open_shapes
        self._steps = 0

    def graph(
        self, graph: onnx.GraphProto, given: Mapping[str, Value], outer: Scope, opsets: Mapping[str, int] | None = None
    ) -> list[Value]:
        """Return the outputs of a graph for the inputs `given`, among the values of the scopes around it.

        Raises:
            MixesError: samples mix.
        """
        stored = {tensor.name: constant(tensor, len(self._sizes)) for tensor in graph.initializer}
        for sparse in graph.sparse_initializer:
            shapes = (tuple(sparse.dims),) * len(self._sizes)
            stored[sparse.values.name] = Value(kind=sparse.values.data_type, shapes=shapes)
        scope = outer.new_child({**stored, **given})
        names = [value.name for value in graph.output]
        self._follow(graph.node, names, scope, self._opsets if opsets is None else opsets, {})
        return [scope[name] for name in names]

    def _follow(
        self,
        nodes: Sequence[onnx.NodeProto],
        names: Sequence[str],
        scope: Scope,
        opsets: Mapping[str, int],
        given: Mapping[str, onnx.AttributeProto],
    ) -> None:
        """Follow the nodes on which `names` depend; `given` has the attributes of the function around them."""
        for node in _needed(nodes, names):
            self._steps += 1
            call = self._call(_with_attributes(node, given), scope, opsets)
            if self._steps > MOST_NODES:
                raise call.mixes("is one of too many nodes to follow")
            try:
                made = self._outputs(call, scope, opsets)
            except MixesError:
                raise
            except Exception as error:  # any exception of a malformed node: nothing is proved
                raise call.mixes(f"cannot be followed: {type(error).__name__}: {error}"[:200]) from error
            scope.update({name: value for name, value in zip(node.output, made, strict=False) if name})

    def _call(self, node: onnx.NodeProto, scope: Scope, opsets: Mapping[str, int]) -> NodeCall:
        return NodeCall(
            node=node,
            inputs=[scope[name] if name else None for name in node.input],
            opset=opsets.get("", 0),
            sizes=self._sizes,
            attributes={attribute.name: attribute for attribute in node.attribute},
        )

    def _outputs(self, call: NodeCall, scope: Scope, opsets: Mapping[str, int]) -> Sequence[Value]:
        domain, op_type = _domain(call.node.domain), call.node.op_type
        if (function := self._functions.get((domain, op_type))) is not None:
            return self._function(function, call)
        if domain == "" and op_type == "Constant":
            return [self._constant(call)]
        if domain == "" and op_type in CONTROL:

            def body(graph: onnx.GraphProto, values: Sequence[Value]) -> list[Value]:
                names = [value.name for value in graph.input]
                return self.graph(graph, dict(zip(names, values, strict=True)), scope, opsets)

            return followed(call, body, open_shapes=self._open_shapes)
        if op_type in RANDOM:
            raise call.mixes("draws random numbers, for every sample others")
        if any(value is not None and value.rows is not None for value in call.inputs):
            return numbered(call, lambda bare: self._by_rule(bare, domain))
        sampled = any(value is not None and value.place is not None for value in call.inputs)
        if domain == "" and op_type in OF_SHAPES and (sampled or op_type in ("Shape", "Size")):
            return self._by_rule(call, domain)
        return self._by_rule(call, domain) if sampled else self._without_samples(call, domain)

    def _without_samples(self, call: NodeCall, domain: str) -> list[Value]:
        """Return the outputs of a node that no sample reaches: constants and shape arithmetic."""
        counted = any(value is not None and value.counted for value in call.inputs)
        if counted and call.node.op_type in OF_SHAPES:
            made = self._by_rule(call, domain)
            if made[0].place is not None:
                return list(made)
        if domain == "" and call.node.op_type == "Range":
            return [ranged(call)]
        found = inferred(call) if domain == "" else [(0, None)] * len(call.node.output)
        value = folded(call, *found[0]) if found else None
        if value is not None:
            return [value]
        return [Value(kind=kind, shapes=shapes, counted=counted) for kind, shapes in found]

    def _by_rule(self, call: NodeCall, domain: str) -> Sequence[Value]:
        found = AXIS_RULES.get((domain, call.node.op_type))
        if found is None:
            where = f" of {domain}" if domain else ""
            raise call.mixes(f"is an operator{where} that is not known to keep samples apart")
        moves = found(call)
        if isinstance(moves, Moves):
            moves = [moves] * len(call.node.output)
        answers = [answer for answer in moves if isinstance(answer, Value)]
        if answers:
            return answers
        shapes = inferred(call) if domain == "" else [(0, None)] * len(call.node.output)
        made = []
        for index, (answer, (kind, dims)) in enumerate(zip(moves, shapes, strict=True)):
            if not isinstance(answer, Moves) or not call.node.output[index]:
                made.append(Value())
                continue
            if answer.like and dims is None:
                kind, dims = inferred(call, answer.like)[index]
            made.append(outputs(call, answer, index, kind or _kind(call), dims))
        return made

    def _constant(self, call: NodeCall) -> Value:
        attribute = call.node.attribute[0]
        if attribute.type == onnx.AttributeProto.TENSOR:
            return constant(attribute.t, len(self._sizes))
        return _written(call)

    def _function(self, function: onnx.FunctionProto, call: NodeCall) -> list[Value]:
        values = [*call.inputs, *[None] * len(function.input)]
        scope: Scope = ChainMap({name: value or Value() for name, value in zip(function.input, values, strict=False)})
        opsets = {_domain(each.domain): each.version for each in function.opset_import}
        given = {each.name: each for each in function.attribute_proto} | dict(call.attributes)
        self._follow(function.node, list(function.output), scope, opsets, given)
        return [scope[name] for name in function.output]


def _written(call: NodeCall) -> Value:
    """Return a Constant that is a number or a list of numbers."""
    name, attribute = next(iter(call.attributes.items()))
    if name not in _WRITTEN:
        ((kind, shapes),) = inferred(call)
        return Value(kind=kind, shapes=shapes)
    array = np.array(onnx.helper.get_attribute_value(attribute), _WRITTEN[name])
    return of_arrays([array] * len(call.sizes), int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype)))


def _kind(call: NodeCall) -> int:
    """Return the element type of onnxruntime's own operators: float, or that of the input where it is quantized."""
    value = call.value(0)
    kind = onnx.TensorProto.FLOAT if value is None else value.kind
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    if kind in floats or call.node.op_type.startswith(("QLinear", "QGemm", "Nhwc")):
        return kind
    return onnx.TensorProto.FLOAT


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _with_attributes(node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    """Return the node with attributes of the function around it filled in; those without a value are left out."""
    if not any(attribute.ref_attr_name for attribute in node.attribute):
        return node
    filled = onnx.NodeProto()
    filled.CopyFrom(node)
    del filled.attribute[:]
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            filled.attribute.append(attribute)
        elif attribute.ref_attr_name in given:
            added = filled.attribute.add()
            added.CopyFrom(given[attribute.ref_attr_name])
            added.name = attribute.name
    return filled


def _needed(nodes: Sequence[onnx.NodeProto], names: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes, in order, on which `names` depend."""
    wanted, found = set(names), []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(_read(node))
    return found[::-1]


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of the values that a node and its graphs read."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _read(inner)
