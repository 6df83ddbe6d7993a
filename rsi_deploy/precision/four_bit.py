"""Store int8 weights of a quantized model in four bits; onnxruntime unpacks them once, when it loads the model.

    codes int4 --> Cast --> int8 weight                                       one scale a row
    codes int4 --> Cast int32 --> Mul(multipliers) --> Reshape --> Cast --> int8 weight      a multiplier a block

All inputs of these nodes are constants, so that onnxruntime folds them: the kernels are those of int8, and so are time
and memory. Only the file is smaller.

An embedding table is stored in blocks of a scale each, and stays so: GatherBlockQuantized unpacks the rows that it
gathers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rsi_deploy.calibration.rounding import Rounded
from rsi_deploy.io.onnx_checks.parts import all_graphs

Array = npt.NDArray[Any]

OPSET = 21
"""First opset whose Cast knows int4."""
IR_VERSION = 10
BLOCKS = {4: 64, 8: 128}
"""Bits of an embedding table -> numbers of a row that share a scale."""
LEAST_BLOCK = 16


def store_in_4_bits_(model: ModelProto, weights: Mapping[str, Rounded]) -> list[str]:
    """Replace int8 initializers of a model that onnxruntime quantized by their 4-bit form.

    Args:
        model: quantized model of opset 21 or later; changed in place.
        weights: name of the float initializer -> its 4-bit form.

    Returns:
        The names of the weights that the model holds as int8 per channel, and that were replaced.
    """
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = _readers(model)
    nodes: list[NodeProto] = []
    replaced = []
    for name, rounded in weights.items():
        int8, scale = known.get(f"{name}_quantized"), known.get(f"{name}_scale")
        if int8 is None or scale is None or int8.data_type != TensorProto.INT8:
            continue
        if tuple(scale.dims) != (len(rounded.scales),):
            continue
        rounded = _with_biases_(rounded, scale, _biases(known, model, readers, int8.name))
        made, tensors = _unpacking(name, int8, rounded, _by_input(readers[int8.name][0]))
        nodes += made
        model.graph.initializer.remove(int8)
        model.graph.initializer.extend(tensors)
        replaced.append(name)
    _prepend(model, nodes)
    return replaced


def _readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Return value name -> nodes that read it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _biases(
    known: Mapping[str, TensorProto], model: ModelProto, readers: Mapping[str, list[NodeProto]], weight: str
) -> list[tuple[TensorProto, TensorProto]]:
    """Return the int32 bias and its scale of every product that an int8 weight enters as QDQ."""
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [
        product
        for reader in readers[weight]
        if reader.op_type == "DequantizeLinear"
        for product in readers.get(reader.output[0], ())
        if len(product.input) > 2
    ]
    biases = {product.input[2]: makers.get(product.input[2]) for product in products}
    return [
        (known[bias.input[0]], known[bias.input[1]])
        for bias in biases.values()
        if bias is not None and bias.op_type == "DequantizeLinear" and all(name in known for name in bias.input[:2])
    ]


def _with_biases_(rounded: Rounded, scale: TensorProto, biases: Sequence[tuple[TensorProto, TensorProto]]) -> Rounded:
    """Store the scales of a rounded weight, and round the int32 biases behind it again.

    The scale of a bias is that of the input times that of the weight: onnxruntime fuses nothing else.

    Returns:
        The rounded weight. Rows that are so small that the bias leaves int32 are zero, and keep onnxruntime's scale.
    """
    usual = numpy_helper.to_array(scale)
    scales = rounded.scales.numpy().astype(np.float32)
    values = [numpy_helper.to_array(codes) * numpy_helper.to_array(step).astype(np.float64) for codes, step in biases]
    steps = [numpy_helper.to_array(step).astype(np.float64) for _, step in biases]
    is_small = ~rounded.codes.numpy().any(axis=1)
    for value, step in zip(values, steps, strict=True):
        is_small |= np.abs(value) >= (2**31 - 1) * step * (scales / usual)
    scales = np.where(is_small, usual, scales)
    for (codes, stored), value, step in zip(biases, values, steps, strict=True):
        again = np.broadcast_to(step * (scales / usual), value.shape).astype(np.float32)
        codes.CopyFrom(numpy_helper.from_array(np.round(value / again).astype(np.int32), codes.name))
        stored.CopyFrom(numpy_helper.from_array(again, stored.name))
    scale.CopyFrom(numpy_helper.from_array(scales, scale.name))
    kept = torch.from_numpy(~is_small)[:, None]
    return replace(rounded, codes=rounded.codes * kept, scales=torch.from_numpy(scales))


def _by_input(reader: NodeProto) -> bool:
    """Return whether an int8 initializer is stored `(in, out)`, as a MatMul's, and not `(out, in)`."""
    if reader.op_type != "DequantizeLinear":
        return True
    return next((attribute.i for attribute in reader.attribute if attribute.name == "axis"), 1) == 1


