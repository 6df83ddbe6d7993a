"""The users of a weight, and its removal once it has none.

root --> layout nodes --> consumer, consumer, ...        without consumers the root and its layout nodes go
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graph_passes.constants import is_layout
from graph_passes.weights import Weight, resolve


def other_consumers(root: ir.Value) -> Iterator[tuple[ir.Node | None, int]]:
    """Yield every use of a root behind layout operators, as (node, input index); (None, 0) for a graph output."""
    pending, seen = [root], {root}
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            yield None, 0
        for node, index in value.uses():
            if not (is_layout(node) and index == 0):
                yield node, index
            elif node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                pending.append(node.outputs[0])


def freeze_shapes(root: ir.Value) -> None:
    """Replace `Shape(weight)` by its value where nothing else uses the weight, so that the weight can go.

    The torch exporter makes the zeros of a missing bias from the shape of the Conv weight.
    """
    consumers = tuple(other_consumers(root))
    if any(node is None or node.op_type != "Shape" for node, _ in consumers):
        return
    for node, _ in consumers:
        weight = None if node is None else resolve(node.inputs[0])
        if node is None or node.graph is None or not isinstance(weight, Weight):
            continue
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(weight.shape))
        shape = ir.tensor(np.array(weight.shape[start:end], np.int64))
        constant = ir.Node("", "Constant", (), [ir.AttrTensor("value", shape)], name=node.name)
        old, new = node.outputs[0], constant.outputs[0]
        new.type, new.shape, new.name = old.type, old.shape, old.name
        node.prepend(constant)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        data = node.inputs[0]
        node.graph.remove(node, safe=True)
        remove_unused(data, overridable=True)


def remove_unused(value: ir.Value | None, *, overridable: bool = False) -> None:
    """Drop an initializer, or the chain of nodes that makes a value, once nothing uses it.

    Args:
        value: The value; nothing happens while it is used.
        overridable: Drop an initializer that is a graph input too, and the input with it.
    """
    pending = [value]
    while pending:
        value = pending.pop()
        if value is None or value.uses() or value.is_graph_output():
            continue
        producer = value.producer()
        if value.is_initializer() and (overridable or not value.is_graph_input()):
            _remove_initializer(value)
        elif producer is not None and producer.graph is not None and len(producer.outputs) == 1:
            pending.extend(producer.inputs)  # before the removal, which takes them away
            producer.graph.remove(producer, safe=True)


def _remove_initializer(value: ir.Value) -> None:
    graph = value.graph
    if graph is None or value.name is None:
        return
    del graph.initializers[value.name]
    if value.is_graph_input():
        graph.inputs.remove(value)
    value.const_value = None  # the graph has cycles, which would keep the weight until they are collected
