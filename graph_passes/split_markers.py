"""The splits of a graph, read from the marked nodes themselves: which form each has, and which rank.

right, its mark        left, its mark        form
Conv, kernel 1         Conv, kernel          input         (so a ConvTranspose)
Conv, kernel           Conv, kernel 1        channel       (so a Conv whose own kernel is 1)
Conv, kh x 1           Conv, 1 x kw          separable
anything               Gemm, FusedGemm       gemm
anything               any other             matmul
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.weights import Weight, resolve

MARK = "rsi_deploy.split"


@dataclass(frozen=True, kw_only=True)
class FoundSplit:
    """One node's two.

    Attributes:
        first: the node that holds `right`; joint splits have theirs in common.
        form: of the split.
        size: numbers in `right`.
        second_points: points of the kernel that the second node takes of the first one's; 1 for a product.
    """

    first: ir.Node
    form: str
    size: int
    second_points: int

    def rank(self, groups: int, in_features: int) -> float:
        """The rank, for a weight of so many groups and columns: `right` holds `groups * rank * columns` numbers."""
        return self.size * self.second_points / (groups * in_features)


def found_splits(model: ir.Model) -> dict[str, FoundSplit]:
    """Name of every dense node that was split -> its split."""
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.metadata_props.get(MARK) == "left":
            producers = (value.producer() for value in node.inputs if value is not None)
            first = next((p for p in producers if p and p.metadata_props.get(MARK) == "right"), None)
            if first is not None:
                found[(node.name or "").removesuffix("/left")] = _read(first, node)
    return found


def _read(first: ir.Node, second: ir.Node) -> FoundSplit:
    right, left = _constant_shape(first), _constant_shape(second)
    size = math.prod(right) if right else 0
    if second.op_type == "ConvTranspose":  # its weight is (in, out * kernel): the 1x1 in front has all of `in`
        return FoundSplit(first=first, form="input", size=size, second_points=1)
    if first.op_type == "Conv":
        points, others = math.prod(right[2:]), math.prod(left[2:])
        form = "channel" if others == 1 else "input" if points == 1 else "separable"
        return FoundSplit(first=first, form=form, size=size, second_points=others)
    form = "gemm" if second.op_type in ("Gemm", "FusedGemm") else "matmul"
    return FoundSplit(first=first, form=form, size=size, second_points=1)


def _constant_shape(node: ir.Node) -> tuple[int, ...]:
    """Shape of the one factor among a node's inputs; it may stand behind layout operators. () where there is none."""
    for value in node.inputs[:2]:
        factor = resolve(value)
        if isinstance(factor, Weight):
            return factor.shape
    return ()
