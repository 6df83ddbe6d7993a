"""Find the node of a model that onnxruntime executed, with its attributes and its present inputs and outputs.

onnxruntime's profile has the name of a node and the shapes of its inputs; it omits absent optional inputs and all
attributes. Inlined nodes run under other names:

    main graph, bodies of If, Loop, Scan     its own name
    function F, body of a SequenceMap        _inlfunc_F_NAME, _inlfunc_F_token_3_NAME
    a node without a name                    its operator and a number, Gemm_12

A node of a function may take attributes from the call; then each different call is a candidate.
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
    """A node of the model that an executed node may correspond to.

    Attributes:
        name: name of the node, or of its first output.
        domain: domain of its operator.
        inputs: for each of its inputs, whether it is present.
        outputs: for each of its outputs, whether it is present.
        attributes: numbers and texts by name.
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

    def _add(self, node: NodeProto, prefix: str, variants: Sequence[Attributes]) -> None:
        candidates = [_candidate(node, attributes) for attributes in variants]
        self._nodes.setdefault((node.op_type, prefix + node.name), []).extend(candidates)
        if not node.name:
            self._unnamed.setdefault(node.op_type, []).extend(candidates)

    def find(self, op_type: str, name: str) -> list[NodeCandidate]:
        """Return the nodes of this operator that run under this name; none for nodes that onnxruntime inserted."""
        for known in (name, _TOKEN.sub("", name, count=1)):
            if found := self._nodes.get((op_type, known)):
                return found
        is_numbered = name.startswith(f"{op_type}_") and name[len(op_type) + 1 :].isdecimal()
        return self._unnamed.get(op_type, []) if is_numbered else []

    def operators(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, domain and op type of every node."""
        for (op_type, _), candidates in self._nodes.items():
            for candidate in candidates:
                yield candidate.name, candidate.domain, op_type


class _Calls:
    """The calls of a model's functions and the attributes that they pass."""

    def __init__(self, model: ModelProto) -> None:
        self._functions = {_key(function): function for function in model.functions}
        self._calls: dict[FunctionKey, list[tuple[FunctionKey | None, NodeProto]]] = {}
        for node in _nodes(model.graph.node):
            self._calls.setdefault(_called(node), []).append((None, node))
        for caller, function in self._functions.items():
            for node in _nodes(function.node):
                self._calls.setdefault(_called(node), []).append((caller, node))

    def attributes(self, function: FunctionKey) -> list[Attributes]:
        """Return the attributes of each different call of a function, with defaults."""
        found: list[Attributes] = []
        defaults = _attributes(self._functions[function].attribute_proto, {})
        for caller, node in self._calls.get(function, ()):
            for passed in [{}] if caller is None else self.attributes(caller):
                entry = defaults | _attributes(node.attribute, passed)
                found += [] if entry in found else [entry]
        return found


def _candidate(node: NodeProto, passed: Attributes) -> NodeCandidate:
    return NodeCandidate(
        name=node.name or next((name for name in node.output if name), ""),
        domain=node.domain,
        inputs=tuple(map(bool, node.input)),
        outputs=tuple(map(bool, node.output)),
        attributes=_attributes(node.attribute, passed),
    )


def _attributes(attributes: Sequence[AttributeProto], passed: Mapping[str, Any]) -> Attributes:
    """Return the values of attributes; a reference takes the value that the call passed, if any."""
    found = {}
    for attribute in attributes:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name in passed:
                found[attribute.name] = passed[attribute.ref_attr_name]
        elif attribute.type in _SCALARS:
            found[attribute.name] = helper.get_attribute_value(attribute)
    return found


def _nodes(nodes: Sequence[NodeProto], skip: int = 0) -> Iterator[NodeProto]:
    """Yield nodes and the nodes of their subgraphs at any depth, without the first `skip` levels."""
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
