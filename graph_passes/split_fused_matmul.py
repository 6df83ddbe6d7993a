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

import onnx_ir as ir

from graph_passes.axis_rules.products import turned_product
from graph_passes.macs.products import turned_matmul
from graph_passes.parts import Parts
from graph_passes.response import RowOrder
from graph_passes.split_matmul import SplitMatMulPass, product_bias_shape, rewrite_product
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight

TURNS = (("transA", "transBatchA"), ("transB", "transBatchB"))


class SplitFusedMatMulPass(SplitMatMulPass):
    """Splits FusedMatMul as `SplitMatMulPass` does MatMul, any transA, transB, transBatchA, transBatchB and alpha."""

    domain = "com.microsoft"
    op_type = "FusedMatMul"
    contraction = None
    macs = staticmethod(turned_matmul)
    axis_rule = staticmethod(turned_product)

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Turn the weight as a MatMul holds it, then proceed as there."""
        if len(weight.shape) > 1:
            trans, trans_batch = (node.attributes.get_int(name, 0) for name in TURNS[operand])
            *batch, rows, columns = range(len(weight.shape))
            if trans_batch:
                rows, *batch = (*batch, rows)
            weight = weight.transposed(*batch, *((columns, rows) if trans else (rows, columns)))
        return SplitMatMulPass.canonical(node, operand, weight)

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Accept what MatMul accepts, with the data as it is, and no alpha."""
        is_scaled = node.attributes.get_float("alpha", 1.0) != 1.0
        return None if is_scaled or _turns(node, 1 - operand) else SplitMatMulPass.row_order(node, operand, weight)

    @staticmethod
    def shares_right(found: Found) -> bool:
        """Accept what MatMul accepts, with the data as it is."""
        return SplitMatMulPass.shares_right(found) and not _turns(found.node, 0)

    @staticmethod
    def bias_shape(found: Found) -> tuple[int, ...] | NoWeight:
        """Return the shape of MatMul."""
        return product_bias_shape(found, _batch(found))

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Move the data's transpositions to the first product; drop the weight's."""
        attributes, batch = found.node.attributes, _batch(found)
        turns = _turns(found.node, 1 - found.operand)
        op_type, domain = ("FusedMatMul", "com.microsoft") if turns else ("MatMul", "")
        first = rewrite_product(found, parts, batch, op_type=op_type, attributes=turns, domain=domain)
        for name in (*TURNS[0], *TURNS[1]):
            attributes.pop(name, None)
        return first


def _turns(node: ir.Node, operand: int) -> list[ir.Attr]:
    """Return the attributes that transpose an operand."""
    return [node.attributes[name] for name in TURNS[operand] if node.attributes.get_int(name, 0)]


def _batch(found: Found) -> tuple[int, ...]:
    """Return the batch axes of the weight, which stand between its matrix axes where they are moved."""
    is_moved = found.node.attributes.get_int(TURNS[found.operand][1], 0)
    return found.shape[1:-1] if is_moved else found.shape[:-2]
