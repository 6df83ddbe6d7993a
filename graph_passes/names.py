"""Fresh names: readable, deterministic, and unused anywhere in the model.

classifier.0.weight  ->  classifier.0.right, classifier.0.left      (_1, _2, ... when taken)
"""

import onnx_ir as ir


class Names:
    """Every value name and node name of a model: graphs, subgraphs and functions alike.

    Scopes are ignored: an initializer under a reused name silently replaces the other one, and a name in a subgraph
    shadows the outer one.
    """

    def __init__(self, model: ir.Model) -> None:
        self._values: dict[str, int] = {}  # taken name -> the last number tried behind it
        self._nodes: dict[str, int] = {}
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            self._add_graph(graph)
            for subgraph in graph.subgraphs():
                self._add_graph(subgraph)

    def _add_graph(self, graph: ir.Graph) -> None:
        self._values.update(dict.fromkeys(graph.initializers, 0))
        self._values.update((value.name or "", 0) for value in (*graph.inputs, *graph.outputs))
        for node in graph:
            self._nodes[node.name or ""] = 0
            self._values.update((value.name or "", 0) for value in (*node.inputs, *node.outputs) if value is not None)

    def fresh_value(self, wanted: str) -> str:
        """Take and return `wanted`, or the first free one of `wanted_1`, `wanted_2`, ..."""
        return _fresh(wanted, self._values)

    def fresh_node(self, wanted: str) -> str:
        """Take and return a node name in the same way."""
        return _fresh(wanted, self._nodes)


def _fresh(wanted: str, taken: dict[str, int]) -> str:
    name = wanted
    while name in taken:
        taken[wanted] += 1
        name = f"{wanted}_{taken[wanted]}"
    taken[name] = 0
    return name


def name_of(node: ir.Node) -> str:
    """Return the node's name, or that of its first output where it has none."""
    return node.name or next((value.name for value in node.outputs if value.name), "")


def stem(weight: str) -> str:
    """Return the beginning of the names of a weight's factors.

    Examples:
        >>> stem("classifier.0.weight"), stem("onnx::MatMul_12"), stem("attn.in_proj_weight")
        ('classifier.0', 'onnx::MatMul_12', 'attn.in_proj_weight')
    """
    return weight.removesuffix(".weight") or weight
