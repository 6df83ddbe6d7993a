"""Check that ONNX's standard operators match their definitions: types of attributes, numbers of inputs and outputs.

Operators of other domains, and those that the installed onnx does not know, are left to the runtime.
"""

import functools
from collections.abc import Iterable
from typing import Any

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, OperatorSetIdProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import describe_node, quoted_name
from rsi_deploy.io.onnx_checks.parts import subgraphs

# The field that holds an attribute's value for these types; it must be set, as a missing message reads as an empty one.
_HOLDERS = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def check_nodes(model: ModelProto, name: str) -> None:
    """Check every node against the definition of its operator.

    Args:
        model: model to check.
        name: file name for messages.

    Raises:
        ModelError: A node does not match; the message names it, what it has and what its operator expects.
    """
    _check_all(model.graph.node, _opset(model.opset_import), name, inside=False)
    for function in model.functions:
        _check_all(function.node, _opset(function.opset_import), name, inside=True)


def _check_all(nodes: Iterable[NodeProto], opset: int, name: str, *, inside: bool) -> None:
    """Check nodes and their subgraphs; only `inside` a function may an attribute refer to one of the function's."""
    for node in nodes:
        where = f"{name}: node {describe_node(node)}"
        if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
            raise ModelError(f"{where} has two attributes of one name", hint="export the model again")
        for attribute in node.attribute:
            if attribute.ref_attr_name and not inside:
                raise ModelError(
                    f"{where}: its attribute {quoted_name(attribute.name)} refers to an attribute of a function, but "
                    "the node is not in one",
                    hint="export the model again",
                )
            if attribute.ref_attr_name and attribute.type in _GRAPHS:
                raise ModelError(
                    f"{where}: its attribute {quoted_name(attribute.name)} is a graph that the caller of a function "
                    "passes, which is not supported",
                    hint="inline the functions first: onnx.inliner.inline_local_functions",
                )
            holder = _HOLDERS.get(attribute.type)
            if holder and not attribute.ref_attr_name and not attribute.HasField(holder):
                raise ModelError(
                    f"{where}: its attribute {quoted_name(attribute.name)} has no value", hint="export the model again"
                )
        if node.domain in ("", "ai.onnx") and (schema := _schema(node.op_type, opset)) is not None:
            _check_against(node, schema, where)
        for graph in subgraphs(node):
            _check_all(graph.node, opset, name, inside=inside)


def _check_against(node: NodeProto, schema: onnx.defs.OpSchema, where: str) -> None:
    for what, least, most, count in (
        ("inputs", schema.min_input, schema.max_input, len(node.input)),
        ("outputs", schema.min_output, schema.max_output, len(node.output)),
    ):
        if not least <= count <= most:
            raise ModelError(f"{where} has {count} {what}, but {schema.name} takes {least} to {most}")
    for index, formal in enumerate(schema.inputs[: schema.min_input]):
        if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and not node.input[index]:
            raise ModelError(f"{where} has no input {formal.name}", hint="export the model again")
    present = {attribute.name: attribute for attribute in node.attribute}
    for key, expected in schema.attributes.items():
        attribute = present.get(key)
        if attribute is None:
            if expected.required:
                raise ModelError(
                    f"{where} has no attribute {key}, which {schema.name} requires", hint="export the model again"
                )
        elif attribute.type != (kind := _kind(expected)).value:
            raise ModelError(f"{where}: its attribute {key} must be {kind.name}, but is {_type_name(attribute.type)}")


def _kind(attribute: onnx.defs.OpSchema.Attribute) -> Any:
    """Return the type of an attribute, an enumeration that onnx's stubs do not declare."""
    return attribute.type


def _type_name(kind: int) -> str:
    return AttributeProto.AttributeType.Name(kind) if kind in AttributeProto.AttributeType.values() else str(kind)


def _opset(imports: Iterable[OperatorSetIdProto]) -> int:
    return max((entry.version for entry in imports if entry.domain in ("", "ai.onnx")), default=1)


@functools.lru_cache(maxsize=4096)
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    if not 0 < opset < 1 << 31:
        return None
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
