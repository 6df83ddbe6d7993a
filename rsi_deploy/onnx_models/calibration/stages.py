"""Cut an ONNX graph into waves: nodes that can run before the sites of the wave are replaced.

    wave 1   nodes that depend on no site                           sites that read what those made
    wave 2   nodes that depend on the sites of wave 1 alone         sites that read what those made
    ...

Within a wave no site depends on another one (q, k and v are in one wave), so one run serves all of them, and the next
wave starts from the values that are still alive.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from onnx import GraphProto, ModelProto, NodeProto


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One stage of the run.

    Attributes:
        nodes: nodes that depend on earlier waves alone, without the sites, in order.
        sites: nodes of the sites that they feed, in order.
        alive: names of the values that the sites or later waves read, and of the graph's outputs.
    """

    nodes: tuple[NodeProto, ...]
    sites: tuple[NodeProto, ...]
    alive: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A graph cut into waves.

    Attributes:
        model: the whole model.
        fixed: names of initializers and of values that are computed from constants alone.
        constants: name of such a value -> the node that computes it.
        waves: waves in order; only the last one may have no sites.
    """

    model: ModelProto
    fixed: frozenset[str]
    constants: Mapping[str, NodeProto]
    waves: tuple[Wave, ...]


def cut(model: ModelProto, sites: Iterable[str]) -> Program:
    """Cut the main graph into waves.

    Args:
        model: a model in topological order; its weights may be on disk.
        sites: names of the first outputs of the nodes that are sites.
    """
    site_outputs = set(sites)
    graph = model.graph
    fixed = {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer} | {""}
    constants: dict[str, NodeProto] = {}
    rest: list[NodeProto] = []
    for node in graph.node:
        if reads(node) <= fixed and node.op_type not in _RANDOM and node.output[0] not in site_outputs:
            fixed |= set(node.output)
            constants |= dict.fromkeys(node.output, node)
        else:
            rest.append(node)
    waves = []
    ends = {value.name for value in graph.output}
    while rest:
        nodes, here, later = _wave(rest, site_outputs)
        alive = ends.union(*(reads(node) for node in [*here, *later])) - fixed
        waves.append(Wave(nodes=tuple(nodes), sites=tuple(here), alive=frozenset(alive)))
        rest = later
    return Program(model=model, fixed=frozenset(fixed), constants=constants, waves=tuple(waves))


def thinned(program: Program, outputs: Collection[str]) -> Program:
    """Return the program with fewer sites: waves without any of them are merged into the next wave.

    The remaining sites keep their order, and two of them share a wave only where they shared one before.

    Args:
        program: a program.
        outputs: first outputs of the sites that remain.
    """
    waves: list[Wave] = []
    carried: list[NodeProto] = []  # nodes of earlier waves that run with this one
    for wave in program.waves:
        nodes = [*carried, *wave.nodes]
        sites = [node for node in wave.sites if node.output[0] in outputs]
        carried = [node for node in wave.sites if node.output[0] not in outputs]
        if sites:
            waves.append(Wave(nodes=tuple(nodes), sites=tuple(sites), alive=wave.alive))
        else:
            carried = [*nodes, *carried]
    if carried:
        waves.append(Wave(nodes=tuple(carried), sites=(), alive=program.waves[-1].alive))
    return replace(program, waves=tuple(waves))


def reads(node: NodeProto) -> set[str]:
    """Return the names that a node reads, also those that its subgraphs read from outside."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            names |= _captured(graph)
    return names - {""}


def needed_constants(program: Program, nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Return the nodes that compute, from constants, the values that these nodes read; in order."""
    found: dict[int, NodeProto] = {}
    stack = [name for node in nodes for name in reads(node)]
    while stack:
        node = program.constants.get(stack.pop())
        if node is not None and id(node) not in found:
            found[id(node)] = node
            stack.extend(reads(node))
    return [node for node in _in_order(program) if id(node) in found]


_RANDOM = {"RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"}


def _in_order(program: Program) -> list[NodeProto]:
    seen: dict[int, NodeProto] = {}
    for node in program.constants.values():  # a dict keeps the order of the graph
        seen.setdefault(id(node), node)
    return list(seen.values())


def _wave(rest: list[NodeProto], sites: set[str]) -> tuple[list[NodeProto], list[NodeProto], list[NodeProto]]:
    nodes: list[NodeProto] = []
    here: list[NodeProto] = []
    later: list[NodeProto] = []
    waiting: set[str] = set()  # values that this wave cannot compute
    for node in rest:
        if waiting & reads(node):
            later.append(node)
        elif node.output[0] in sites:
            here.append(node)
        else:
            nodes.append(node)
            continue
        waiting |= set(node.output)
    return nodes, here, later


def _captured(graph: GraphProto) -> set[str]:
    """Return the names that a subgraph reads from outside."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    taken: set[str] = set()
    for node in graph.node:
        taken |= reads(node) - own
        own |= set(node.output)
    return taken | ({value.name for value in graph.output} - own)
