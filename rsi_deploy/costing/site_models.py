"""Small models of one site, dense and split, for timing the site alone.

    the node of the site, the nodes that compute its weights from constants, and the element-wise nodes after it that
    runtimes fuse with it (MatMul + Add + Gelu, Conv + Add + Relu)
        --> `copies` of them side by side, with inputs of the same shapes as in the whole model

`graph_passes.split` makes the split, so that the timed nodes are those of an export. Weights are random, because times
do not depend on their values. Copies make a call long enough for the clock, and prevent that a single weight stays in
the processor's cache. Sites with the same small model have the same `signature` and are timed once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

import graph_passes as gp
from graph_passes.forms import FOLDED, split_numbers
from graph_passes.head_values import head_values
from graph_passes.hidden_units import hidden_units
from rsi_deploy.core.types import Feeds

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Lower = Callable[[bytes, Feeds], bytes]
Inputs = Mapping[str, Sequence[tuple[str, Shape]]]
"""Name of a node -> (onnxruntime's name of the type, shape) of its inputs; see
`rsi_deploy.runtime.shape_trace.ShapeTrace`."""

FOLLOWERS = 3
UNARY = frozenset(
    ("Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Elu", "Swish", "Mish")
)
BINARY = frozenset(("Add", "Sub", "Mul", "Div"))
ENOUGH_MACS = 20_000_000
"""MACs of a call that is long enough for the clock; a smaller site is copied."""
COPIES, COPIED_BYTES = 8, 8 << 20
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a model that is cut out for one site.

    Attributes:
        site: the site.
        nodes: nodes in topological order, including that of the site.
        feeds: name of an external value -> (dtype, shape).
        macs: multiply-accumulates of the site's node for the whole batch.
        opsets: domain -> version.
        ir_version: IR version of the model.
        signature: text that is equal for sites with the same small model.
        lower: function of a small model and its inputs that returns the model to time in low precision; None to time
            it as it is.
        makes_units: whether the nodes that make the site's hidden units are among the nodes.
        group: the piece with those nodes, for the forms "units" and "heads"; None for a site without hidden units.
    """

    site: gp.Site
    nodes: tuple[ir.Node, ...]
    feeds: Mapping[str, tuple[str, Shape]]
    macs: int
    opsets: Mapping[str, int]
    ir_version: int
    signature: str
    lower: Lower | None = None
    makes_units: bool = False
    group: "Piece | None" = None

    @property
    def key(self) -> str:
        """The signature, with that of the group."""
        return self.signature if self.group is None else f"{self.signature} | {self.group.signature}"

    def lowered(self, lower: Lower) -> "Piece":
        """Return the piece, to be timed in low precision."""
        return replace(self, lower=lower, group=None if self.group is None else self.group.lowered(lower))

    @property
    def forms(self) -> tuple[gp.Form, ...]:
        """The forms that are timed with these nodes."""
        return tuple(form for form in self.site.forms if (form in FOLDED) == self.makes_units)

    @property
    def numbers(self) -> int:
        """The number of parameters of the weight, and of the nodes that make its units."""
        units = self.site.units if self.makes_units else None
        makers = 0 if units is None else units.count * units.numbers
        return _size(self.site) + makers

    def numbers_of(self, form: gp.Form, rank: int) -> int:
        """Return how many parameters are left in a form."""
        units = self.site.units if self.makes_units else None
        makers = 0 if units is None else rank // units.run * units.numbers
        return self.site.groups * split_numbers(form, *self.site.shape(form), rank) + makers

    @property
    def copies(self) -> int:
        """The number of copies in the small model."""
        size = self.numbers * np.dtype(self.site.dtype).itemsize
        needed = math.ceil(ENOUGH_MACS / max(self.macs, 1))
        return max(1, min(COPIES, needed, COPIED_BYTES // max(size, 1)))

    def inputs(self, seed: int = 0) -> dict[str, Array]:
        """Return random inputs."""
        rng = np.random.default_rng(seed)
        return {name: _drawn(rng, shape, dtype) for name, (dtype, shape) in self.feeds.items()}

    def model(self, form: gp.Form | None = None, rank: int = 0) -> bytes:
        """Return the serialized small model, dense or split in a form at a rank."""
        made = _copied(self, 0 if form is None else _size(self.site))
        if form is not None:
            records = gp.split(made, lambda site: _factors(site, form, rank))
            if form in FOLDED:
                gp.fold_splits(made)
            if sum(isinstance(record, gp.Split) for record in records) < self.copies:
                raise ValueError(f"site {self.site.weight}: form {form} at rank {rank} does not split its small model")
        proto = ir.to_proto(made)
        del proto.graph.value_info[:]  # onnxruntime's quantizers transpose weights, and leave their old shapes there
        model = bytes(proto.SerializeToString())
        return model if self.lower is None else self.lower(model, self.inputs())


def pieces(model: ir.Model, inputs: Inputs, macs: Mapping[str, int]) -> Iterator[tuple[gp.Site, Piece | str]]:
    """Yield every site of the model with its piece, or with the reason why it cannot be timed alone.

    Args:
        model: dense model; its weights are not read.
        inputs: inputs of the executed nodes, for the batch to time.
        macs: multiply-accumulates of the nodes, for the same batch.
    """
    nodes = {node.name or node.outputs[0].name: node for node in model.graph}
    for site in gp.find_sites(model):
        if not isinstance(site, gp.Site):
            continue
        node = nodes.get(site.node)
        if site.nested or node is None:
            yield site, "it is in a subgraph or function"
        elif site.node not in inputs:
            yield site, "it never ran on the inputs"
        else:
            yield site, _piece(model, site, node, inputs, macs.get(site.node, 0))


def _piece(model: ir.Model, site: gp.Site, node: ir.Node, inputs: Inputs, macs: int) -> Piece | str:
    own = _cut_out(model, site, [node, *_followers(node, inputs)], inputs, macs)
    if site.units is None or isinstance(own, str):
        return own
    columns = site.in_features // (1 if site.window is None else math.prod(site.window.kernel))
    find = hidden_units if site.units.form == "units" else head_values
    between = {value.producer() for value in find(node, columns, overridable=True).values}
    between |= {maker for other in between for maker in _size_makers(other)}
    members = [*(other for other in model.graph if other in between), *own.nodes[own.nodes.index(node) :]]
    if any((other.name or other.outputs[0].name) not in inputs for other in members):
        return own
    group = _cut_out(model, site, members, inputs, macs)
    return own if isinstance(group, str) else replace(own, group=replace(group, makes_units=True))


def _size_makers(node: ir.Node | None) -> Iterator[ir.Node]:
    """Yield the nodes that compute the sizes of a Reshape from the shapes of other values."""
    pending = [node.inputs[1]] if node is not None and node.op_type == "Reshape" else []
    while pending:
        value = pending.pop()
        maker = None if value is None or _constant(value) is not None else value.producer()
        if maker is not None:
            yield maker
            pending += maker.inputs if maker.op_type != "Shape" else ()


def _cut_out(model: ir.Model, site: gp.Site, members: Sequence[ir.Node], inputs: Inputs, macs: int) -> Piece | str:
    chain: list[ir.Node] = []
    feeds: dict[str, tuple[str, Shape]] = {}
    for member in members:
        present = [value for value in member.inputs if value is not None]
        typed = inputs[member.name or member.outputs[0].name or ""]
        if len(typed) != len(present):
            return "its inputs are not all tensors"
        inside = {value for other in chain for value in other.outputs}
        for value, (kind, shape) in zip(present, typed, strict=True):
            if value in inside:
                continue
            makers = _constant(value)
            if makers is None:
                feeds[value.name or ""] = (_dtype(value, kind), shape)
            else:
                chain += [maker for maker in makers if maker not in chain]
        chain.append(member)
    return Piece(
        site=site,
        nodes=tuple(chain),
        feeds=feeds,
        macs=macs,
        opsets=dict(model.opset_imports),
        ir_version=model.ir_version,
        signature=_signature(site, chain, feeds),
    )


def _dtype(value: ir.Value, kind: str) -> str:
    """Return the model's dtype of a value. `kind` is what ran: a CPU computes float16 convolutions in float32."""
    if value.dtype is not None and value.dtype.is_floating_point():
        return _dtype_name(value.dtype)
    return _DTYPES.get(kind, kind)


def _followers(node: ir.Node, inputs: Inputs) -> Iterator[ir.Node]:
    """Yield the element-wise nodes after a node that are the only users of its output."""
    for _ in range(FOLLOWERS):
        if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            return
        users = list(node.outputs[0].uses())
        if (
            len(users) != 1
            or users[0].node.op_type not in UNARY | BINARY
            or users[0].node.domain not in ("", "ai.onnx")
        ):
            return
        node = users[0].node
        if (node.name or node.outputs[0].name) not in inputs:
            return
        yield node


def _constant(value: ir.Value, depth: int = 6) -> list[ir.Node] | None:
    """Return the nodes that compute a value from constants, in order; None if it depends on an input."""
    if value.const_value is not None or value.is_initializer():
        maker = value.producer()
        return [maker] if maker is not None else []
    maker = value.producer()
    if maker is None or depth == 0:
        return None
    if maker.op_type == "Constant":
        return [maker]
    found: list[ir.Node] = []
    for source in maker.inputs:
        if source is None:
            continue
        behind = _constant(source, depth - 1)
        if behind is None:
            return None
        found += [node for node in behind if node not in found]
    return [*found, maker] if maker.inputs else None


def _signature(site: gp.Site, chain: Sequence[ir.Node], feeds: Mapping[str, tuple[str, Shape]]) -> str:
    """Describe the small model without any names."""
    window = site.window
    moves = "" if window is None else f" k{_by(window.kernel)} s{_by(window.strides)} d{_by(window.dilations)}"
    pads = "" if window is None else f" p{window.pads if isinstance(window.pads, str) else _by(window.pads)}"
    weight = f"{site.groups}x{site.out_features}x{site.in_features} {site.dtype}"
    known: dict[ir.Value, str] = {}
    described = []
    for node in chain:
        attributes = [f"{a.name}={a.value}" for a in sorted(node.attributes.values(), key=lambda a: a.name)]
        if node.op_type == "Constant":
            attributes = []
        operands = [_operand(value, known, feeds) for value in node.inputs]
        known |= {value: f"#{len(known) + place}" for place, value in enumerate(node.outputs)}
        described.append(f"{node.op_type}({', '.join([*operands, *attributes])})")
    return f"{site.op_type} {weight}{moves}{pads}: {'; '.join(described)}"


def _operand(value: ir.Value | None, known: Mapping[ir.Value, str], feeds: Mapping[str, tuple[str, Shape]]) -> str:
    if value is None:
        return "-"
    if value in known:
        return known[value]
    if (value.name or "") in feeds:
        dtype, shape = feeds[value.name or ""]
        return f"{dtype}[{_by(shape)}]"
    constant = value.const_value
    return "constant" if constant is None else f"constant[{_by(tuple(int(n) for n in constant.shape.numpy()))}]"


def _by(numbers: Sequence[int]) -> str:
    return "x".join(map(str, numbers))


def _copied(piece: Piece, zero_size: int) -> ir.Model:
    """Build the dense small model. Constants of `zero_size` elements are zero: a split replaces them anyway."""
    rng = np.random.default_rng(0)
    entries = {
        name: ir.Value(name=name, type=ir.TensorType(_word(dtype)), shape=ir.Shape(shape))
        for name, (dtype, shape) in piece.feeds.items()
    }
    sizes = _symbol_sizes(piece)
    nodes: list[ir.Node] = []
    weights: list[ir.Value] = []
    outputs: list[ir.Value] = []
    for number in range(piece.copies):
        known: dict[ir.Value, ir.Value] = {}
        for node in piece.nodes:
            for value in node.inputs:
                if value is None or value in known or value.name in entries:
                    continue
                known[value] = _weight(value, number, rng, zero_size)
                weights.append(known[value])
            made = ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else entries.get(v.name or "") or known[v] for v in node.inputs],
                list(node.attributes.values()),
                outputs=[ir.Value(name=f"{v.name}.{number}", shape=_sized(v.shape, sizes)) for v in node.outputs],
                name=f"{node.name or node.outputs[0].name}.{number}",
            )
            nodes.append(made)
            known |= dict(zip(node.outputs, made.outputs, strict=True))
        outputs += [value for value in nodes[-1].outputs if value.name]
        for value, source in zip(nodes[-1].outputs, piece.nodes[-1].outputs, strict=True):
            value.type = source.type or ir.TensorType(_word(piece.site.dtype))
    graph = ir.Graph(
        list(entries.values()),
        outputs,
        nodes=nodes,
        initializers=weights,
        opset_imports=dict(piece.opsets),
        name="site",
    )
    return ir.Model(graph, ir_version=piece.ir_version)


def _weight(value: ir.Value, number: int, rng: np.random.Generator, zero_size: int) -> ir.Value:
    """Return the constant of one copy: scalars and integers unchanged, other values random or zero."""
    stored = value.const_value
    assert stored is not None
    shape = tuple(int(n) for n in stored.shape.numpy())
    name = f"{value.name}.{number}"
    kept = math.prod(shape) <= 1 or not stored.dtype.is_floating_point()
    dtype = _dtype_name(stored.dtype)
    if kept:
        array = stored.numpy()
    else:
        array = np.zeros(shape, _numpy(dtype)) if math.prod(shape) == zero_size else _drawn(rng, shape, dtype)
    tensor = ir.Tensor(array, dtype=stored.dtype, name=name)
    return ir.Value(name=name, type=ir.TensorType(stored.dtype), shape=ir.Shape(shape), const_value=tensor)


def _symbol_sizes(piece: Piece) -> dict[str | None, int]:
    """Return symbol -> size, as the shapes of the external values are known."""
    return {
        dim.value: size
        for node in piece.nodes
        for value in node.inputs
        if value is not None and value.shape is not None and (value.name or "") in piece.feeds
        for dim, size in zip(value.shape, piece.feeds[value.name or ""][1], strict=False)
        if not isinstance(dim, int) and dim.value is not None
    }


def _sized(shape: ir.Shape | None, sizes: Mapping[str | None, int]) -> ir.Shape | None:
    """Return a copy of a shape with numbers in place of symbols, where they are known."""
    return None if shape is None else ir.Shape([d if isinstance(d, int) else sizes.get(d.value, d) for d in shape])


def _size(site: gp.Site) -> int:
    return site.groups * site.out_features * site.in_features


def _factors(site: gp.Site, form: gp.Form, rank: int) -> gp.SplitFactors | gp.Dense:
    """Return random factors, with a change of the bias as fitted ones have; other sites, which make units, stay."""
    if form in FOLDED and site.units is None:
        return gp.Dense(reason="it makes units")
    rng = np.random.default_rng(1)
    return gp.drawn_factors(site, form, rank, lambda shape: _drawn(rng, shape, site.dtype))


def _drawn(rng: np.random.Generator, shape: Shape, dtype: str) -> Array:
    """Return small random numbers of either sign, or 0 and 1 for integers."""
    if dtype.startswith("int") or dtype.startswith("uint"):
        return np.asarray(rng.integers(0, 2, shape)).astype(dtype)
    if dtype == "bool":
        return np.ones(shape, bool)
    drawn = (rng.random(shape, np.float32) - np.float32(0.5)) / np.float32(math.sqrt(max((1, *shape[-1:]))))
    return np.asarray(drawn).astype(_numpy(dtype))


def _numpy(dtype: str) -> Any:
    if dtype == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(dtype)


def _word(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(_numpy(dtype)))


def _dtype_name(dtype: ir.DataType) -> str:
    return str(np.dtype(dtype.numpy()).name)
