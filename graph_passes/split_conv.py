"""Conv, channel form.

    weight (out, in/groups, *kernel) = W (groups, out/groups, in/groups * prod(kernel)), one factorization a group

    X --> Conv kernel, stride, pads, dilation, group --> Y
          weight (out, in/groups, *kernel), bias
    becomes
    X --> Conv kernel, stride, pads, dilation, group --> Conv 1x1, group --> Y
          right (groups * rank, in/groups, *kernel)      left (out, rank, 1, ...), bias

Each group's left mixes that group's own `rank` channels only, so the 1x1 Conv has the same group count. onnxruntime's
FusedConv is a Conv with an activation and maybe a sum Z, which both stay with the second one.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from graph_passes.parts import Parts, resized
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import Refusal, Weight

SPATIAL = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


class SplitConvPass(SplitPass):
    """Splits a Conv of any number of spatial axes, grouped and depthwise ones too, into kernel and 1x1."""

    op_type = "Conv"
    form = "channel"
    operands = (1,)

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | Refusal:
        """(out, in/groups, *kernel) as one matrix a group."""
        groups = node.attributes.get_int("group", 1)
        out_channels, *rest = weight.shape or (0,)
        if groups < 1 or out_channels % groups or len(rest) < 2:
            return Refusal(reason=f"weight of shape {weight.shape} does not fit a Conv of {groups} groups")
        return weight.reshaped(groups, out_channels // groups, math.prod(rest))

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """The first Conv takes all that is spatial, the second the bias."""
        node, site, rank = found.node, found.site, parts.factors.rank
        ones = (1,) * (len(found.shape) - 2)
        right = parts.operand("right", (site.groups * rank, *found.shape[1:]))
        left = parts.operand("left", (site.groups * site.out_features, rank, *ones))
        attributes = [a for name, a in node.attributes.items() if name in (*SPATIAL, "group")]
        shape = resized(node.outputs[0], 1, site.groups * rank)
        first = parts.first("Conv", (node.inputs[0], right), attributes, shape=shape)
        for name in SPATIAL:
            node.attributes.pop(name, None)
        node.attributes.add(ir.AttrInt64s("kernel_shape", ones))
        node.replace_input_with(0, first.outputs[0])
        node.replace_input_with(1, left)
        return first


class SplitFusedConvPass(SplitConvPass):
    """The same for onnxruntime's FusedConv."""

    domain = "com.microsoft"
    op_type = "FusedConv"
