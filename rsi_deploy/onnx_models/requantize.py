"""Weights in few bits: count the products that use them, and turn them back into float products.

    QLinearConv, QLinearMatMul, QGemm, QLinearAdd, ...  -->  DequantizeLinear --> float operator --> QuantizeLinear
    DynamicQuantizeLinear --> MatMulInteger --> Cast --> Mul(scales)  -->  MatMul
    MatMulNBits, GatherBlockQuantized                   -->  MatMul, Gather
    DequantizeLinear, or Cast and Mul, of stored codes  -->  float weight
    QuantizeLinear --> Reshape, ... --> DequantizeLinear  -->  Reshape, ..., behind a Clip where the codes were a Relu

What fits no pattern stays as it is, with the answers that it had.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.convenience import replace_all_uses_with
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graph_passes.constants import (
    LAYOUT_OPS,
    OVERRIDABLE_IR_VERSION,
    add_constant,
    computed_constants,
    layout_chain,
    stored_tensor,
)
from graph_passes.names import Names, name_of
from graph_passes.operators import find_pass
from rsi_deploy.core.types import Array

PRODUCTS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "GemmFloat8",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QMoE",
    }
)
"""Operators that multiply by weights of few bits."""

SIMPLE = {
    f"QLinear{name}": name
    for name in ("Conv", "MatMul", "Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool", "GlobalAveragePool")
}
"""Operator of codes -> its float operator. Inputs: codes, scale and zero point of each operand, then of the output."""

MOVES = LAYOUT_OPS - {"Cast"} | {"DepthToSpace", "Expand", "Flatten", "Gather", "MaxPool", "Slice", "Tile"}
"""Operators that move or select numbers; a scale may be applied before them or after them."""

UNPACKS = LAYOUT_OPS | {"Add", "DequantizeLinear", "Div", "MatMul", "Mod", "Mul", "Slice", "Sub"}
"""Operators that unpack stored codes."""

AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
NEVER_NEGATIVE = frozenset({"Abs", "Cast", "Clip", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Sqrt"})
"""Operators whose results need no Relu."""

Operand = tuple[ir.Value | None, ir.Value | None, ir.Value | None]
"""Codes, their scale, their zero point."""


def quantized_products(model: ir.Model) -> list[str]:
    """Return the names of the nodes that multiply by a weight of few bits, or multiply two values of few bits."""
    computed = _computed(model)
    return [name_of(node) for node in _nodes(model) if _is_quantized_product(node, computed)]


def quantized_tables(model: ir.Model) -> list[str]:
    """Return the names of the nodes that look up rows of a table of few bits."""
    computed = _computed(model)

    def looks_up(node: ir.Node) -> bool:
        return node.op_type == "Gather" and bool(node.inputs) and _is_few_bits(node.inputs[0], computed)

    return [name_of(node) for node in _nodes(model) if node.op_type == "GatherBlockQuantized" or looks_up(node)]


def dequantize_(model: ir.Model) -> None:
    """Turn weights of few bits into float weights, and operators of codes into float operators, in place.

    The float weights are what the codes stand for. Activations are no longer rounded. Quantizers remove a Relu or
    Clip whose limits the codes of an activation keep; a Clip to the range of the codes takes its place, where that
    range begins or ends at zero.

    Args:
        model: a quantized model; weights are read. Model functions stay as they are.
    """
    work = _Dequantizer(model=model, names=Names(model), computed=_computed(model))
    for node in list(model.graph.all_nodes()):
        work.convert(node)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "DequantizeLinear" and node.graph is not None:
            work.remove(node)
    for node in list(model.graph.all_nodes()):
        if find_pass(node.domain, node.op_type) is not None:
            work.fold_weights(node)
    RemoveUnusedNodesPass()(model)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from graph.all_nodes()


def _computed(model: ir.Model) -> set[ir.Value]:
    """Return the values that are computed from stored ones alone."""
    return computed_constants(_nodes(model))


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that makes a value, if it is of this type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """Return the node that alone reads a value, if it is of this type."""
    readers = [node for node, _ in value.uses()]
    is_alone = len(readers) == 1 and readers[0].op_type == op_type and not value.is_graph_output()
    return readers[0] if is_alone else None


def _is_quantized_product(node: ir.Node, computed: Collection[ir.Value]) -> bool:
    if node.op_type in PRODUCTS:
        return True
    if find_pass(node.domain, node.op_type) is None or node.outputs[0] in computed:
        return False
    roots = [layout_chain(value)[0] for value in node.inputs[:2] if value is not None]
    return any(_is_few_bits(root, computed) for root in roots) or all(
        _producer(root, "DequantizeLinear") for root in roots
    )


def _is_few_bits(value: ir.Value | None, computed: Collection[ir.Value]) -> bool:
    """Return whether a value is a stored tensor of integers of at most 16 bits, or one that is unpacked from such."""
    if value is None:
        return False
    if (tensor := stored_tensor(value)) is not None:
        return tensor.dtype.is_integer() and tensor.dtype.bitwidth <= 16
    node = value.producer() if value in computed else None
    if node is None or node.op_type not in UNPACKS:
        return False
    return any(_is_few_bits(operand, computed) for operand in node.inputs)


def _unpacked(codes: Array, bits: int, axis: int = -1) -> Array:
    """Return the codes that bytes hold along an axis, the lowest bits first."""
    parts = [codes >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    axis %= codes.ndim
    shape = [size * len(parts) if number == axis else size for number, size in enumerate(codes.shape)]
    return np.stack(parts, axis + 1).reshape(shape)


@dataclass(kw_only=True)
class _Dequantizer:
    """Rewrites the nodes of one model.

    Attributes:
        model: the model.
        names: its names.
        computed: values that are computed from stored ones alone.
    """

    model: ir.Model
    names: Names
    computed: Collection[ir.Value]
    _weights: dict[tuple[ir.Value | None, ...], ir.Value] = field(default_factory=dict, init=False)
    _clips: dict[ir.Node, ir.Value] = field(default_factory=dict, init=False)

    # -- operators of codes ---------------------------------------------------------------------------------------

    def convert(self, node: ir.Node) -> None:
        """Replace a node that computes with codes by its float operator, where the pattern is known."""
        values = [*node.inputs, *[None] * (9 - len(node.inputs))]
        first, second = (values[0], values[1], values[2]), (values[3], values[4], values[5])
        match node.op_type:
            case "QLinearConv" | "QLinearMatMul" | "QLinearAdd" | "QLinearMul":
                self._convert_simple(node, SIMPLE[node.op_type], [first, second], values[6:8], values[8])
            case "QGemm":
                self._convert_simple(node, "Gemm", [first, second], values[7:9], values[6])
            case "QLinearConcat":
                parts = iter(node.inputs[2:])
                operands = list(zip(parts, parts, parts, strict=True))
                self._convert_simple(node, "Concat", operands, values[:2])
            case op_type if op_type in SIMPLE and node.attributes.get_int("opset", 13) >= 13:
                self._convert_simple(node, SIMPLE[op_type], [first], values[3:5])
            case "MatMulInteger" | "ConvInteger":
                self._convert_integer(node, values)
            case "MatMulNBits":
                self._convert_blocks(node, values)
            case "GatherBlockQuantized":
                self._convert_table(node, values)

    def _convert_simple(
        self,
        node: ir.Node,
        op_type: str,
        operands: Sequence[Operand],
        output: Sequence[ir.Value | None],
        bias: ir.Value | None = None,
    ) -> None:
        """Replace a node by DequantizeLinears, its float operator, and a QuantizeLinear."""
        out_first = op_type == "Conv" or bool(node.attributes.get_int("transB", 0))
        if node.attributes.get_int("channels_last", 0) or not self._have_fitting_scales(operands, out_first=out_first):
            return
        inputs = [self._dequantized(node, operand, 0 if out_first else -1) for operand in operands]
        if bias is not None:
            codes, one, other = (self.array(value) for value in (bias, operands[0][1], operands[1][1]))
            if codes is None or one is None or other is None:
                return
            scale = one * other * np.float32(node.attributes.get_float("alpha", 1))
            inputs.append(self._constant((codes * scale).astype(np.float32), bias, node))
        kept = [attribute for name, attribute in node.attributes.items() if name not in ("channels_last", "opset")]
        made = self._node(node, op_type, inputs, kept, like=node)
        if output[0] is not None:
            made.type = ir.TensorType(ir.DataType.FLOAT)
            made = self._node(node, "QuantizeLinear", [made, *output], like=node)
        self._replace(node, made)

    def _convert_integer(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        """Replace MatMulInteger or ConvInteger --> Cast --> Mul(Mul(scale of the data, scale of the weight))."""
        cast = _only_reader(node.outputs[0], "Cast")
        product = None if cast is None else _only_reader(cast.outputs[0], "Mul")
        if cast is None or product is None:
            return
        scales = next((_producer(value, "Mul") for value in product.inputs if value is not cast.outputs[0]), None)
        scale = None if scales is None else self.array(scales.inputs[1])
        if scales is None or scale is None:
            return
        flat = self._constant(scale.reshape(-1) if scale.size > 1 else scale.reshape(()), scales.inputs[1], node)
        operands = [(values[0], scales.inputs[0], values[2]), (values[1], flat, values[3])]
        op_type = node.op_type.removesuffix("Integer")
        if self._have_fitting_scales(operands, out_first=op_type == "Conv"):
            inputs = [self._dequantized(product, operand, 0 if op_type == "Conv" else -1) for operand in operands]
            made = self._node(product, op_type, inputs, list(node.attributes.values()), like=product)
            self._take_name(made, node)
            self._replace(product, made)

    def _convert_blocks(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        """MatMulNBits: codes `(N, blocks, bytes)`, scales `(N, blocks)`, zero points packed along the blocks."""
        columns, rows, block = (node.attributes[name].as_int() for name in ("N", "K", "block_size"))
        bits, blocks = node.attributes.get_int("bits", 4), -(-rows // block)
        codes, scales, zeros = (self.array(value) for value in values[1:4])
        if codes is None or scales is None or values[4] is not None or bits not in (2, 4, 8):
            return
        if zeros is None:
            zeros = np.full((columns, blocks), 1 << (bits - 1))
        elif zeros.dtype == np.uint8:
            zeros = _unpacked(zeros.reshape(columns, -1), bits)[:, :blocks]
        wide = _unpacked(codes.reshape(columns, -1), bits).reshape(columns, blocks, block).astype(np.float32)
        matrix = (wide - zeros.reshape(columns, blocks, 1)) * scales.reshape(columns, blocks, 1)
        weight = matrix.reshape(columns, -1)[:, :rows].T.astype(scales.dtype)
        made = self._node(node, "MatMul", [values[0], self._constant(weight, values[1], node)], like=node)
        self._take_name(made, node)
        self._replace(node, made if values[5] is None else self._node(node, "Add", [made, values[5]], like=node))

    def _convert_table(self, node: ir.Node, values: Sequence[ir.Value | None]) -> None:
        """GatherBlockQuantized: codes, scales and zero points along the same axis; those in bytes are packed."""
        codes, scales, zeros = (self.array(values[number]) for number in (0, 2, 3))
        if codes is None or scales is None:
            return
        axis, block = node.attributes.get_int("quantize_axis", 1), node.attributes.get_int("block_size", 128)
        usual = 0
        if codes.dtype == np.uint8:
            bits = node.attributes.get_int("bits", 4)
            usual, codes = 1 << (bits - 1), _unpacked(codes, bits, axis)
            zeros = None if zeros is None else _unpacked(zeros, bits, axis)
        zeros = np.full(scales.shape, usual) if zeros is None else zeros.take(range(scales.shape[axis]), axis)
        step, zero = (np.repeat(part, block, axis).take(range(codes.shape[axis]), axis) for part in (scales, zeros))
        table = (codes.astype(np.float32) - zero.astype(np.float32)) * step
        attributes = [ir.AttrInt64("axis", node.attributes.get_int("gather_axis", 0))]
        weight = self._constant(table.astype(scales.dtype), values[0], node)
        self._replace(node, self._node(node, "Gather", [weight, values[1]], attributes, like=node))

    def _have_fitting_scales(self, operands: Sequence[Operand], *, out_first: bool) -> bool:
        """Return whether the data have one scale, and a weight has one, or one for each of its outputs."""
        for number, (codes, scale, _) in enumerate(operands):
            scales, weight = self.array(scale), self.array(codes)
            if scales is None or scales.size == 1:
                continue
            if number == 0 or weight is None or weight.shape[0 if out_first else -1] != scales.size:
                return False
        return all(codes is not None for codes, _, _ in operands)

    # -- pairs ----------------------------------------------------------------------------------------------------

    def remove(self, node: ir.Node) -> None:
        """Replace a DequantizeLinear by a float weight, or by the value before the QuantizeLinear that it undoes."""
        codes, scale = node.inputs[:2]
        assert codes is not None
        folded = self._evaluated(node, node.inputs)
        if folded is not None:
            key = (codes, scale, *node.inputs[2:])
            if key not in self._weights:
                self._weights[key] = self._constant(folded, codes, node)
            self._replace(node, self._weights[key])
            return
        root, chain = layout_chain(codes, MOVES)
        value = self._before_rounding(root, node)
        if value is None and chain and _size(self.array(scale)) == 1:
            selected = self._evaluated(node, [root, *node.inputs[1:]])
            value = None if selected is None else self._constant(selected, root, node)
        if value is None:
            return
        for move in reversed(chain):
            made = self._node(node, move.op_type, [value, *move.inputs[1:]], list(move.attributes.values()), like=move)
            made.type = node.outputs[0].type
            value = made
        self._replace(node, value)

    def _before_rounding(self, codes: ir.Value, node: ir.Node) -> ir.Value | None:
        """Return the float value whose codes a DequantizeLinear reads, within their range; None for other codes."""
        maker = codes.producer()
        if maker is None or codes.index() != 0:
            return None
        if maker.op_type == "DynamicQuantizeLinear":
            return maker.inputs[0] if node.inputs[1] is maker.outputs[1] else None
        if maker.op_type != "QuantizeLinear" or len(maker.inputs) != len(node.inputs):
            return None
        pairs = [(self.array(a), self.array(b)) for a, b in zip(maker.inputs[1:], node.inputs[1:], strict=True)]
        if any(a is None or b is None or a.size != 1 or not np.array_equal(a, b) for a, b in pairs):
            return None
        scale, zero = pairs[0][0], pairs[1][0] if len(pairs) > 1 else np.zeros((), np.uint8)
        value = maker.inputs[0]
        assert value is not None
        assert scale is not None
        assert zero is not None
        if value.dtype is not None and value.dtype.numpy() != scale.dtype:
            return None
        return self._within_range(maker, value, scale.reshape(()), zero.reshape(()))

    def _within_range(self, maker: ir.Node, value: ir.Value, scale: Array, zero: Array) -> ir.Value:
        """Return a value within the range of its codes, where that range begins or ends at zero."""
        limits: Any = ml_dtypes.iinfo(zero.dtype)  # type: ignore[no-untyped-call]
        source = layout_chain(value, MOVES | AVERAGES)[0].producer()
        if int(zero) not in (limits.min, limits.max) or source is None or source.op_type in NEVER_NEGATIVE:
            return value
        if maker not in self._clips:
            ends = [np.array((end - int(zero)) * scale, scale.dtype) for end in (limits.min, limits.max)]
            inputs = [self._constant(end, maker.inputs[1], maker) for end in ends]
            self._clips[maker] = self._node(maker, "Clip", [value, *inputs], like=maker)
            self._clips[maker].type = ir.TensorType(ir.DataType.from_numpy(scale.dtype))
        return self._clips[maker]

    def fold_weights(self, node: ir.Node) -> None:
        """Store the weights of a float product that other nodes than DequantizeLinear unpack."""
        for value in node.inputs[:2]:
            if value is None or stored_tensor(value) is not None or not _is_few_bits(value, self.computed):
                continue
            if (array := self.array(value)) is not None and value.name is not None:
                name, value.name = value.name, self.names.fresh_value(f"{value.name}/unpacked")
                as_node = self.model.ir_version < OVERRIDABLE_IR_VERSION
                replace_all_uses_with(value, add_constant(array, name, node, as_node=as_node))

    # -- values ---------------------------------------------------------------------------------------------------

    def array(self, value: ir.Value | None) -> Array | None:
        """Return a stored value, or one that is unpacked from stored ones; None for others."""
        if value is None or (value.is_graph_input() and self.model.ir_version >= OVERRIDABLE_IR_VERSION):
            return None
        if (tensor := stored_tensor(value)) is not None:
            array: Array = tensor.numpy()
            return array
        node = value.producer() if value in self.computed else None
        return None if node is None or node.op_type not in UNPACKS else self._evaluated(node, node.inputs)

    def _evaluated(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> Array | None:
        """Return what a node makes of these inputs, by onnx's own reference; None where one is unknown."""
        arrays = [self.array(value) for value in inputs]
        if not inputs or any(a is None and value is not None for a, value in zip(arrays, inputs, strict=True)):
            return None
        proto = ir.to_proto(node)
        proto.input[:] = [f"x{number}" if value is not None else "" for number, value in enumerate(inputs)]
        infos = [onnx.ValueInfoProto(name=name) for name in (*proto.input, *proto.output) if name]
        graph = onnx.helper.make_graph([proto], "g", infos[:-1], infos[-1:])
        opset = onnx.helper.make_opsetid("", max(self.model.opset_imports.get("", 13), 13))
        feeds = {name: array for name, array in zip(proto.input, arrays, strict=True) if name}
        outputs: Any = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, feeds)
        return np.asarray(outputs[0])

    def _constant(self, array: Array, codes: ir.Value | None, before: ir.Node) -> ir.Value:
        """Add an initializer named after the codes that it comes from."""
        name = "" if codes is None else codes.name or ""
        for suffix in ("_quantized", "_Q2", "_Q4", "_Q8", "_3bit", "_4bit", "_5bit", "_8bit", "_int8"):
            name = name.removesuffix(suffix)
        as_node = self.model.ir_version < OVERRIDABLE_IR_VERSION
        return add_constant(np.ascontiguousarray(array), self.names.fresh_value(name), before, as_node=as_node)

    def _dequantized(self, before: ir.Node, operand: Operand, axis: int) -> ir.Value:
        """Add a DequantizeLinear; its axis counts only where there is a scale for each output."""
        codes, scale, zero = operand
        assert codes is not None
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        made = self._node(before, "DequantizeLinear", inputs, [ir.AttrInt64("axis", axis)])
        made.shape, made.type = codes.shape, ir.TensorType(ir.DataType.FLOAT)
        return made

    def _node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr] = (),
        *,
        like: ir.Node | None = None,
    ) -> ir.Value:
        """Add a node in front of another one, and return its output, with the shape and type of `like`'s."""
        stem = name_of(before)
        node = ir.Node("", op_type, inputs, attributes, name=self.names.fresh_node(f"{stem}/{op_type}"))
        made = node.outputs[0]
        made.name = self.names.fresh_value(f"{stem}/{op_type}.y")
        if like is not None:
            made.shape, made.type = like.outputs[0].shape, like.outputs[0].type
        before.prepend(node)
        return made

    def _take_name(self, made: ir.Value, node: ir.Node) -> None:
        """Let the product that replaces a node have its name and metadata, such as the mark of a split."""
        product = made.producer()
        assert product is not None
        product.metadata_props.update(node.metadata_props)
        product.name, node.name = node.name, product.name

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let readers of a node's output read another value, and remove the node."""
        old = node.outputs[0]
        if old.is_graph_output():
            value = self._node(node, "Identity", [value], like=node)
            old.name, value.name = value.name, old.name
        replace_all_uses_with(old, value, replace_graph_outputs=True)
        assert node.graph is not None
        node.graph.remove(node, safe=True)


def _size(array: Array | None) -> int:
    return 0 if array is None else array.size
