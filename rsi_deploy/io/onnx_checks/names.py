"""Check a model's names: each is defined once and before its use, and local functions do not recurse.

graph      defines inputs, initializers and the outputs of its nodes in order; a subgraph also sees the outer scopes
function   defines its inputs and the outputs of its nodes; may call other functions, but not recursively and not so
           often that the inlined model becomes huge
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import EXPANDED_NODES, NAME_LENGTH, NESTED_CALLS, NESTED_GRAPHS, describe_node, quoted_name
from rsi_deploy.io.onnx_checks.parts import subgraphs

FunctionKey = tuple[str, str, str]
"""Domain, name and overload."""


def check_names(model: ModelProto, name: str) -> None:
    """Check the main graph and every local function.

    Args:
        model: model to check.
        name: file name for messages.

    Raises:
        ModelError: A name is wrong; the message names it and its node.
    """
    _check_graph(model.graph, (), name)
    for function in model.functions:
        where = f"{name}: function {quoted_name(function.name)}"
        own = set(function.input)
        _check_nodes(function.node, own, (), where)
        _check_outputs(function.output, own, (), where)
    _check_calls(model, name)


def functions_of(model: ModelProto) -> dict[FunctionKey, FunctionProto]:
    """Return the local functions by domain, name and overload."""
    return {(function.domain, function.name, function.overload): function for function in model.functions}


def _check_graph(graph: GraphProto, outer: tuple[set[str], ...], name: str) -> None:
    if len(outer) > NESTED_GRAPHS:
        raise ModelError(
            f"{name}: graphs are nested more than {NESTED_GRAPHS} deep, which is refused", hint="flatten them"
        )
    inputs = [value.name for value in graph.input]
    stored = [*(tensor.name for tensor in graph.initializer), *(s.values.name for s in graph.sparse_initializer)]
    for kind, names in (("input", inputs), ("initializer", stored)):
        twice = next((each for each, count in Counter(names).items() if count > 1 or not each), None)
        if twice is not None:
            what = f"{quoted_name(twice)} is defined twice, as an {kind}" if twice else f"an {kind} has no name"
            raise ModelError(f"{name}: {what}", hint="export the model again")
    own = {*inputs, *stored}
    for each in own:
        _check_length(each, name)
    _check_nodes(graph.node, own, outer, name)
    _check_outputs((value.name for value in graph.output), own, outer, name)


def _check_nodes(nodes: Sequence[NodeProto], own: set[str], outer: tuple[set[str], ...], name: str) -> None:
    """Check nodes in order and add their outputs to `own`."""
    made = {output for node in nodes for output in node.output}
    for node in nodes:
        for text in (node.name, node.op_type, *node.input, *node.output):
            _check_length(text, name)
        for used in filter(None, node.input):
            if used not in own and not any(used in scope for scope in outer):
                why = "a cycle, or nodes out of order" if used in made else "nothing defines it"
                raise ModelError(
                    f"{name}: node {describe_node(node)} uses {quoted_name(used)}: {why}", hint="export the model again"
                )
        for subgraph in subgraphs(node):
            _check_graph(subgraph, (*outer, own), name)
        for output in filter(None, node.output):
            if output in own:
                raise ModelError(
                    f"{name}: {quoted_name(output)} is defined twice, the second time by node {describe_node(node)}",
                    hint="export the model again",
                )
            own.add(output)


def _check_outputs(names: Iterable[str], own: set[str], outer: tuple[set[str], ...], name: str) -> None:
    for each in names:
        if each not in own and not any(each in scope for scope in outer):
            raise ModelError(
                f"{name}: the graph's output {quoted_name(each)} is not produced by any node",
                hint="export the model again",
            )


def _check_length(text: str, name: str) -> None:
    if len(text) > NAME_LENGTH:
        raise ModelError(
            f"{name}: the name {quoted_name(text)} has {len(text)} characters", hint=f"the limit is {NAME_LENGTH}"
        )


def _check_calls(model: ModelProto, name: str) -> None:
    """Check that no function calls itself and that the inlined model stays small enough."""
    functions = functions_of(model)
    if len(functions) != len(model.functions):
        raise ModelError(f"{name}: a local function is defined twice", hint="export the model again")
    known: dict[FunctionKey, int] = {}
    if (total := _expanded(model.graph.node, functions, known, (), name)) > EXPANDED_NODES:
        raise ModelError(
            f"{name}: its local functions expand to {total} nodes when they are inlined",
            hint=f"the limit is {EXPANDED_NODES}",
        )
    for key in functions:
        _expanded_function(key, functions, known, (), name)


def _expanded(
    nodes: Sequence[NodeProto],
    functions: Mapping[FunctionKey, FunctionProto],
    known: dict[FunctionKey, int],
    within: tuple[FunctionKey, ...],
    name: str,
) -> int:
    total = 0
    for node in nodes:
        key = (node.domain, node.op_type, node.overload)
        total += _expanded_function(key, functions, known, within, name) if key in functions else 1
        for subgraph in subgraphs(node):
            total += _expanded(subgraph.node, functions, known, within, name)
    return total


def _expanded_function(
    key: FunctionKey,
    functions: Mapping[FunctionKey, FunctionProto],
    known: dict[FunctionKey, int],
    within: tuple[FunctionKey, ...],
    name: str,
) -> int:
    if key in within:
        raise ModelError(
            f"{name}: the local function {quoted_name(key[1])} calls itself, which ONNX forbids",
            hint="export the model again",
        )
    if len(within) >= NESTED_CALLS:
        raise ModelError(
            f"{name}: local functions call each other more than {NESTED_CALLS} deep, which is refused",
            hint="inline them",
        )
    if key not in known:
        known[key] = _expanded(functions[key].node, functions, known, (*within, key), name)
    return known[key]
