"""Which nodes of a model an executed node may be: its attributes, and which of its inputs and outputs are there.

onnxruntime's profile names a node and the shapes of what it read; it leaves out absent optional inputs and all
attributes. What it inlines runs under another name:

    main graph, bodies of If, Loop, Scan     its own name
    function F, body of a SequenceMap        _inlfunc_F_NAME, _inlfunc_F_token_3_NAME
    a node without a name                    its operator and a number, Gemm_12

A node of a function may take attributes from the call; then it is one candidate a call.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, helper

Attributes = dict[str, Any]
FunctionKey = tuple[str, str, str]

_INLINED = "_inlfunc_"
_TOKEN = re.compile(r"_token_\d+(?=_|$)")
_SCALARS = (
    AttributeProto.INT,
    AttributeProto.FLOAT,
    AttributeProto.STRING,
    AttributeProto.INTS,
    AttributeProto.FLOATS,
)


@dataclass(frozen=True, kw_only=True)
class NodeCandidate:
    """A node that an executed one may be.

    Attributes:
        name: in the model, of the node or of its first output.
        domain: of its operator.
        inputs: for each of its inputs, whether it is there.
        outputs: the same of its outputs.
        attributes: numbers and texts, by name.
    """

    name: str
    domain: str
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]
    attributes: Attributes


class NodeIndex:
    """The nodes of a model, by the names under which onnxruntime runs them.

    Args:
        model: the model, without its external data.
    """

    def __init__(self, model: ModelProto) -> None:
        self._nodes: dict[tuple[str, str], list[NodeCandidate]] = {}
        self._unnamed: dict[str, list[NodeCandidate]] = {}
        for node in _nodes(model.graph.node):
            self._add(node, "", [{}])
            if node.op_type == "SequenceMap":
                for inner in _nodes([node], skip=1):
                    self._add(inner, f"{_INLINED}SequenceMap_", [{}])
        calls = _Calls(model)
        for function in model.functions:
            for inner in _nodes(function.node):
                self._add(inner, f"{_INLINED}{function.name}_", calls.attributes(_key(function)))

    def _add(self, node: NodeProto, prefix: str, given: Sequence[Attributes]) -> None:
        made = [_candidate(node, attributes) for attributes in given]
        self._nodes.setdefault((node.op_type, prefix + node.name), []).extend(made)
        if not node.name:
            self._unnamed.setdefault(node.op_type, []).extend(made)

    def find(self, op_type: str, name: str) -> list[NodeCandidate]:
        """Nodes of this operator that run under this name; none for a node that onnxruntime has put in itself."""
        for known in (name, _TOKEN.sub("", name, count=1)):
            if found := self._nodes.get((op_type, known)):
                return found
        is_numbered = name.startswith(f"{op_type}_") and name[len(op_type) + 1 :].isdecimal()
        return self._unnamed.get(op_type, []) if is_numbered else []

    def operators(self) -> Iterator[tuple[str, str, str]]:
        """(name, domain, op type) of every node."""
        for (op_type, _), candidates in self._nodes.items():
            for candidate in candidates:
                yield candidate.name, candidate.domain, op_type


class _Calls:
    """What the calls of a model's functions give them."""

    def __init__(self, model: ModelProto) -> None:
        self._functions = {_key(function): function for function in model.functions}
        self._calls: dict[FunctionKey, list[tuple[FunctionKey | None, NodeProto]]] = {}
        for node in _nodes(model.graph.node):
            self._calls.setdefault(_called(node), []).append((None, node))
        for caller, function in self._functions.items():
            for node in _nodes(function.node):
                self._calls.setdefault(_called(node), []).append((caller, node))

    def attributes(self, function: FunctionKey) -> list[Attributes]:
        """The attributes that a function runs with: one entry for every different call, defaults filled in."""
        found: list[Attributes] = []
        defaults = _attributes(self._functions[function].attribute_proto, {})
        for caller, node in self._calls.get(function, ()):
            for given in [{}] if caller is None else self.attributes(caller):
                entry = defaults | _attributes(node.attribute, given)
                found += [] if entry in found else [entry]
        return found


def _candidate(node: NodeProto, given: Attributes) -> NodeCandidate:
    return NodeCandidate(
        name=node.name or next((name for name in node.output if name), ""),
        domain=node.domain,
        inputs=tuple(map(bool, node.input)),
        outputs=tuple(map(bool, node.output)),
        attributes=_attributes(node.attribute, given),
    )


def _attributes(attributes: Sequence[AttributeProto], given: Mapping[str, Any]) -> Attributes:
    """Their values; one that refers to an attribute of the function has that one's, or none."""
    found = {}
    for attribute in attributes:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in given:
                found[attribute.name] = given[attribute.ref_attr_name]
        elif attribute.type in _SCALARS:
            found[attribute.name] = helper.get_attribute_value(attribute)
    return found


def _nodes(nodes: Sequence[NodeProto], skip: int = 0) -> Iterator[NodeProto]:
    """The nodes and those of their bodies, whatever the depth; the first levels are skipped."""
    for node in nodes:
        if not skip:
            yield node
        for attribute in node.attribute:
            graphs: list[GraphProto] = [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            for graph in graphs:
                yield from _nodes(graph.node, max(skip - 1, 0))


def _key(function: FunctionProto) -> FunctionKey:
    return function.domain, function.name, getattr(function, "overload", "")


def _called(node: NodeProto) -> FunctionKey:
    return node.domain, node.op_type, getattr(node, "overload", "")
