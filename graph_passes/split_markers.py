"""Read the splits of a graph back from the marked nodes: the form and the rank of each.

The pass of the second node's operator tells the form from the shapes of the two factors. Quantized models are read too:

    right --> QuantizeLinear, Cast, Mul, ... --> left        nodes that quantization puts between the two
    int8 or int4 factor --> DequantizeLinear, Cast, ... --> operand
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graph_passes.constants import stored_array, stored_tensor
from graph_passes.forms import FOLDED
from graph_passes.marks import CONCAT, MARK
from graph_passes.operators import find_pass
from graph_passes.weights import Weight, resolve

QUANTIZED_NAME = "_quant"
"""Suffix of the name of a node that onnxruntime quantizes for dynamic ranges."""
BETWEEN = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast", "Mul", "Add"})
"""Operators that quantization puts between the two nodes of a split."""
UNPACKING = frozenset({"DequantizeLinear", "Cast", "Mul", "Add", "Sub", "Div", "Mod", "Slice", "Reshape"})
"""Operators that turn a stored factor of few bits into an operand."""


@dataclass(frozen=True, kw_only=True)
class FoundSplit:
    """The two nodes of one split.

    Attributes:
        first: The node that holds `right`; joint splits share it.
        form: Form of the split; "matmul" for an integer product, which may come from a Gemm.
        size: How many numbers `right` holds; 0 where its shape cannot be read.
        second_points: Points of the kernel that are in the second node; 1 for a product.
        kept: Inputs that are left in a split in the form "units" or "heads"; 0 for other forms.
    """

    first: ir.Node
    form: str
    size: int
    second_points: int
    kept: int = 0

    def rank(self, groups: int, in_features: int) -> float:
        """Return the rank: `right` holds `groups * rank * in_features` numbers."""
        return self.kept or self.size * self.second_points / (groups * in_features)


def found_splits(model: ir.Model) -> dict[str, FoundSplit]:
    """Return the split of every dense node that was split, by the node's name."""
    found = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        mark = node.metadata_props.get(MARK)
        if mark in FOLDED:
            split: FoundSplit | None = _read_folded(node, mark)
        else:
            first = _first_of(node) if mark == "left" else None
            split = None if first is None else _read(first, node)
        if split is not None:
            name = (node.name or "").removesuffix(QUANTIZED_NAME)
            found[name.removesuffix("/left")] = split
    return found


def _first_of(second: ir.Node) -> ir.Node | None:
    """Return the node of `right`: the nearest marked one before a node, with nothing but `BETWEEN` on the way."""
    waiting, seen = deque([second]), {second}
    while waiting:
        for value in waiting.popleft().inputs:
            producer = None if value is None else value.producer()
            if producer is None or producer in seen:
                continue
            if MARK in producer.metadata_props:
                if producer.metadata_props[MARK] == "right":
                    return producer
            elif producer.op_type in BETWEEN:
                seen.add(producer)
                waiting.append(producer)
    return None


def _read(first: ir.Node, second: ir.Node) -> FoundSplit:
    right, left = _factor_shape(first), _factor_shape(second)
    splitter = find_pass(second.domain, second.op_type)
    form, points = ("matmul", 1) if splitter is None else splitter.read_form(right, left)
    form = "pivoted" if _is_pivoted(second) else form
    return FoundSplit(first=first, form=form, size=math.prod(right) if right else 0, second_points=points)


def _read_folded(node: ir.Node, form: str) -> FoundSplit:
    """Read a split in the form "units" or "heads", which has one node."""
    left = _factor_shape(node)
    columns = left[1 if "Conv" in node.op_type else 0] if len(left) > 1 else 0
    return FoundSplit(first=node, form=form, size=math.prod(left), second_points=1, kept=columns)


def _is_pivoted(second: ir.Node) -> bool:
    """Return whether the outputs of a node are joined with the pivots."""
    waiting, seen = [second], {second}
    while waiting:
        for user, _ in waiting.pop().outputs[0].uses():
            if user.metadata_props.get(MARK) == CONCAT:
                return True
            if user.op_type in BETWEEN and user not in seen:
                seen.add(user)
                waiting.append(user)
    return False


def _factor_shape(node: ir.Node) -> tuple[int, ...]:
    """Shape of the one factor among a node's inputs; it may stand behind layout operators. () where there is none."""
    if node.op_type == "MatMulNBits":  # the stored array is packed
        return node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    return next(filter(None, map(_constant_shape, node.inputs[:2])), ())


def _constant_shape(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of a stored constant behind layout operators or what unpacks it; () where it is none."""
    factor = resolve(value)
    if isinstance(factor, Weight):
        return factor.shape
    if value is None:
        return ()
    tensor, producer = stored_tensor(value), value.producer()
    if tensor is not None:
        return tuple(tensor.shape.numpy())
    if producer is None or producer.domain != "" or producer.op_type not in UNPACKING:
        return ()
    shape = _constant_shape(producer.inputs[0])
    if not shape or producer.op_type not in ("Mul", "Reshape"):
        return shape  # what else unpacks changes no shape, or stands before a Reshape
    if producer.op_type == "Mul":
        times = _constant_shape(producer.inputs[1])
        return np.broadcast_shapes(shape, times) if times else ()
    target = stored_array(producer.inputs[1])
    return () if target is None else tuple(map(int, target))
