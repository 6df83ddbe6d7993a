"""onnxruntime's Attention with packed projections.

    weight (in, q + k + v) = W^T, W (1, q + k + v, in)

    X --> Attention num_heads, mask, ... --> Y        becomes        X --> MatMul --> Attention as it was --> Y
          weight, bias                                                     right^T    left^T (rank, q + k + v), bias

It stays one fused operator: the hidden size of its input is free, and only that becomes the rank. Bias, masks, past,
head counts and unequal q, k, v sizes belong to the output side and stay.
"""

import onnx_ir as ir

from graph_passes.axis_rules.sequences import packed_attention
from graph_passes.macs.attention import projected_attention
from graph_passes.parts import Parts, resized
from graph_passes.response import RowOrder
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight


class SplitAttentionPass(SplitPass):
    """Splits the projections of `com.microsoft` Attention: one shared right factor for q, k and v."""

    domain = "com.microsoft"
    op_type = "Attention"
    form = "matmul"
    operands = (1,)
    linear = False
    macs = staticmethod(projected_attention((1,), past=4))
    axis_rule = staticmethod(packed_attention)

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Transpose (in, q + k + v)."""
        if len(weight.shape) != 2:
            return NoWeight(reason=f"weight has {len(weight.shape)} axes: only matrices are split")
        return weight.transposed(1, 0).reshaped(1, *reversed(weight.shape))

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Accept every Attention: its projections are one product."""
        return RowOrder()

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Put a MatMul in front."""
        node, site, rank = found.node, found.site, parts.factors.rank
        data = node.inputs[0]
        right = parts.operand("right", (site.in_features, rank), turned=True)
        left = parts.operand("left", (rank, site.out_features), turned=True)
        first = parts.first("MatMul", (data, right), shape=None if data is None else resized(data, -1, rank))
        node.replace_input_with(0, first.outputs[0])
        node.replace_input_with(1, left)
        return first
