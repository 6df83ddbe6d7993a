"""The pivoted form: a split in fewer numbers, whose first node computes some of the outputs themselves.

    W ~ left @ right,   left = P [I; K]       P a permutation; the rows of the identity are the pivots

                                                                +----------------------------> +
    X --> op W, b --> Y     becomes     X --> op right, b_p ----+                             Concat --> Gather P --> Y
                                                                +--> op K, b_r - K b_p ------> +

Rank `r` needs `r (rows + columns - r)` numbers; the plain split of the same product needs `r (rows + columns)`.
The node that was there computes the other outputs. With as many pivots as rows there are none, and no such node.
`graph_passes.fold_permutations` moves the order of the outputs into what reads Y, where it can.
"""

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graph_passes.bias import is_absent
from graph_passes.cleanup import remove_unused
from graph_passes.constants import is_zeros
from graph_passes.marks import CONCAT, MARK, PERMUTATION
from graph_passes.parts import Parts, resized
from graph_passes.records import Array
from graph_passes.weights import NoWeight, Weight, resolve


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
        The node that computes the pivots, and the one that computes the other outputs (the last one if there are none).
    """
    found, factors = parts.found, parts.factors
    node, site, splitter, pivots = found.node, found.site, found.splitter, factors.pivots
    assert pivots is not None
    others = pivot_order(pivots, site.out_features)[:, factors.rank :]
    rest = np.take_along_axis(factors.left, others[..., None], axis=1)
    bias_shape, bias = splitter.bias_shape(found), _bias_of(parts) if splitter.bias_is_input else None
    output = _taken_output(parts, others.shape[1])

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
    last = _joined(parts, pivots, others, [first.outputs[0], node.outputs[0]][: 1 + bool(others.size)], output)
    if factors.bias is not None and not splitter.bias_is_input and not isinstance(bias_shape, NoWeight):
        splitter.add_bias(replace(parts, found=replace(found, node=last)), bias_shape)
    if others.size:
        return first, node
    left = node.inputs[found.operand]
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    remove_unused(left)
    return first, last


def _taken_output(parts: Parts, rows: int) -> ir.Value:
    """Take the output away from the node, which gets one of so many rows a group; return it for a later node."""
    output = parts.found.node.outputs[0]
    shape = None if output.shape is None else output.shape.copy()
    value = ir.Value(name=output.name, shape=shape, type=output.type, doc_string=output.doc_string)
    value.metadata_props.update(output.metadata_props)
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    output.name = parts.store.names.fresh_value(f"{value.name}/left")
    output.shape = resized(output, _axis(parts), max(parts.found.site.groups * rows, 1))
    return value


def _joined(parts: Parts, pivots: Array, others: Array, values: list[ir.Value], output: ir.Value) -> ir.Node:
    """Join the values and put them in order, behind the node; return the last new node, which makes the output."""
    found, names = parts.found, parts.store.names
    node, axis = found.node, ir.AttrInt64("axis", _axis(parts))
    rows = found.site.out_features
    parted = [(np.arange(len(each))[:, None] * rows + each).reshape(-1) for each in (pivots, others)]
    if others.size and others[0, 0] == 0:  # so that pivots that are the last rows need no other order
        parted, values = parted[::-1], values[::-1]
    order = np.concatenate(parted)
    natural = np.array_equal(order, np.arange(len(order)))
    joined = output
    if not natural:
        joined = ir.Value(name=names.fresh_value(f"{output.name}/concat"), type=output.type)
        joined.shape = None if output.shape is None else output.shape.copy()
    name = names.fresh_node(f"{found.site.node}/concat")
    marks = {**node.metadata_props, MARK: CONCAT}
    concat = ir.Node("", "Concat", values, [axis], outputs=[joined], name=name, metadata_props=marks)
    node.append(concat)
    if natural:
        return concat
    indices = parts.constant(np.argsort(order).astype(np.int32), "order")
    name = names.fresh_node(f"{found.site.node}/order")
    marks = {**node.metadata_props, MARK: PERMUTATION}
    gather = ir.Node("", "Gather", (joined, indices), [axis], outputs=[output], name=name, metadata_props=marks)
    concat.append(gather)
    return gather


def _axis(parts: Parts) -> int:
    return -1 if parts.found.site.window is None else 1


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
