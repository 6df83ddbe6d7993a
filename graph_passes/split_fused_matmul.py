"""onnxruntime's FusedMatMul with one constant operand.

    Y = alpha * A' @ B',  A' = A with its last two axes swapped (transA), and before that with its first axis moved
    behind its batch axes (transBatchA); the same for B

    B constant, W = B'^T (out, in)             A constant, W = A' (out, in)

    A --> FusedMatMul --> Y                    B --> FusedMatMul --> Y
          B                                          A
    becomes
    A --> FusedMatMul --> FusedMatMul --> Y    B --> FusedMatMul --> FusedMatMul --> Y
          transA     alpha                           transB     alpha
          right^T    left^T                          right      left

The first product takes what turns the data (and is a plain MatMul when nothing does), the second one alpha. The factors
are stored untransposed.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.parts import Parts
from graph_passes.split_matmul import SplitMatMulPass, product_bias_shape, rewrite_product
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight

TURNS = (("transA", "transBatchA"), ("transB", "transBatchB"))


class SplitFusedMatMulPass(SplitMatMulPass):
    """Splits FusedMatMul as `SplitMatMulPass` does MatMul, any transA, transB, transBatchA, transBatchB and alpha."""

    domain = "com.microsoft"
    op_type = "FusedMatMul"

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """The weight as a MatMul would hold it, then as there."""
        if len(weight.shape) > 1:
            trans, trans_batch = (node.attributes.get_int(name, 0) for name in TURNS[operand])
            *batch, rows, columns = range(len(weight.shape))
            if trans_batch:
                rows, *batch = (*batch, rows)
            weight = weight.transposed(*batch, *((columns, rows) if trans else (rows, columns)))
        return SplitMatMulPass.canonical(node, operand, weight)

    @staticmethod
    def is_plain(node: ir.Node, operand: int, weight: Weight) -> bool:
        """As for MatMul, with the data as it is, and no alpha."""
        attributes = node.attributes
        is_turned = any(attributes.get_int(name, 0) for name in TURNS[1 - operand])
        alpha = attributes.get_float("alpha", 1.0)
        return SplitMatMulPass.is_plain(node, operand, weight) and not is_turned and alpha == 1.0

    @staticmethod
    def bias_shape(found: Found) -> tuple[int, ...] | NoWeight:
        """As for MatMul."""
        return product_bias_shape(found, _batch(found))

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """The data's turns go to the first product, the weight's turns are done with."""
        attributes, batch = found.node.attributes, _batch(found)
        turns = [attributes[name] for name in TURNS[1 - found.operand] if attributes.get_int(name, 0)]
        op_type, domain = ("FusedMatMul", "com.microsoft") if turns else ("MatMul", "")
        first = rewrite_product(found, parts, batch, op_type=op_type, attributes=turns, domain=domain)
        for name in (*TURNS[0], *TURNS[1]):
            attributes.pop(name, None)
        return first


def _batch(found: Found) -> tuple[int, ...]:
    """The batch axes of the weight, which stand between its matrix axes where they are moved."""
    is_moved = found.node.attributes.get_int(TURNS[found.operand][1], 0)
    return found.shape[1:-1] if is_moved else found.shape[:-2]
