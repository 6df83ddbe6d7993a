"""Constants of a graph: which values are constant, and adding a new one.

initializer | Constant                   stored: `stored_tensor` reads it
Mul(constant, constant) --> value        computed: one walk in graph order finds them all
f(x, constant) { ... argument ... }      an argument for which some call has a constant
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graph_passes.records import Array, Keep, in_memory

OVERRIDABLE_IR_VERSION = 4  # before, every initializer had to be an input, and onnxruntime treats it as constant
INTEGER_CONSTANT_OPSET = 9  # before, a Constant could not hold the shape of a weight
LAYOUT_OPS = frozenset({"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"})
SPREADING_OPS = LAYOUT_OPS | {"CastLike", "Expand"}
_CONSTANT_ATTRIBUTES: Mapping[str, type[np.generic] | None] = MappingProxyType(
    {
        "value": None,
        "value_float": np.float32,
        "value_floats": np.float32,
        "value_int": np.int64,
        "value_ints": np.int64,
    }
)


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node's output; None for other values."""
    if value.is_initializer():
        return value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or producer.domain != "":
        return None
    for name, dtype in _CONSTANT_ATTRIBUTES.items():
        attribute = producer.attributes.get(name)
        if attribute is not None and not attribute.is_ref():
            return attribute.as_tensor() if dtype is None else ir.tensor(np.array(attribute.value, dtype))
    return None  # sparse_value, strings, an attribute of the function


def stored_array(value: ir.Value | None) -> Array | None:
    """Return the array of a small constant (axes, a shape, statistics); None for other values."""
    tensor = None if value is None or value.is_graph_input() else stored_tensor(value)
    return None if tensor is None else tensor.numpy()


def lazily(
    tensor: ir.TensorProtocol, array: Callable[[], Array], shape: Sequence[int] | None = None
) -> ir.TensorProtocol:
    """Return a tensor in the place of another one: in memory, or computed when it is saved if that lies in a file.

    Args:
        tensor: The old tensor, of the same dtype.
        array: Returns the new numbers.
        shape: Their shape; None for that of the old tensor.
    """

    def made() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(array()), dtype=tensor.dtype, name=tensor.name)

    dims = ir.Shape(tensor.shape.numpy() if shape is None else shape)
    is_in_file = isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)
    return ir.LazyTensor(made, tensor.dtype, dims, name=tensor.name) if is_in_file else made()


def set_constant(root: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give a constant other numbers; with another shape, forget the shapes of what layout operators make of it."""
    producer = root.producer()
    if producer is not None:
        producer.attributes.clear()
        producer.attributes.add(ir.AttrTensor("value", tensor))
    if producer is None or root.const_value is not None:
        root.const_value = tensor
    if root.shape is not None and list(root.shape) == list(tensor.shape.numpy()):
        return
    root.shape = ir.Shape(tensor.shape.numpy())
    for value in _laid_out(root):
        value.shape = None


def _laid_out(root: ir.Value) -> Iterator[ir.Value]:
    """Yield what layout operators make of a constant."""
    for user, index in root.uses():
        if index == 0 and is_layout(user):
            yield user.outputs[0]
            yield from _laid_out(user.outputs[0])


def is_layout(node: ir.Node) -> bool:
    """Return whether a node changes only the layout or the dtype of its first operand."""
    return node.domain == "" and node.op_type in LAYOUT_OPS and len(node.inputs) > 0 and len(node.outputs) == 1


def layout_chain(value: ir.Value, operators: frozenset[str] = LAYOUT_OPS) -> tuple[ir.Value, list[ir.Node]]:
    """Follow layout operators (or others) back from a value: return their source and the nodes, the last one first."""
    chain: list[ir.Node] = []
    seen = {value}
    while (producer := value.producer()) is not None and producer.domain == "" and producer.op_type in operators:
        operand = producer.inputs[0] if producer.inputs else None
        if operand is None or operand in seen or len(producer.outputs) > 1:  # seen: a cycle, in a broken model
            break
        chain.append(producer)
        seen.add(operand)
        value = operand
    return value, chain


def is_zeros(value: ir.Value) -> bool:
    """Return whether a value is zero whatever its shape, which is how the torch exporter writes no bias of a Conv.

    Constant 0 --> CastLike --> Expand --> value
    """
    array = stored_array(layout_chain(value, SPREADING_OPS)[0])
    return array is not None and not array.any()


def computed_constants(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Return the values that are computed from stored ones alone; the nodes must be in graph order."""
    computed: set[ir.Value] = set()

    def is_known(operand: ir.Value) -> bool:
        return operand in computed or stored_tensor(operand) is not None

    for node in nodes:
        operands = [operand for operand in node.inputs if operand is not None]
        is_constant = node.op_type == "Constant" and node.domain == ""
        holds_subgraph = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        if is_constant:
            is_computed = stored_tensor(node.outputs[0]) is None
        else:
            is_computed = bool(operands) and not holds_subgraph and all(map(is_known, operands))
        if is_computed:
            computed.update(node.outputs)
    return computed


def constant_arguments(model: ir.Model) -> set[ir.Value]:
    """Return the arguments of model functions for which at least one call has a stored constant."""
    arguments: set[ir.Value] = set()
    if not model.functions:
        return arguments
    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    calls = [
        (node, model.functions[node.op_identifier()])
        for graph in graphs
        for node in graph.all_nodes()
        if node.op_identifier() in model.functions
    ]
    count = -1
    while count != len(arguments):
        count = len(arguments)
        for node, function in calls:
            for operand, argument in zip(node.inputs, function.inputs, strict=False):
                root = None if operand is None else layout_chain(operand)[0]
                if root is not None and (root in arguments or stored_tensor(root) is not None):
                    arguments.add(argument)
    return arguments


def add_constant(array: Array, name: str, before: ir.Node, *, as_node: bool, keep: Keep = in_memory) -> ir.Value:
    """Add a constant to the graph of a node: an initializer, or a Constant node in front of it.

    Args:
        array: Its numbers, in row-major order.
        name: Its name, unused in the whole model.
        before: The node.
        as_node: As a Constant node, for a function, which holds no initializers, and for IR versions before 4, where
            every initializer must be a graph input.
        keep: Stores the numbers.
    """
    tensor = keep(array, name)
    shape = tensor.shape if isinstance(tensor.shape, ir.Shape) else ir.Shape(array.shape)  # one object less a factor
    dtype = ir.TensorType(tensor.dtype)
    if as_node:
        node = ir.Node("", "Constant", (), [ir.AttrTensor("value", tensor)], name=name)
        value = node.outputs[0]
        value.name, value.shape, value.type = name, shape, dtype
        before.prepend(node)
    else:
        value = ir.Value(name=name, shape=shape, type=dtype, const_value=tensor)
        if before.graph is None:
            raise ValueError(f"node {before.name!r} belongs to no graph, so {name!r} has no place")
        before.graph.register_initializer(value)
    return value
