"""Read the splits of a graph back from the marked nodes: the form and the rank of each.

The pass of the second node's operator tells the form from the shapes of the two factors.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from graph_passes.operators import find_pass
from graph_passes.survey import MARK
from graph_passes.weights import Weight, resolve


@dataclass(frozen=True, kw_only=True)
class FoundSplit:
    """The two nodes of one split.

    Attributes:
        first: The node that holds `right`; joint splits share it.
        form: Form of the split.
        size: How many numbers `right` holds.
        second_points: Points of the kernel that are in the second node; 1 for a product.
    """

    first: ir.Node
    form: str
    size: int
    second_points: int

    def rank(self, groups: int, in_features: int) -> float:
        """Return the rank: `right` holds `groups * rank * in_features` numbers."""
        return self.size * self.second_points / (groups * in_features)


def found_splits(model: ir.Model) -> dict[str, FoundSplit]:
    """Return the split of every dense node that was split, by the node's name."""
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.metadata_props.get(MARK) == "left":
            producers = (value.producer() for value in node.inputs if value is not None)
            first = next((p for p in producers if p and p.metadata_props.get(MARK) == "right"), None)
            if first is not None:
                found[(node.name or "").removesuffix("/left")] = _read(first, node)
    return found


def _read(first: ir.Node, second: ir.Node) -> FoundSplit:
    right, left = _factor_shape(first), _factor_shape(second)
    splitter = find_pass(second.domain, second.op_type)
    form, points = ("matmul", 1) if splitter is None else splitter.read_form(right, left)
    return FoundSplit(first=first, form=form, size=math.prod(right) if right else 0, second_points=points)


def _factor_shape(node: ir.Node) -> tuple[int, ...]:
    """Shape of the one factor among a node's inputs; it may stand behind layout operators. () where there is none."""
    for value in node.inputs[:2]:
        factor = resolve(value)
        if isinstance(factor, Weight):
            return factor.shape
    return ()
