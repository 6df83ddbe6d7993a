"""MACs of convolutions in any layout of their data.

Conv             output elements * numbers in one filter, (in / groups) * kernel
ConvTranspose    input elements * numbers in the filter of one input channel, (out / groups) * kernel

Points in the padding count.
"""

import math
from functools import partial

from graph_passes.macs.executed_node import ExecutedNode, Formula, Macs, Operator


def conv(node: ExecutedNode, weight: int = 1) -> Macs:
    """Count a Conv or a relative of it; `weight` is the position of the weight (out, in / groups, *kernel)."""
    return Macs(node.output_size * math.prod(node.input(weight)[1:]))


def conv_transpose(node: ExecutedNode, weight: int = 1) -> Macs:
    """Count a ConvTranspose or a relative of it, weight (in, out / groups, *kernel)."""
    return Macs(math.prod(node.input(0)) * math.prod(node.input(weight)[1:]))


def word_conv(node: ExecutedNode) -> Macs:
    """Count WordConvEmbedding: a filter (filters, 1, window, character size) slides over every word."""
    (*words, characters), weight = node.input(0), node.input(1)
    return Macs(math.prod(words) * max(characters - weight[2] + 1, 1) * math.prod(weight))


QUANTIZED = 3
"""Position of the weight of a QLinearConv."""

FORMULAS: dict[Operator, Formula] = {
    ("", "CausalConvWithState"): conv,
    ("", "ConvInteger"): conv,
    ("", "DeformConv"): conv,
    ("", "QLinearConv"): partial(conv, weight=QUANTIZED),
    ("com.microsoft", "CausalConvWithState"): conv,
    ("com.microsoft", "ConvTransposeWithDynamicPads"): conv_transpose,
    ("com.microsoft", "NhwcConv"): conv,
    ("com.microsoft", "NhwcFusedConv"): conv,
    ("com.microsoft", "QLinearConv"): partial(conv, weight=QUANTIZED),
    ("com.microsoft", "VarlenCausalConvWithState"): conv,
    ("com.microsoft", "WordConvEmbedding"): word_conv,
    ("com.microsoft.nchwc", "Conv"): conv,  # channels are filled up to whole blocks, and those count
    ("com.ms.internal.nhwc", "Conv"): conv,
    ("com.ms.internal.nhwc", "ConvTranspose"): conv_transpose,
    ("com.ms.internal.nhwc", "QLinearConv"): partial(conv, weight=QUANTIZED),
    ("com.ms.internal.nhwc", "QLinearConvTranspose"): partial(conv_transpose, weight=QUANTIZED),
}