def _unpacking(
    name: str, int8: TensorProto, rounded: Rounded, by_input: bool
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return the nodes that make an int8 initializer, and their constants."""
    dims = tuple(int8.dims)
    codes, multipliers = rounded.codes.numpy(), rounded.multipliers.numpy()
    (rows, columns), blocks = codes.shape, multipliers.shape[1]
    if blocks == 1:
        stored = codes.T if by_input else codes
        packed = _int4(f"{name}_4bit", stored.reshape(dims))
        return [helper.make_node("Cast", [packed.name], [int8.name], f"{name}_unpack", to=TensorProto.INT8)], [packed]
    codes = codes.reshape(rows, blocks, columns // blocks)
    multipliers = multipliers[:, :, None]
    if by_input:
        codes, multipliers = codes.transpose(1, 2, 0), multipliers.transpose(1, 2, 0)
    tensors = [
        _int4(f"{name}_4bit", codes),
        _uint4(f"{name}_multipliers", multipliers),
        numpy_helper.from_array(np.array(dims, np.int64), f"{name}_shape"),
    ]
    wide, times, product, flat = (f"{name}_{part}" for part in ("wide", "times", "product", "flat"))
    return [
        helper.make_node("Cast", [tensors[0].name], [wide], f"{name}_unpack", to=TensorProto.INT32),
        helper.make_node("Cast", [tensors[1].name], [times], f"{name}_unpack_multipliers", to=TensorProto.INT32),
        helper.make_node("Mul", [wide, times], [product], f"{name}_scale_blocks"),
        helper.make_node("Reshape", [product, tensors[2].name], [flat], f"{name}_flatten"),
        helper.make_node("Cast", [flat], [int8.name], f"{name}_narrow", to=TensorProto.INT8),
    ], tensors


@dataclass(frozen=True, kw_only=True)
class EmbeddingTable:
    """An embedding table: a float initializer `(rows, width)` whose rows Gathers look up.

    Attributes:
        name: name of the initializer.
        rows: number of rows.
        width: numbers in a row.
    """

    name: str
    rows: int
    width: int


LEAST_TABLE = 4096
"""Numbers in a table below which nothing is won."""


def tables(model: ModelProto) -> list[EmbeddingTable]:
    """Return the embedding tables of a float model that nothing but Gathers of rows reads."""
    readers = _readers(model)
    others = {value.name for value in (*model.graph.input, *model.graph.output)} | _names_in_subgraphs(model)
    found = []
    for tensor in model.graph.initializer:
        is_matrix = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.name not in others
        users = readers.get(tensor.name, [])
        if is_matrix and users and all(_gathers_rows(node, tensor.name) for node in users):
            rows, width = tensor.dims
            if rows * width >= LEAST_TABLE and width % LEAST_BLOCK == 0:
                found.append(EmbeddingTable(name=tensor.name, rows=rows, width=width))
    return found


def _names_in_subgraphs(model: ModelProto) -> set[str]:
    """Return the names that nodes of subgraphs read, and that subgraphs return."""
    inner = list(all_graphs(model))[1:]
    read = {name for graph in inner for node in graph.node for name in node.input}
    return read | {value.name for graph in inner for value in graph.output}


def store_table_(model: ModelProto, table: EmbeddingTable, values: Array, bits: int) -> None:
    """Store an embedding table in four or eight bits, and let its Gathers unpack the rows that they look up.

    Args:
        model: changed in place.
        table: the table.
        values: float32 `(rows, width)`.
        bits: 4 or 8.
    """
    codes, scales, zeros = table_codes(values, bits)
    name = table.name
    constants = [
        numpy_helper.from_array(_pairs(codes) if bits == 4 else codes, f"{name}_{bits}bit"),
        numpy_helper.from_array(scales, f"{name}_scales"),
        numpy_helper.from_array(_pairs(zeros) if bits == 4 else zeros, f"{name}_zeros"),
    ]
    wide = f"{name}_scales_float32"
    _prepend(model, [helper.make_node("Cast", [constants[1].name], [wide], f"{name}_widen", to=TensorProto.FLOAT)])
    for node in model.graph.node:
        if node.op_type == "Gather" and name in node.input:
            inputs = [constants[0].name, node.input[1], wide, constants[2].name]
            made = helper.make_node(
                "GatherBlockQuantized",
                inputs,
                list(node.output),
                node.name,
                domain="com.microsoft",
                bits=bits,
                block_size=table_block(values.shape[1], bits),
                gather_axis=0,
                quantize_axis=1,
            )
            node.CopyFrom(made)
            if node.output[0] not in {value.name for value in (*model.graph.value_info, *model.graph.output)}:
                # Without a type, onnxruntime's quantizer takes what follows for no float product.
                known = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
                model.graph.value_info.append(known)
    for tensor in list(model.graph.initializer):
        if tensor.name == name:
            model.graph.initializer.remove(tensor)
    model.graph.initializer.extend(constants)
    if all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def table_block(width: int, bits: int) -> int:
    """Return the numbers of a row that share a scale."""
    block = BLOCKS[bits]
    while width % block:
        block //= 2
    return block


def stored_table_bytes(table: EmbeddingTable, bits: int) -> int:
    """Return the bytes of a table in so many bits, with its scales and zero points."""
    blocks = table.width // table_block(table.width, bits)
    return table.rows * (table.width * bits // 8 + 2 * blocks + -(-blocks * bits // 8))


def table_codes(values: Array, bits: int) -> tuple[Array, Array, Array]:
    """Round a table to `(code - zero) * scale`.

    Returns:
        Codes uint8 `(rows, width)`, scales float16 and zeros uint8 `(rows, blocks)`.
    """
    rows, width = values.shape
    blocks = values.reshape(rows, -1, table_block(width, bits)).astype(np.float32)
    most = 2**bits - 1
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    scales = np.maximum((high - low) / most, 1e-7).astype(np.float16)
    step = scales.astype(np.float32)
    zeros = np.clip(np.round(-low / step), 0, most)
    codes = np.clip(np.round(blocks / step[..., None]) + zeros[..., None], 0, most)
    return codes.reshape(rows, width).astype(np.uint8), scales, zeros.astype(np.uint8)


def table_values(values: Array, bits: int) -> Array:
    """Return a table as its rounded form reads, float32 `(rows, width)`."""
    codes, scales, zeros = table_codes(values, bits)
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32) - zeros[..., None]
    rounded: Array = blocks * scales[..., None].astype(np.float32)
    return np.asarray(rounded.reshape(values.shape))


def _gathers_rows(node: NodeProto, name: str) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and not node.domain and node.input[0] == name and axis == 0


def _prepend(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Put nodes, whose inputs are constants, before all others."""
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])


def _int4(name: str, values: Array) -> TensorProto:
    packed = _pairs(values.reshape(1, -1).view(np.uint8) & 15)
    return helper.make_tensor(name, TensorProto.INT4, values.shape, packed.tobytes(), raw=True)


def _uint4(name: str, values: Array) -> TensorProto:
    packed = _pairs(np.ascontiguousarray(values, np.uint8).reshape(1, -1))
    return helper.make_tensor(name, TensorProto.UINT4, values.shape, packed.tobytes(), raw=True)


def _pairs(values: Array) -> Array:
    """Pack uint8 `(rows, n)` below 16 into bytes `(rows, ceil(n / 2))`, the first number in the low half."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed = values[:, 0::2] | (values[:, 1::2] << 4)
    return np.asarray(packed, np.uint8)
