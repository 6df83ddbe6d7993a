"""The execution order of an ONNX graph in waves: all that can be computed before the sites of the wave change.

    wave 1   nodes that depend on no site                           sites that read what those made
    wave 2   nodes that depend on the sites of wave 1 alone         sites that read what those made
    ...

Within a wave no site reads what another one made (q, k and v stand together), so all of them can be factorized on the
same run, and the next wave starts from the values that are still alive.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from onnx import GraphProto, ModelProto, NodeProto


@dataclass(frozen=True, kw_only=True)
class Wave:
    """One stage of the run.

    Attributes:
        nodes: that depend on earlier waves alone, sites apart, in order.
        sites: the site nodes that they feed, in order.
        alive: names of the values that the sites or later waves read, and of the graph's outputs.
    """

    nodes: tuple[NodeProto, ...]
    sites: tuple[NodeProto, ...]
    alive: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A graph cut into waves.

    Attributes:
        model: what it was cut from.
        fixed: names of initializers and of all that is computed from constants alone.
        constants: name -> the node that makes it, for the latter.
        waves: in order; only the last one may have no sites.
    """

    model: ModelProto
    fixed: frozenset[str]
    constants: Mapping[str, NodeProto]
    waves: tuple[Wave, ...]


def cut(model: ModelProto, sites: Iterable[str]) -> Program:
    """Cut the main graph into waves.

    Args:
        model: in topological order, weights on disk or not.
        sites: names of the first outputs of the nodes that are sites.
    """
    wanted = set(sites)
    graph = model.graph
    fixed = {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer} | {""}
    constants: dict[str, NodeProto] = {}
    rest: list[NodeProto] = []
    for node in graph.node:
        if reads(node) <= fixed and node.op_type not in _RANDOM and node.output[0] not in wanted:
            fixed |= set(node.output)
            constants |= dict.fromkeys(node.output, node)
        else:
            rest.append(node)
    waves = []
    ends = {value.name for value in graph.output}
    while rest:
        nodes, here, later = _wave(rest, wanted)
        alive = ends.union(*(reads(node) for node in [*here, *later])) - fixed
        waves.append(Wave(nodes=tuple(nodes), sites=tuple(here), alive=frozenset(alive)))
        rest = later
    return Program(model=model, fixed=frozenset(fixed), constants=constants, waves=tuple(waves))


def thinned(program: Program, outputs: Collection[str]) -> Program:
    """The same program with fewer sites: waves without any of them are run together with the next wave.

    The sites that remain keep their order, and two of them share a wave only where they shared one before.

    Args:
        program: as cut.
        outputs: first outputs of the sites that remain.
    """
    waves: list[Wave] = []
    carried: list[NodeProto] = []  # of the waves before that are run with this one
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
    """The names a node reads, those its subgraphs take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
            names |= _captured(graph)
    return names - {""}


def needed_constants(program: Program, nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """The nodes that make, from constants, what these nodes read; in order."""
    wanted: dict[int, NodeProto] = {}
    stack = [name for node in nodes for name in reads(node)]
    while stack:
        node = program.constants.get(stack.pop())
        if node is not None and id(node) not in wanted:
            wanted[id(node)] = node
            stack.extend(reads(node))
    return [node for node in _in_order(program) if id(node) in wanted]


_RANDOM = {"RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"}


def _in_order(program: Program) -> list[NodeProto]:
    seen: dict[int, NodeProto] = {}
    for node in program.constants.values():  # a dict keeps the order of the graph
        seen.setdefault(id(node), node)
    return list(seen.values())


def _wave(rest: list[NodeProto], wanted: set[str]) -> tuple[list[NodeProto], list[NodeProto], list[NodeProto]]:
    nodes: list[NodeProto] = []
    here: list[NodeProto] = []
    later: list[NodeProto] = []
    waiting: set[str] = set()  # what this wave cannot make
    for node in rest:
        if waiting & reads(node):
            later.append(node)
        elif node.output[0] in wanted:
            here.append(node)
        else:
            nodes.append(node)
            continue
        waiting |= set(node.output)
    return nodes, here, later


def _captured(graph: GraphProto) -> set[str]:
    """What a subgraph reads from outside."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    taken: set[str] = set()
    for node in graph.node:
        taken |= reads(node) - own
        own |= set(node.output)
    return taken | ({value.name for value in graph.output} - own)
