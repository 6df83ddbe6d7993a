"""Shorten what a quantized model's file holds beside its numbers: names of inner values, shapes, comments.

onnxruntime's tools name four to eight values for every node that they add; in a net of 0.3 MB that is a tenth of the
file. Names of nodes stay, for reports and profiles refer to them; so do inputs, outputs and the marks of splits.
"""

from itertools import count

from onnx import GraphProto, ModelProto

DIGITS = "abcdefghijklmnopqrstuvwxyz0123456789"


def compact_(model: ModelProto, kept: frozenset[str]) -> None:
    """Shorten inner names in place.

    Args:
        model: without external data.
        kept: names of nodes that stay.
    """
    if model.functions or any(attribute.type in (5, 10) for node in model.graph.node for attribute in node.attribute):
        return  # the names of subgraphs and functions refer to each other
    _merge_equal_constants_(model.graph)
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
    short: dict[str, str] = {}
    numbers = count()

    def renamed(name: str) -> str:
        if name in fixed:
            return name
        while name not in short:
            if (made := _name(next(numbers))) not in fixed:
                short[name] = made
        return short[name]

    del graph.value_info[:]
    del graph.quantization_annotation[:]
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
        tensor.ClearField("doc_string")
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
        node.ClearField("doc_string")
        if node.name not in kept:
            node.ClearField("name")


def _merge_equal_constants_(graph: GraphProto) -> None:
    """Keep one of the small constants that are equal, such as zero points."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    ends = {value.name for value in (*graph.output, *graph.input)}
    for tensor in list(graph.initializer):
        if tensor.name in ends or tensor.ByteSize() > 4096:
            continue
        name, tensor.name = tensor.name, ""
        key = tensor.SerializeToString(deterministic=True)
        tensor.name = name
        if key in first:
            same[name] = first[key]
            graph.initializer.remove(tensor)
        else:
            first[key] = name
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _name(number: int) -> str:
    """Return a short name: a, b, ..., z, aa, ba, ..."""
    text = DIGITS[number % 26]
    number //= 26
    while number:
        text += DIGITS[number % len(DIGITS)]
        number //= len(DIGITS)
    return text
