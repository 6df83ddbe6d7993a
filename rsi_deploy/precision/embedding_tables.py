"""Embedding tables in few bits: blocks of a row share a scale, and GatherBlockQuantized unpacks the gathered rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rsi_deploy.io.onnx_checks.parts import all_graphs
from rsi_deploy.precision.few_bits import packed_pairs, prepend, readers_of

Array = npt.NDArray[Any]

BLOCKS = {4: 64, 8: 128}
"""Bits of an embedding table -> numbers of a row that share a scale."""
LEAST_BLOCK = 16


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
    readers = readers_of(model)
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
        numpy_helper.from_array(packed_pairs(codes) if bits == 4 else codes, f"{name}_{bits}bit"),
        numpy_helper.from_array(scales, f"{name}_scales"),
        numpy_helper.from_array(packed_pairs(zeros) if bits == 4 else zeros, f"{name}_zeros"),
    ]
    wide = f"{name}_scales_float32"
    prepend(model, [helper.make_node("Cast", [constants[1].name], [wide], f"{name}_widen", to=TensorProto.FLOAT)])
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
