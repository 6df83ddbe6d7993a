"""Iterate over all tensors, nodes and graphs of an ONNX model, including subgraphs, attributes and local functions."""

from collections.abc import Iterable, Iterator

from google.protobuf.message import Message
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield initializers and tensors in attributes; sparse tensors yield their values and their indices."""
    for graph in all_graphs(model):
        yield from graph.initializer
    for attribute in all_attributes(model):
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
    for sparse in all_sparse(model):
        yield sparse.values
        yield sparse.indices


def all_sparse(model: ModelProto) -> Iterator[SparseTensorProto]:
    """Yield sparse initializers, and sparse tensors in attributes."""
    for graph in all_graphs(model):
        yield from graph.sparse_initializer
    for attribute in all_attributes(model):
        if attribute.HasField("sparse_tensor"):
            yield attribute.sparse_tensor
        yield from attribute.sparse_tensors


def all_graphs(model: ModelProto) -> Iterator[GraphProto]:
    """Yield the main graph and every subgraph, including those in local functions."""
    yield model.graph
    yield from _below(model.graph.node)
    for function in model.functions:
        yield from _below(function.node)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Yield every node of the model."""
    for graph in all_graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def all_attributes(model: ModelProto) -> Iterator[AttributeProto]:
    """Yield every attribute of every node."""
    for node in all_nodes(model):
        yield from node.attribute


def texts(message: Message) -> Iterator[str | bytes]:
    """Yield every string in a message, except the data of tensors; as bytes where it is not UTF-8."""
    if isinstance(message, TensorProto):  # reading its data would copy them
        yield message.name
        yield message.doc_string
        for entry in message.external_data:
            yield from (entry.key, entry.value)
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                yield from texts(each)
        elif field.type == field.TYPE_STRING:
            yield from value if field.is_repeated else (value,)


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs in the node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _below(nodes: Iterable[NodeProto]) -> Iterator[GraphProto]:
    for node in nodes:
        for graph in subgraphs(node):
            yield graph
            yield from _below(graph.node)
