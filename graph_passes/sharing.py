"""Weights that cannot be split because of other nodes: factors of an old split, and weights with other users.

x --> op X.right --> op X.left --> y          a pair of an earlier split that has lost its marks
w --> MatMul, w --> Gather                    a tied weight: a split would keep it and grow the file
w --> Conv, w --> ConvTranspose               a tied kernel: a split would need two pairs of factors
"""

import re
from collections.abc import Hashable, Mapping

import onnx_ir as ir

from graph_passes.cleanup import other_consumers
from graph_passes.names import name_of

_FACTOR_NAME = re.compile(r".+\.(right|left)(?:_\d+)?")


def low_rank_pairs(found: Mapping[ir.Node, tuple[str, ir.Value | None]]) -> dict[ir.Node, str]:
    """Find pairs of earlier splits whose marks another tool has dropped: two products in a row, by the factors' names.

    The names decide, because networks hold such pairs by design: the linear bottlenecks of MobileNetV2 are two 1x1
    Convs in a row, and each of them is a site.

    Args:
        found: Name of the weight and the data operand of each node.
    """
    reasons: dict[ir.Node, str] = {}
    for node, (weight, data) in found.items():
        producer = None if data is None else data.producer()
        if producer is None or producer not in found:
            continue
        right, left = (_FACTOR_NAME.fullmatch(name) for name in (found[producer][0], weight))
        if right and left and (right[1], left[1]) == ("right", "left"):
            reasons[producer] = f"already low-rank together with {name_of(node)!r}"
            reasons[node] = f"already low-rank together with {name_of(producer)!r}"
    return reasons


def shared_with_others(found: Mapping[ir.Node, tuple[int, ir.Value]], *, keep_shapes: bool) -> dict[ir.Node, str]:
    """Find nodes whose weight another node needs dense, with the reason.

    Args:
        found: Input index and root of the weight of each node that could be split.
        keep_shapes: Count a Shape of the weight as a user; otherwise its value replaces it.
    """
    by_root: dict[ir.Value, str] = {}
    for _, root in found.values():
        if root not in by_root:
            by_root[root] = _foreign_use(root, found, keep_shapes)
    return {
        node: f"weight {by_root[root]}: splitting would keep it and grow the file"
        for node, (_, root) in found.items()
        if by_root[root]
    }


def used_in_other_ways(found: Mapping[ir.Node, tuple[ir.Value, Hashable]]) -> dict[ir.Node, str]:
    """Find nodes whose weight another node uses in a way that needs a second pair of factors, with the reason.

    Args:
        found: Root of the weight of each node, and a key of the way in which it is used.
    """
    reasons: dict[ir.Node, str] = {}
    first: dict[ir.Value, ir.Node] = {}
    for node, (root, way) in found.items():
        other = first.setdefault(root, node)
        if found[other][1] != way:
            for one, two in ((node, other), (other, node)):
                reasons.setdefault(one, _other_way(two))
    return {n: reasons.get(n) or reasons[first[root]] for n, (root, _) in found.items() if first[root] in reasons}


def _other_way(node: ir.Node) -> str:
    return f"{node.op_type} {name_of(node)!r} uses the weight otherwise: two pairs of factors would grow the file"


def _foreign_use(root: ir.Value, found: Mapping[ir.Node, tuple[int, ir.Value]], keep_shapes: bool) -> str:
    for consumer, index in other_consumers(root):
        if consumer is None:
            return "is a graph output"
        is_shape = consumer.op_type == "Shape" and not keep_shapes
        if not is_shape and (consumer not in found or found[consumer][0] != index):
            return f"is also used by {consumer.op_type} {name_of(consumer)!r}"
    return ""
