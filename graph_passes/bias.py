"""Bias corrections: numbers that come with the factors, one for each output channel or feature.

    op X, W, b                ->  op X, W, b + delta                  an input that is constant, zeros, or missing
    op X, W, computed b       ->  op X, W, Add(b, delta)
    Add(MatMul(X, W), c)      ->  Add(MatMul(X, W), c + delta)        c constant, the product used nowhere else
    MatMul(X, W) --> Y        ->  Add(MatMul(X, W), delta) --> Y      the Add takes over Y's name, type, shape and users

Constants are never changed in place, for other nodes may use them. `c + delta` keeps the name of c where none does.
"""

import math

import numpy as np
import onnx_ir as ir

from graph_passes.cleanup import other_consumers, remove_unused
from graph_passes.constants import is_zeros
from graph_passes.marks import MARK
from graph_passes.parts import Parts
from graph_passes.weights import Weight, resolve


def is_absent(parts: Parts, index: int) -> bool:
    """Return whether an input is missing or zeros that are not stored: so the torch exporter writes no bias."""
    node = parts.found.node
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is None or (_constant(parts, value, ()) is None and is_zeros(value))


def add_to_input(
    parts: Parts, index: int, shape: tuple[int, ...], *, scale: float = 1.0, replace: bool = False
) -> None:
    """Add the correction to the input of a node that is added to its product.

    Args:
        parts: The node and its correction.
        index: The input.
        shape: The shape in which the correction broadcasts against the input.
        scale: Factor by which the correction is multiplied first.
        replace: Replace the input by the correction instead of adding to it.
    """
    node, absent = parts.found.node, is_absent(parts, index)
    node.resize_inputs(max(len(node.inputs), index + 1))
    old = node.inputs[index]
    constant = _constant(parts, old, shape)
    if old is None or absent or replace:
        node.replace_input_with(index, parts.bias(shape, scale))
        if absent or constant is not None:
            remove_unused(old, overridable=True)
    elif constant is not None:
        _replace_constant(parts, node, index, constant, shape, scale)
    else:
        value = ir.Value(name=parts.store.names.fresh_value(f"{old.name}/bias"))
        if not parts.found.in_function:
            value.type = ir.TensorType(parts.found.weight.dtype)
        node.prepend(_add(parts, old, parts.bias(shape, scale), value))
        node.replace_input_with(index, value)


def add_behind(parts: Parts, shape: tuple[int, ...]) -> None:
    """Add the correction to the output of a node: to the constant of the Add behind it, or by a new Add."""
    node = parts.found.node
    output = node.outputs[0]
    if (behind := _add_of_constant(parts, shape)) is not None:
        consumer, index, constant = behind
        _replace_constant(parts, consumer, index, constant, shape, 1.0)
        return
    value = ir.Value(
        name=output.name,
        shape=None if output.shape is None else output.shape.copy(),
        type=output.type,
        doc_string=output.doc_string,
    )
    value.metadata_props.update(output.metadata_props)
    add = _add(parts, output, parts.bias(shape), value)
    node.append(add)
    output.replace_all_uses_with(value, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    output.name = parts.store.names.fresh_value(f"{output.name}/left")


def _add(parts: Parts, left: ir.Value, right: ir.Value, output: ir.Value) -> ir.Node:
    node, site = parts.found.node, parts.found.site
    return ir.Node(
        "",
        "Add",
        (left, right),
        outputs=[output],
        name=parts.store.names.fresh_node(f"{site.node}/bias"),
        doc_string=node.doc_string,
        metadata_props={**node.metadata_props, MARK: "bias"},
    )


def _constant(parts: Parts, value: ir.Value | None, shape: tuple[int, ...]) -> Weight | None:
    """Return a stored constant that broadcasts against a shape and that no caller can override."""
    constant = resolve(value)
    if not isinstance(constant, Weight) or (constant.is_overridable and not parts.store.overridable):
        return None
    pairs = zip(reversed(constant.shape), reversed(shape), strict=False)
    return constant if all(a == b or 1 in (a, b) for a, b in pairs) else None


def _add_of_constant(parts: Parts, shape: tuple[int, ...]) -> tuple[ir.Node, int, Weight] | None:
    """Return the Add that alone uses the output, with its constant, unless the sum of the constants would be larger."""
    node = parts.found.node
    output, uses = node.outputs[0], node.outputs[0].uses()
    if len(uses) != 1 or output.is_graph_output():
        return None
    ((consumer, index),) = uses
    is_add = (consumer.op_type, consumer.domain, len(consumer.inputs)) == ("Add", "", 2)
    if not is_add or consumer.graph is not node.graph:
        return None
    constant = _constant(parts, consumer.inputs[1 - index], shape)
    if constant is None:
        return None
    size = math.prod(np.broadcast_shapes(constant.shape, shape))
    return (consumer, 1 - index, constant) if size <= max(math.prod(constant.shape), math.prod(shape)) else None


def _replace_constant(
    parts: Parts, node: ir.Node, index: int, old: Weight, shape: tuple[int, ...], scale: float
) -> None:
    """Replace the constant `old` of a node by `old + scale * correction`."""
    value = node.inputs[index]
    is_private = all((consumer, place) == (node, index) for consumer, place in other_consumers(old.root))
    node.replace_input_with(index, None)
    if is_private:
        remove_unused(value, overridable=True)
    new = parts.corrected(old, shape, scale, before=node if is_private else None)
    node.replace_input_with(index, new)
    remove_unused(value, overridable=True)
