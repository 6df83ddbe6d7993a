"""Count the parameters of a model: its trained or quantized numbers, wherever they are stored.

    float constant         counts                          initializer or Constant; graph, subgraph or function
    integer constant       counts where it is a weight     an operand of QLinearConv, MatMulNBits, DequantizeLinear, ...
                           or a table                      what a computed index selects from (Gather)
    scale, zero point      does not count                  they describe how quantized numbers are stored
    shape, axis, index     does not count
    unused constant        does not count

A constant counts once for all its users; packed integers count as the numbers that they hold.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import onnx_ir as ir

from graph_passes.cleanup import other_consumers
from graph_passes.constants import layout_chain, stored_tensor
from graph_passes.operators import PASSES, UNSPLIT

Use = tuple[ir.Node, int]
Operands = Mapping[tuple[str, str], tuple[int, ...]]

_TABLES = frozenset({"Gather", "GatherElements", "GatherND"})  # (table, index)
_CONTRIB = "com.microsoft"
_ONE_SCALE = (1, 2, 3, 4)
_TWO_SCALES = (1, 2, 4, 5, 6, 7)

WEIGHTS: Operands = MappingProxyType(
    {
        **{(each.domain, each.op_type): each.operands for each in PASSES},
        **UNSPLIT,
        ("", "DequantizeLinear"): (0,),
        (_CONTRIB, "DequantizeLinear"): (0,),
        ("", "QLinearConv"): (3, 8),
        (_CONTRIB, "QLinearConv"): (3, 8),
        (_CONTRIB, "QGemm"): (3, 6),
        (_CONTRIB, "QLinearAdd"): (0, 3),
        (_CONTRIB, "QLinearMul"): (0, 3),
        (_CONTRIB, "QEmbedLayerNormalization"): (2, 3, 4, 5, 6),
        (_CONTRIB, "QMoE"): (2, 5, 8),
    }
)
"""(domain, operator) -> operands in which an integer constant is a weight, a table or a bias."""

STORAGE: Operands = MappingProxyType(
    {
        ("", "QuantizeLinear"): (1, 2),
        ("", "DequantizeLinear"): (1, 2),
        ("", "QLinearConv"): _TWO_SCALES,
        ("", "QLinearMatMul"): _TWO_SCALES,
        ("", "MatMulInteger"): (2, 3),
        ("", "ConvInteger"): (2, 3),
        ("", "Resize"): (1, 2),
        ("", "Upsample"): (1,),
        (_CONTRIB, "QuantizeLinear"): (1, 2),
        (_CONTRIB, "DequantizeLinear"): (1, 2),
        (_CONTRIB, "QLinearConv"): _TWO_SCALES,
        (_CONTRIB, "QGemm"): (1, 2, 4, 5, 7, 8),
        (_CONTRIB, "QLinearAdd"): _TWO_SCALES,
        (_CONTRIB, "QLinearMul"): _TWO_SCALES,
        (_CONTRIB, "QLinearLeakyRelu"): _ONE_SCALE,
        (_CONTRIB, "QLinearSigmoid"): _ONE_SCALE,
        (_CONTRIB, "QLinearSoftmax"): _ONE_SCALE,
        (_CONTRIB, "QLinearAveragePool"): _ONE_SCALE,
        (_CONTRIB, "QLinearGlobalAveragePool"): _ONE_SCALE,
        (_CONTRIB, "MatMulNBits"): (2, 3, 4),
        (_CONTRIB, "MatMulBnb4"): (2,),
        (_CONTRIB, "MatMulIntegerToFloat"): (2, 3, 4, 5),
        (_CONTRIB, "DynamicQuantizeMatMul"): (2, 3),
        (_CONTRIB, "DynamicQuantizeLSTM"): (8, 9, 10, 11),
        (_CONTRIB, "GatherBlockQuantized"): (2, 3),
        (_CONTRIB, "QAttention"): (3, 4, 6, 7),
        (_CONTRIB, "QEmbedLayerNormalization"): tuple(range(8, 18)),
        (_CONTRIB, "QMoE"): (3, 6, 9, 11, 12, 13),
    }
)
"""(domain, operator) -> operands that are no parameters even in floats: scales, zero points, factors of a resize."""


def count_parameters(model: ir.Model) -> int:
    """Return the number of parameters of a model; reads no weight.

    Args:
        model: A model whose graph, subgraphs and functions may hold initializers and Constant nodes.
    """
    return sum(_numbers(value, model) for value in _constants(model))


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every stored constant of the model once."""
    scopes = (model.graph, *(function.graph for function in model.functions.values()))
    for scope in scopes:
        for graph in (scope, *scope.subgraphs()):
            yield from graph.initializers.values()
        for node in scope.all_nodes():
            if node.op_type == "Constant" and node.domain == "" and node.outputs:
                yield node.outputs[0]


def _numbers(value: ir.Value, model: ir.Model) -> int:
    """Return the number of parameters in a constant."""
    tensor = stored_tensor(value)
    if tensor is None or tensor.dtype in (ir.DataType.STRING, ir.DataType.BOOL):
        return 0
    uses = list(_uses(value, model, set()))
    if tensor.dtype.is_floating_point():
        counts = value.is_graph_output() or not all(map(_is_storage, uses))
        return tensor.size if counts else 0
    return max((_held(use, tensor) for use in uses if _is_weight(use)), default=0)


def _uses(value: ir.Value, model: ir.Model, seen: set[ir.Value]) -> Iterator[Use]:
    """Yield the users of a constant behind layout operators, also inside model functions that take it."""
    if value in seen:
        return
    seen.add(value)
    for node, index in other_consumers(value):
        function = None if node is None else model.functions.get(node.op_identifier())
        if function is not None and index < len(function.inputs):
            yield from _uses(function.inputs[index], model, seen)
        elif node is not None:
            yield node, index


def _is_among(use: Use, operands: Operands) -> bool:
    node, index = use
    return index in operands.get((node.domain, node.op_type), ())


def _is_storage(use: Use) -> bool:
    """Whether a float constant only describes how numbers are stored, also one that a dynamic scale multiplies."""
    node, index = use
    if node.op_type == "Mul" and node.domain == "" and len(node.inputs) == 2:
        other = node.inputs[1 - index]
        producer = None if other is None else other.producer()
        return producer is not None and producer.op_type == "DynamicQuantizeLinear"
    return _is_among(use, STORAGE)


def _is_weight(use: Use) -> bool:
    """Whether an integer constant is used as a weight or a table; a table with a constant index is a shape."""
    node, _ = use
    if node.domain == "" and node.op_type in _TABLES:
        index = node.inputs[1] if len(node.inputs) > 1 else None
        return use[1] == 0 and index is not None and stored_tensor(layout_chain(index)[0]) is None
    return _is_among(use, WEIGHTS)


def _held(use: Use, tensor: ir.TensorProtocol) -> int:
    """Return how many numbers an integer weight holds: several in each byte where its operator packs them."""
    node, attributes = use[0], use[0].attributes
    if node.op_type in ("MatMulNBits", "MatMulBnb4"):  # the last block of a row may be padded
        return attributes.get_int("K", 0) * attributes.get_int("N", 0) or tensor.size
    bits = {"GatherBlockQuantized": "bits", "QMoE": "expert_weight_bits"}.get(node.op_type)
    if bits is None or tensor.dtype.bitwidth != 8:
        return tensor.size
    return tensor.size * 8 // max(attributes.get_int(bits, 4), 1)
