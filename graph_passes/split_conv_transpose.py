"""ConvTranspose, input form.

    weight (in, out/groups, *kernel) = W^T, W (groups, out/groups * prod(kernel), in/groups), one factorization a group

    X --> ConvTranspose kernel, stride, pads, dilation, output_padding, output_shape, group --> Y
          weight (in, out/groups, *kernel), bias
    becomes
    X --> Conv 1x1, group --> ConvTranspose, all attributes as they were --> Y
          right (groups * rank, in/groups, 1, ...)
                              left^T (groups * rank, out/groups, *kernel), bias

A ConvTranspose multiplies the channels of each position by W and sums what overlaps, so the product with `right` comes
first, at the smaller resolution of the input, and what is spatial stays in one place.
"""

import math
from functools import partial

import onnx_ir as ir

from graph_passes.axis_rules.moves import CHANNELS
from graph_passes.axis_rules.products import windowed
from graph_passes.macs.convolutions import conv_transpose
from graph_passes.parts import Parts, resized
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight
from graph_passes.window import Window, window_of


class SplitConvTransposePass(SplitPass):
    """Splits a ConvTranspose of any number of spatial axes and groups into 1x1 and kernel."""

    op_type = "ConvTranspose"
    form = "input"
    operands = (1,)
    macs = staticmethod(conv_transpose)
    axis_rule = staticmethod(partial(windowed, channels=CHANNELS))

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Return (in, out/groups, *kernel) as one transposed matrix a group."""
        groups = node.attributes.get_int("group", 1)
        in_channels, *rest = weight.shape or (0,)
        if groups < 1 or in_channels % groups or len(rest) < 2:
            return NoWeight(reason=f"weight of shape {weight.shape} does not fit a ConvTranspose of {groups} groups")
        return weight.reshaped(groups, in_channels // groups, math.prod(rest)).transposed(0, 2, 1)

    @staticmethod
    def window(node: ir.Node, shape: tuple[int, ...]) -> Window:
        """Return the window of the kernel, which stands behind the channels."""
        return window_of(node, shape[2:])

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Put a 1x1 Conv in front; the ConvTranspose keeps all but its number of input channels."""
        node, site, rank = found.node, found.site, parts.factors.rank
        data = node.inputs[0]
        ones = (1,) * (len(found.shape) - 2)
        right = parts.operand("right", (site.groups * rank, site.in_features, *ones))
        left = parts.operand("left", (site.groups * rank, *found.shape[1:]), turned=True)
        attributes = [ir.AttrInt64("group", site.groups), ir.AttrInt64s("kernel_shape", ones)]
        shape = None if data is None else resized(data, 1, site.groups * rank)
        first = parts.first("Conv", (data, right), attributes, shape=shape)
        node.replace_input_with(0, first.outputs[0])
        node.replace_input_with(1, left)
        return first
