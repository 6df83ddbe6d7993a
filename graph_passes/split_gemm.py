"""Gemm with one constant operand.

    Y = alpha * A' @ B' + beta * C,  A' = A or A^T (transA), B' = B or B^T (transB), C broadcast to (M, N) or absent

    B constant, W = B'^T (out = N, in = K)          A constant, W = A' (out = M, in = K)

    A --> Gemm --> Y                                B --> Gemm --> Y
          B, C                                            A, C
    becomes                                         becomes
    A --> MatMul --> Gemm --> Y                     B --> MatMul --> Gemm --> Y
         right^T    left^T, C                            right      left, C

The first node is a MatMul: a Gemm without C exists only since opset 11. Where the data enters transposed the product is
transposed as a whole, (A^T @ right^T)^T = right @ A, and the Gemm keeps its transA (or transB). The Gemm keeps alpha,
beta and C; the factor it holds is stored untransposed. FusedGemm is a Gemm with an activation, which stays with it.

A bias correction (N), or (M, 1) where A is constant, goes into C as correction / beta; without C, or with beta = 0, it
becomes C, with beta = 1.
"""

from typing import ClassVar

import onnx_ir as ir

from graph_passes.axis_rules.products import gemm as gemm_moves
from graph_passes.bias import add_to_input, is_absent
from graph_passes.macs.products import gemm
from graph_passes.parts import Parts, resized
from graph_passes.pivoted import has_constant_bias
from graph_passes.response import Contraction, RowOrder
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight

TRANS = ("transA", "transB")


class SplitGemmPass(SplitPass):
    """Splits `Gemm(A, B, C)` with a constant B (or A), any alpha, beta, transA, transB, and any C or none."""

    op_type = "Gemm"
    form = "gemm"
    operands = (1, 0)
    bias_is_input = True
    contraction: ClassVar[Contraction | None] = Contraction.GEMM
    macs = staticmethod(gemm)
    axis_rule = staticmethod(gemm_moves)

    @staticmethod
    def can_pivot(node: ir.Node, operand: int, weight: Weight) -> bool:
        """Accept what can be calibrated, with a bias that is missing or constant."""
        is_plain = SplitGemmPass.row_order(node, operand, weight) is not None
        return is_plain and node.attributes.get_float("beta", 1.0) == 1.0 and has_constant_bias(node, weight.shape[1])

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Transpose the weight unless it is (out, in): B with transB, A without transA."""
        if len(weight.shape) != 2:
            return NoWeight(reason=f"weight has {len(weight.shape)} axes: only matrices are split")
        is_transposed = bool(node.attributes.get_int(TRANS[operand], 0))
        turned = weight if is_transposed == (operand == 1) else weight.transposed(1, 0)
        return turned.reshaped(1, *turned.shape)

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Accept the weight as B, A as it is, and no alpha."""
        attributes = node.attributes
        is_plain = operand == 1 and not attributes.get_int("transA", 0) and attributes.get_float("alpha", 1.0) == 1.0
        return RowOrder() if is_plain else None

    @staticmethod
    def shares_right(found: Found) -> bool:
        """Accept the weight as B, and A as it is."""
        return found.operand == 1 and not found.node.attributes.get_int("transA", 0)

    @staticmethod
    def bias_shape(found: Found) -> tuple[int, ...] | NoWeight:
        """Return the shape along the weight's side of the output."""
        out_features = found.site.out_features
        return (out_features,) if found.operand == 1 else (out_features, 1)

    @staticmethod
    def add_bias(parts: Parts, shape: tuple[int, ...]) -> None:
        """Add it to C, which beta multiplies."""
        node = parts.found.node
        beta = node.attributes.get_float("beta", 1.0)
        if is_absent(parts, 2) or beta == 0:
            node.attributes.pop("beta", None)
            add_to_input(parts, 2, shape, replace=True)
        else:
            add_to_input(parts, 2, shape, scale=1 / beta)

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Put a MatMul in front, with the right factor on its side of the data."""
        node, site, rank = found.node, found.site, parts.factors.rank
        weight_is_b = found.operand == 1
        data_is_transposed = bool(node.attributes.get_int(TRANS[1 - found.operand], 0))
        data = node.inputs[1 - found.operand]
        if weight_is_b != data_is_transposed:  # data (M, K) of A, or (N, K) of B^T: data @ right^T
            right = parts.operand("right", (site.in_features, rank), turned=True)
            inputs = [data, right]
        else:  # data (K, M) of A^T, or (K, N) of B: right @ data
            right = parts.operand("right", (rank, site.in_features))
            inputs = [right, data]
        shape = resized(node.outputs[0], 1 if weight_is_b else 0, rank)
        if data_is_transposed and shape is not None:
            shape = ir.Shape(reversed(shape.dims))
        first = parts.first("MatMul", inputs, shape=shape)
        left_shape = (rank, site.out_features) if weight_is_b else (site.out_features, rank)
        left = parts.operand("left", left_shape, turned=weight_is_b)
        node.attributes.pop(TRANS[found.operand], None)
        node.replace_input_with(1 - found.operand, first.outputs[0])
        node.replace_input_with(found.operand, left)
        return first


class SplitFusedGemmPass(SplitGemmPass):
    """Splits onnxruntime's FusedGemm, a Gemm with an activation, in the same way."""

    domain = "com.microsoft"
    op_type = "FusedGemm"
    linear = False
    contraction = None
