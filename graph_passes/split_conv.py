"""Conv, in three forms: which spatial axes the first node takes, the second takes the others.

    weight (out, in/groups, *kernel) = W (groups, rows, columns), one factorization a group (the matrices: forms.py)

    X --> Conv kernel, stride, pads, dilation, group --> Y
          weight (out, in/groups, *kernel), bias
    becomes, in channel form
    X --> Conv kernel, stride, pads, dilation, group --> Conv 1x1, group --> Y
          right (groups * rank, in/groups, *kernel)      left (out, rank, 1, ...), bias
    in input form
    X --> Conv 1x1, group --> Conv kernel, stride, pads, dilation, group --> Y
          right (groups * rank, in/groups, 1, ...)
                              left (out, rank, *kernel), bias
    in separable form, of two spatial axes
    X --> Conv kh x 1, vertical stride, ... --> Conv 1 x kw, horizontal stride, ... --> Y
          right (groups * rank, in/groups, kh, 1)       left (out, rank, 1, kw), bias

Each group's left mixes that group's own `rank` channels only, so both have the same group count. The first has no bias:
what the second pads with must be zero. auto_pad goes where the kernel goes: it works an axis at a time, and a kernel of
1 with stride 1 needs no pads. onnxruntime's FusedConv is a Conv with an activation and maybe a sum Z, which both stay
with the second one.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from graph_passes.axis_rules.moves import CHANNELS
from graph_passes.axis_rules.products import windowed
from graph_passes.forms import Form, conv_forms, first_axes
from graph_passes.macs.convolutions import conv
from graph_passes.parts import Parts
from graph_passes.pivoted import has_constant_bias
from graph_passes.response import Contraction, RowOrder
from graph_passes.split_pass import SplitPass
from graph_passes.survey import Found
from graph_passes.weights import NoWeight, Weight
from graph_passes.window import Window, window_of

SPATIAL = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


class SplitConvPass(SplitPass):
    """Splits a Conv of any number of spatial axes, grouped and depthwise ones too."""

    op_type = "Conv"
    form = "channel"
    operands = (1,)
    bias_is_input = True
    contraction: ClassVar[Contraction | None] = Contraction.CONV
    macs = staticmethod(conv)
    axis_rule = staticmethod(partial(windowed, channels=CHANNELS))

    @staticmethod
    def can_pivot(node: ir.Node, operand: int, weight: Weight) -> bool:
        """Accept a bias that is missing or constant."""
        return has_constant_bias(node, weight.shape[0] * weight.shape[1])

    @staticmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Return (out, in/groups, *kernel) as one matrix a group."""
        groups = node.attributes.get_int("group", 1)
        out_channels, *rest = weight.shape or (0,)
        if groups < 1 or out_channels % groups or len(rest) < 2:
            return NoWeight(reason=f"weight of shape {weight.shape} does not fit a Conv of {groups} groups")
        return weight.reshaped(groups, out_channels // groups, math.prod(rest))

    @classmethod
    def forms(cls, shape: tuple[int, ...]) -> tuple[Form, ...]:
        """Return the forms that differ for its kernel."""
        return conv_forms(shape[2:])

    @staticmethod
    def window(node: ir.Node, shape: tuple[int, ...]) -> Window:
        """Return the window of the kernel, which stands behind the channels."""
        return window_of(node, shape[2:])

    @classmethod
    def read_form(cls, right: tuple[int, ...], left: tuple[int, ...]) -> tuple[Form, int]:
        """Tell the forms apart by the kernels; a weight whose own kernel is 1 has the channel form."""
        first, second = math.prod(right[2:]), math.prod(left[2:])
        return "channel" if second == 1 else "input" if first == 1 else "separable", second

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Accept every Conv: it is the ordinary convolution."""
        return RowOrder()

    @staticmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Split the spatial attributes by axes; the second node keeps the bias."""
        node, site, rank = found.node, found.site, parts.factors.rank
        out_channels, (_, in_channels, *kernel) = site.groups * site.out_features, found.shape
        first_of = first_axes(parts.form, len(kernel))
        second_of = range(len(first_of), len(kernel))
        first_kernel = [size if axis in first_of else 1 for axis, size in enumerate(kernel)]
        second_kernel = [size if axis in second_of else 1 for axis, size in enumerate(kernel)]
        right = parts.operand("right", (site.groups * rank, in_channels, *first_kernel))
        left = parts.operand("left", (out_channels, rank, *second_kernel), matrices=out_channels, turned=True)
        attributes = [*_spatial(node, first_of, first_kernel), ir.AttrInt64("group", site.groups)]
        shape = _between(node, first_of, site.groups * rank)
        first = parts.first("Conv", (node.inputs[0], right), attributes, shape=shape)
        own = _spatial(node, second_of, second_kernel)
        for name in SPATIAL:
            node.attributes.pop(name, None)
        for attribute in own:
            node.attributes.add(attribute)
        node.replace_input_with(0, first.outputs[0])
        node.replace_input_with(1, left)
        return first


class SplitFusedConvPass(SplitConvPass):
    """Splits onnxruntime's FusedConv, a Conv with an activation and maybe a sum, in the same way."""

    domain = "com.microsoft"
    op_type = "FusedConv"
    linear = False
    contraction = None
    axis_rule = staticmethod(partial(windowed, channels=CHANNELS, like="Conv", extra=3))  # 3 is the sum `Z`


def _spatial(node: ir.Node, axes: Sequence[int], kernel: Sequence[int]) -> list[ir.Attr]:
    """Return the spatial attributes of a Conv on some of its axes; on the others they do nothing."""
    own: list[ir.Attr] = [ir.AttrInt64s("kernel_shape", kernel)]
    if not axes:
        return own
    for name, nothing in (("dilations", 1), ("pads", 0), ("strides", 1)):
        if name in node.attributes:
            numbers = node.attributes[name].as_ints()
            own.append(ir.AttrInt64s(name, [n if i % len(kernel) in axes else nothing for i, n in enumerate(numbers)]))
    return own + [node.attributes[name] for name in ("auto_pad",) if name in node.attributes]


def _between(node: ir.Node, axes: Sequence[int], channels: int) -> ir.Shape | None:
    """Return the shape between the two: of the output on the first node's axes, of the data on the others."""
    before, after = (None if value is None else value.shape for value in (node.inputs[0], node.outputs[0]))
    batch = after if axes else before
    others = before if batch is not None and len(axes) + 2 < len(batch) else batch
    if batch is None or others is None or len(others) != len(batch) or len(batch) < 2:
        return None
    sizes = (batch[axis] if axis - 2 in axes else others[axis] for axis in range(2, len(batch)))
    return ir.Shape([batch[0], channels, *sizes])
