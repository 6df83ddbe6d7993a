"""Who else uses a weight, and removing it when nobody does.

root --> layout nodes --> consumer, consumer, ...        none left: the root and its layout nodes go
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graph_passes.weights import Weight, is_layout, resolve


def other_consumers(root: ir.Value) -> Iterator[tuple[ir.Node | None, int]]:
    """Every use of a root behind layout operators, as (node, input index); (None, 0) for a graph output."""
    if root.is_graph_output():
        yield None, 0
    for node, index in root.uses():
        if is_layout(node) and index == 0:
            yield from other_consumers(node.outputs[0])
        else:
            yield node, index


def freeze_shapes(root: ir.Value) -> None:
    """Replaces `Shape(weight)` by its value, so that only the shape of a split weight is kept.

    The torch exporter asks for the shape of a Conv weight to make the zeros of a missing bias.
    """
    for node, _ in tuple(other_consumers(root)):
        weight = None if node is None or node.op_type != "Shape" else resolve(node.inputs[0])
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
        remove_unused(data)


def remove_unused(value: ir.Value | None) -> None:
    """Drops an initializer, or the chain of nodes that makes a value, once nobody uses it."""
    if value is None or value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    producer = value.producer()
    if value.is_initializer():
        if value.graph is not None and value.name is not None:
            del value.graph.initializers[value.name]
            value.const_value = None  # a graph is full of cycles: else the weight lives on until they are collected
    elif producer is not None and producer.graph is not None and len(producer.outputs) == 1:
        inputs = tuple(producer.inputs)
        producer.graph.remove(producer, safe=True)
        for operand in inputs:
            remove_unused(operand)
