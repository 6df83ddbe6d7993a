"""Whether ONNX's own operators stand as their definitions say: attributes of their types, inputs as many as they take.

Operators of other domains, and those that this onnx does not know, are left to whoever runs them.
"""

import functools
from collections.abc import Iterable
from typing import Any

import onnx
from onnx import AttributeProto, ModelProto, NodeProto, OperatorSetIdProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import called, shown
from rsi_deploy.io.onnx_checks.parts import subgraphs

# Where an attribute of such a type has its value, which must be there: a missing message reads as an empty one.
_HOLDERS = {
    AttributeProto.TENSOR: "t",
    AttributeProto.GRAPH: "g",
    AttributeProto.SPARSE_TENSOR: "sparse_tensor",
    AttributeProto.TYPE_PROTO: "tp",
}
_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def check_nodes(model: ModelProto, name: str) -> None:
    """Hold every node against the definition of its operator.

    Args:
        model: to check.
        name: of its file, for messages.

    Raises:
        ModelError: names the node, what it has and what its operator takes.
    """
    _check_all(model.graph.node, _opset(model.opset_import), name, inside=False)
    for function in model.functions:
        _check_all(function.node, _opset(function.opset_import), name, inside=True)


def _check_all(nodes: Iterable[NodeProto], opset: int, name: str, *, inside: bool) -> None:
    """Check nodes and those of their graphs; `inside` a function an attribute may stand for one of the function's."""
    for node in nodes:
        where = f"{name}: node {called(node)}"
        if len({attribute.name for attribute in node.attribute}) != len(node.attribute):
            raise ModelError(f"{where} has an attribute twice; export the model again")
        for attribute in node.attribute:
            if attribute.ref_attr_name and not inside:
                raise ModelError(
                    f"{where}: its attribute {shown(attribute.name)} refers to a function's, but it stands in none; "
                    "export the model again"
                )
            if attribute.ref_attr_name and attribute.type in _GRAPHS:
                raise ModelError(
                    f"{where}: its attribute {shown(attribute.name)} is a graph that callers of a function give, which "
                    "is not read; put functions in their callers' places first: onnx.inliner.inline_local_functions"
                )
            holder = _HOLDERS.get(attribute.type)
            if holder and not attribute.ref_attr_name and not attribute.HasField(holder):
                raise ModelError(f"{where}: its attribute {shown(attribute.name)} has no value; export the model again")
        if node.domain in ("", "ai.onnx") and (schema := _schema(node.op_type, opset)) is not None:
            _check_against(node, schema, where)
        for graph in subgraphs(node):
            _check_all(graph.node, opset, name, inside=inside)


def _check_against(node: NodeProto, schema: onnx.defs.OpSchema, where: str) -> None:
    for what, least, most, there in (
        ("inputs", schema.min_input, schema.max_input, len(node.input)),
        ("outputs", schema.min_output, schema.max_output, len(node.output)),
    ):
        if not least <= there <= most:
            raise ModelError(f"{where} has {there} {what}, but {schema.name} takes {least} to {most}")
    for index, formal in enumerate(schema.inputs[: schema.min_input]):
        if formal.option == onnx.defs.OpSchema.FormalParameterOption.Single and not node.input[index]:
            raise ModelError(f"{where} lacks its input {formal.name}; export the model again")
    given = {attribute.name: attribute for attribute in node.attribute}
    for key, wanted in schema.attributes.items():
        attribute = given.get(key)
        if attribute is None:
            if wanted.required:
                raise ModelError(f"{where} lacks its attribute {key}, which {schema.name} must have")
        elif attribute.type != (kind := _kind(wanted)).value:
            came = _type_name(attribute.type)
            raise ModelError(f"{where}: its attribute {key} must be {kind.name}, but is {came}")


def _kind(wanted: onnx.defs.OpSchema.Attribute) -> Any:
    """An enumeration of onnx's own, which its stubs do not tell."""
    return wanted.type


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
