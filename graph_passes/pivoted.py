"""The pivoted form: a split in fewer numbers, whose first node computes some of the outputs themselves.

    W ~ left @ right,   left = P [I; K]       P a permutation; the rows of the identity are the pivots

                                                                +----------------------------> +
    X --> op W, b --> Y     becomes     X --> op right, b_p ----+                             Concat --> Gather P --> Y
                                                                +--> op K, b_r - K b_p ------> +

Rank `r` needs `r (rows + columns - r)` numbers; the plain split of the same product needs `r (rows + columns)`.
The node that was there computes the other outputs. With as many pivots as rows there are none, and no such node.
`graph_passes.fold_permutations` moves the order of the outputs into what reads Y, where it can.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graph_passes.bias import is_absent
from graph_passes.cleanup import remove_unused
from graph_passes.constants import is_zeros
from graph_passes.parts import Parts, resized
from graph_passes.records import Array
from graph_passes.survey import MARK, PERMUTATION
from graph_passes.weights import NoWeight, Weight, resolve

CONCAT = "concat"
"""Mark of the node that joins the outputs."""


def has_constant_bias(node: ir.Node, size: int) -> bool:
    """Return whether the third input of a node is missing, or a constant with one number for each output."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    constant = resolve(value)
    if isinstance(constant, Weight):
        return constant.shape in ((size,), (1, size)) and not constant.is_overridable
    return value is None or is_zeros(value)


def pivot_order(pivots: Array, rows: int) -> Array:
    """Return the rows of each group, pivots first.

    Args:
        pivots: `(groups, rank)`.
        rows: Rows of a group.

    Returns:
        Integers `(groups, rows)`.

    Examples:
        >>> pivot_order(np.array([[2, 0]]), 4).tolist()
        [[2, 0, 1, 3]]
    """
    return np.stack([np.concatenate([own, np.setdiff1d(np.arange(rows), own)]) for own in pivots])


def rewrite_pivoted(parts: Parts) -> tuple[ir.Node, ir.Node]:
    """Split a node in the pivoted form.

    Args:
        parts: The node and its factors, with their pivots.

    Returns:
        The node that computes the pivots, and the one that computes the other outputs (the Gather if there are none).
    """
    found, factors = parts.found, parts.factors
    node, site, splitter, pivots = found.node, found.site, found.splitter, factors.pivots
    assert pivots is not None
    order = pivot_order(pivots, site.out_features)
    others = order[:, factors.rank :]
    rest = np.take_along_axis(factors.left, others[..., None], axis=1)
    bias_shape, bias = splitter.bias_shape(found), _bias_of(parts) if splitter.bias_is_input else None
    gather = _ordered(parts, order)

    # A product without outputs is invalid, so one output is made for it here, and its node dropped below.
    shown = rest if others.size else np.zeros((site.groups, 1, factors.rank), rest.dtype)
    small = replace(found, site=replace(site, out_features=shown.shape[1]))
    plain = replace(factors, left=shown, form="first", pivots=None)
    first = splitter.rewrite(small, replace(parts, found=small, factors=plain))
    if bias is not None:
        own = np.take_along_axis(bias, pivots, axis=1)
        carried = (rest.astype(np.float64) @ own[..., None])[..., 0]
        _set_bias(first, own, parts)
        if others.size:
            _set_bias(node, np.take_along_axis(bias, others, axis=1) - carried, parts)
        else:
            node.resize_inputs(2)
    _join(parts, [first.outputs[0], node.outputs[0]] if others.size else [first.outputs[0]], gather)
    if factors.bias is not None and not splitter.bias_is_input and not isinstance(bias_shape, NoWeight):
        splitter.add_bias(replace(parts, found=replace(found, node=gather)), bias_shape)
    if others.size:
        return first, node
    left = node.inputs[found.operand]
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    remove_unused(left)
    return first, gather


def _bias_of(parts: Parts) -> Array | None:
    """Return the bias of the node with its correction, float64 `(groups, rows)`, or None."""
    site, correction = parts.found.site, parts.factors.bias
    own = None if is_absent(parts, 2) else resolve(parts.found.node.inputs[2])
    total = np.zeros(site.groups * site.out_features)
    if isinstance(own, Weight):
        total += own.numpy().reshape(-1)
    if correction is not None:
        total += correction
    return None if own is None and correction is None else total.reshape(site.groups, -1)


def _set_bias(node: ir.Node, bias: Array, parts: Parts) -> None:
    """Give a node this bias, `(groups, rows)`, in place of the one it has; a MatMul becomes a Gemm."""
    if node.op_type == "MatMul":
        node.op_type = "Gemm"
    node.resize_inputs(3)
    old = node.inputs[2]
    node.replace_input_with(2, parts.constant(bias.reshape(-1), "bias"))
    remove_unused(old, overridable=True)


def _ordered(parts: Parts, order: Array) -> ir.Node:
    """Put a Gather behind the node, which takes over its output; return the Gather, with the node's output as data."""
    found, names = parts.found, parts.store.names
    node, (groups, rows), rank = found.node, order.shape, parts.factors.rank
    # The channels come as the pivots of all groups, then the other outputs of all groups.
    place = np.empty((groups, rows), np.int32)
    at = np.concatenate(
        [np.arange(groups * rank).reshape(groups, -1), np.arange(groups * rank, groups * rows).reshape(groups, -1)],
        axis=1,
    )
    np.put_along_axis(place, order, at.astype(np.int32), axis=1)
    output, axis = node.outputs[0], _axis(parts)
    value = ir.Value(name=output.name, shape=output.shape, type=output.type, doc_string=output.doc_string)
    value.metadata_props.update(output.metadata_props)
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    output.name, output.shape = (
        names.fresh_value(f"{value.name}/left"),
        None if value.shape is None else value.shape.copy(),
    )
    output.shape = resized(output, axis, groups * (rows - rank) or 1)
    gather = ir.Node(
        "",
        "Gather",
        (output, parts.constant(place.reshape(-1), "order")),
        [ir.AttrInt64("axis", axis)],
        outputs=[value],
        name=names.fresh_node(f"{found.site.node}/order"),
        metadata_props={**node.metadata_props, MARK: PERMUTATION},
    )
    node.append(gather)
    return gather


def _join(parts: Parts, values: Sequence[ir.Value], gather: ir.Node) -> None:
    """Let a Gather read these values, one behind the other."""
    names, (output,) = parts.store.names, gather.outputs
    joined = ir.Value(name=names.fresh_value(f"{output.name}/concat"), type=output.type)
    joined.shape = None if output.shape is None else output.shape.copy()
    concat = ir.Node(
        "",
        "Concat",
        values,
        [ir.AttrInt64("axis", _axis(parts))],
        outputs=[joined],
        name=names.fresh_node(f"{parts.found.site.node}/concat"),
        metadata_props={**gather.metadata_props, MARK: CONCAT},
    )
    gather.prepend(concat)
    gather.replace_input_with(0, joined)


def _axis(parts: Parts) -> int:
    return -1 if parts.found.site.window is None else 1
