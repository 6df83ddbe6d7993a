"""MACs of matrix products, plain, fused and quantized.

MatMul, relatives     output elements * inner dimension
MoE                   tokens * k experts * numbers in an expert's weights

A bias, a scale, an activation and a zero point count nothing.
"""

import math

from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, Operator


def matmul(node: ExecutedNode) -> Macs:
    """Count A @ B, operands of any number of axes; B may be packed or quantized."""
    return Macs(node.output_size * node.input(0)[-1])


def turned_matmul(node: ExecutedNode) -> Macs:
    """Count FusedMatMul and its relatives: `A` may be transposed, and its rows may stand before its batch axes."""
    data = node.input(0)
    if len(data) < 2 or not node.flag("transA"):
        return Macs(node.output_size * data[-1])
    return Macs(node.output_size * (data[0] if node.flag("transBatchA") else data[-2]))


def gemm(node: ExecutedNode) -> Macs:
    """Count Gemm and its relatives: the inner dimension is that of `A` beside the rows of the output."""
    rows, columns = node.output
    return Macs(columns * math.prod(node.input(0)) if rows else 0)


def packed_pair(node: ExecutedNode) -> Macs:
    """Count MatMulNBitsMlp: the gate and the up projection of the same data."""
    return Macs(2 * node.output_size * node.input(0)[-1])


def packed_triple(node: ExecutedNode) -> Macs:
    """Count MatMulNBitsQkv: three projections of the same data."""
    columns = int(node.attributes["Nq"]) + 2 * int(node.attributes["Nkv"])
    return Macs(math.prod(node.input(0)) * columns)


def relative_position_gate(node: ExecutedNode) -> Macs:
    """Count GatedRelativePositionBias: each head of the query by a weight (head size, D)."""
    return Macs(math.prod(node.input(0)) * node.input(3)[1])


def mix_streams(node: ExecutedNode) -> Macs:
    """Count HyperConnectionPostMix: streams mixed by an optional (..., C, C) matrix."""
    mix = node.find(3)
    return Macs() if mix is None else Macs(node.output_size * mix[-1])


def experts(node: ExecutedNode) -> Macs:
    """Count MoE: each token passes `k` experts."""
    weights = [shape for shape in map(node.find, (2, 4, 6)) if shape is not None]
    return Macs(_tokens_times_experts(node) * sum(math.prod(shape[1:]) for shape in weights))


def quantized_experts(node: ExecutedNode) -> Macs:
    """Count QMoE with integer weights: the scales have the sizes, for the weights are packed."""
    if _text(node.attributes.get("quant_type", "int")) != "int":
        raise LookupError("QMoE keeps its weights in another layout than that of integers; expected quant_type 'int'")
    hidden, rows = node.input(0)[-1], node.input(3)[1]
    halves = 2 if node.flag("swiglu_fusion") and _text(node.attributes.get("activation_type", "")) == "swiglu" else 1
    inner = rows // halves
    third = inner if node.find(8) is not None else 0
    return Macs(_tokens_times_experts(node) * hidden * (rows + inner + third))


def _tokens_times_experts(node: ExecutedNode) -> int:
    chosen = 2 if node.flag("use_sparse_mixer") else int(node.attributes.get("k", 1))
    return math.prod(node.input(0)[:-1]) * chosen


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def linear_model(node: ExecutedNode) -> Macs:
    """Count LinearClassifier and LinearRegressor: the weights are the attribute `coefficients`."""
    return Macs(_rows(node) * len(node.attributes["coefficients"]))


def support_vectors(node: ExecutedNode) -> Macs:
    """Count SVMClassifier and SVMRegressor: the kernel with every support vector, and their weighted sum."""
    attributes = node.attributes
    return Macs(_rows(node) * (len(attributes.get("support_vectors", ())) + len(attributes["coefficients"])))


def _rows(node: ExecutedNode) -> int:
    return math.prod(node.input(0)[:-1])


FORMULAS: dict[Operator, Formula] = {
    ("", "MatMulInteger"): matmul,
    ("", "QLinearMatMul"): matmul,
    ("ai.onnx.ml", "LinearClassifier"): linear_model,
    ("ai.onnx.ml", "LinearRegressor"): linear_model,
    ("ai.onnx.ml", "SVMClassifier"): support_vectors,
    ("ai.onnx.ml", "SVMRegressor"): support_vectors,
    ("com.microsoft", "CDist"): matmul,
    ("com.microsoft", "DynamicQuantizeMatMul"): matmul,
    ("com.microsoft", "FusedMatMulActivation"): turned_matmul,
    ("com.microsoft", "GatedRelativePositionBias"): relative_position_gate,
    ("com.microsoft", "GemmFastGelu"): matmul,
    ("com.microsoft", "GemmFloat8"): gemm,
    ("com.microsoft", "HyperConnectionPostMix"): mix_streams,
    ("com.microsoft", "MatMulBlockQuantizedFp4Weight"): matmul,
    ("com.microsoft", "MatMulBlockQuantizedFp8Weight"): matmul,
    ("com.microsoft", "MatMulBnb4"): matmul,
    ("com.microsoft", "MatMulFpQ4"): matmul,
    ("com.microsoft", "MatMulInteger16"): matmul,
    ("com.microsoft", "MatMulIntegerToFloat"): matmul,
    ("com.microsoft", "MatMulNBits"): matmul,
    ("com.microsoft", "MatMulNBitsMlp"): packed_pair,
    ("com.microsoft", "MatMulNBitsQkv"): packed_triple,
    ("com.microsoft", "MoE"): experts,
    ("com.microsoft", "QGemm"): gemm,
    ("com.microsoft", "QMoE"): quantized_experts,
    ("com.microsoft", "QOrderedMatMul"): matmul,
    ("com.microsoft", "TransposeMatMul"): turned_matmul,
}
