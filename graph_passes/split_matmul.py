"""MatMul with one constant operand.

    X @ B,  B (in, out), W = B^T            A @ X,  A (out, in), W = A

    X --> MatMul --> Y                      X --> MatMul --> Y
            B                                       A
    becomes                                 becomes
    X --> MatMul --> MatMul --> Y           X --> MatMul --> MatMul --> Y
        right^T    left^T                        right      left
       (in, rank) (rank, out)                 (rank, in)  (out, rank)

X may have any number of axes: only the last one (B) or the last but one (A) is multiplied.
"""

from __future__ import annotations

import onnx_ir as ir

from graph_passes.split_pass import Parts, SplitPass
from graph_passes.survey import Found
from graph_passes.weights import Refusal, Weight


class SplitMatMulPass(SplitPass):
    """Splits `MatMul(X, B)` and `MatMul(A, X)` with a constant matrix B or A.

    1. A constant with fewer or more than two axes is refused.
    2. MatMul between two computed values (attention scores) bears no weight and leaves no record.
    """

    op_type = "MatMul"
    form = "matmul"
    operands = (1, 0)

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | Refusal:
        """(in, out) on the right is turned; (out, in) on the left stands as it is."""
        if len(weight.shape) != 2:
            return Refusal(reason=f"weight has {len(weight.shape)} axes: only matrices are split")
        turned = weight.transposed(1, 0) if operand == 1 else weight
        return turned.reshaped(1, *turned.shape)

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Two MatMuls on the weight's side of the data."""
        node, site, rank = found.node, found.site, parts.factors.rank
        data = node.inputs[1 - found.operand]
        if found.operand == 1:
            right = parts.operand("right", (site.in_features, rank), turned=True)
            left = parts.operand("left", (rank, site.out_features), turned=True)
            first = parts.first("MatMul", (data, right), (), axis=-1)
        else:
            right = parts.operand("right", (rank, site.in_features))
            left = parts.operand("left", (site.out_features, rank))
            shape = node.outputs[0].shape
            is_vector = shape is not None and len(shape) == 1
            first = parts.first("MatMul", (right, data), (), axis=-1 if is_vector else -2)
        node.replace_input_with(1 - found.operand, first.outputs[0])
        node.replace_input_with(found.operand, left)
        return first
