"""Whether a model's names hold together: each defined once and before it is used, and nothing without end.

graph      inputs and initializers, then the nodes in their order; a subgraph sees the scopes around it
function   its inputs alone; functions may call functions, in no ring, and not so that a few grow to millions
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.limits import EXPANDED_NODES, NAME_LENGTH, NESTED_CALLS, NESTED_GRAPHS, called, shown
from rsi_deploy.io.onnx_checks.parts import subgraphs

FunctionKey = tuple[str, str, str]
"""Domain, name and overload."""


def check_names(model: ModelProto, name: str) -> None:
    """Walk the main graph and every function.

    Args:
        model: to check.
        name: of its file, for messages.

    Raises:
        ModelError: names the node, and what is wrong with which name.
    """
    _check_graph(model.graph, (), name)
    for function in model.functions:
        where = f"{name}: function {shown(function.name)}"
        own = set(function.input)
        _check_nodes(function.node, own, (), where)
        _check_outputs(function.output, own, (), where)
    _check_calls(model, name)


def functions_of(model: ModelProto) -> dict[FunctionKey, FunctionProto]:
    """The local functions by what calls them."""
    return {(function.domain, function.name, function.overload): function for function in model.functions}


def _check_graph(graph: GraphProto, outer: tuple[set[str], ...], name: str) -> None:
    if len(outer) > NESTED_GRAPHS:
        raise ModelError(f"{name}: graphs stand in graphs more than {NESTED_GRAPHS} deep, which is refused; flatten it")
    inputs = [value.name for value in graph.input]
    stored = [*(tensor.name for tensor in graph.initializer), *(s.values.name for s in graph.sparse_initializer)]
    for kind, names in (("input", inputs), ("initializer", stored)):
        twice = next((each for each, count in Counter(names).items() if count > 1 or not each), None)
        if twice is not None:
            what = f"{shown(twice)} is defined twice, as an {kind}" if twice else f"an {kind} has no name"
            raise ModelError(f"{name}: {what}; export the model again")
    own = {*inputs, *stored}
    for each in own:
        _check_length(each, name)
    _check_nodes(graph.node, own, outer, name)
    _check_outputs((value.name for value in graph.output), own, outer, name)


def _check_nodes(nodes: Sequence[NodeProto], own: set[str], outer: tuple[set[str], ...], name: str) -> None:
    """Add the outputs of the nodes to `own`, one after another."""
    made = {output for node in nodes for output in node.output}
    for node in nodes:
        for text in (node.name, node.op_type, *node.input, *node.output):
            _check_length(text, name)
        for used in filter(None, node.input):
            if used not in own and not any(used in scope for scope in outer):
                why = "a cycle, or nodes out of order" if used in made else "nothing defines it"
                raise ModelError(f"{name}: node {called(node)} uses {shown(used)}: {why}; export the model again")
        for subgraph in subgraphs(node):
            _check_graph(subgraph, (*outer, own), name)
        for output in filter(None, node.output):
            if output in own:
                raise ModelError(
                    f"{name}: {shown(output)} is defined twice, the second time by node {called(node)}; "
                    "export the model again"
                )
            own.add(output)


def _check_outputs(names: Iterable[str], own: set[str], outer: tuple[set[str], ...], name: str) -> None:
    for each in names:
        if each not in own and not any(each in scope for scope in outer):
            raise ModelError(f"{name}: the graph's output {shown(each)} is made by no node; export the model again")


def _check_length(text: str, name: str) -> None:
    if len(text) > NAME_LENGTH:
        raise ModelError(f"{name}: the name {shown(text)} has {len(text)} characters; up to {NAME_LENGTH} are read")


def _check_calls(model: ModelProto, name: str) -> None:
    """No function calls itself, and the model stays finite when all are written out."""
    functions = functions_of(model)
    if len(functions) != len(model.functions):
        raise ModelError(f"{name}: a local function is defined twice; export the model again")
    known: dict[FunctionKey, int] = {}
    if (total := _expanded(model.graph.node, functions, known, (), name)) > EXPANDED_NODES:
        raise ModelError(
            f"{name}: its local functions make {total} nodes when they are written out where they are called; "
            f"up to {EXPANDED_NODES} are read"
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
            f"{name}: the local function {shown(key[1])} calls itself, which no model may; export it again"
        )
    if len(within) >= NESTED_CALLS:
        raise ModelError(
            f"{name}: local functions call each other more than {NESTED_CALLS} deep, which is refused; inline them"
        )
    if key not in known:
        known[key] = _expanded(functions[key].node, functions, known, (*within, key), name)
    return known[key]
