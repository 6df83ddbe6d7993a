"""Fold permutations of channels into the constants of the nodes that read them.

    h --> Gather p --> Add b --> Relu --> MatMul B --> y      becomes      h --> Add b' --> Relu --> MatMul B' --> y

    b'[p] = b,   B'[p] = B (by row)

A pivoted split ends in such a Gather (mark `rsi_deploy.split`: "permutation"). The numbers only change places; sums
over the permuted axis are added in another order.

Two Gathers that meet, as in a gated MLP, become one:

    Mul(Gather(g, p), Gather(u, q))      becomes      Gather(Mul(g, Gather(u, q')), p) with q'[p] = q, then p goes on
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, cast

import numpy as np
import onnx_ir as ir

from graph_passes.axis_rules.values import MOST_NUMBERS, BatchPlace, MixesError, NodeCall, Value
from graph_passes.cleanup import other_consumers, remove_unused
from graph_passes.constants import OVERRIDABLE_IR_VERSION, lazily, set_constant, stored_array
from graph_passes.marks import MARK, PERMUTATION
from graph_passes.names import name_of
from graph_passes.permutation_rules import POSITIONS, Effect, effect_of, shapes_of
from graph_passes.records import Array, Skip
from graph_passes.weights import Weight, constant_of

Replace: TypeAlias = Callable[[ir.TensorProtocol, Callable[[], Array]], ir.TensorProtocol]
"""(tensor, function that computes the new array of its shape and dtype) -> the tensor that takes its place."""

_OPEN_SIZES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049, 1051, 1061, 1063, 1069, 1087, 1091, 1093, 1097)
"""Sizes that stand for symbols, such as the batch: no size of a model is a multiple of one by chance."""

_Use: TypeAlias = tuple[ir.Node, int]


@dataclass
class FoldPermutationsResult(ir.passes.PassResult):
    """A pass result with the names of the Gathers that are gone, and a record for every one that stays."""

    folded: tuple[str, ...] = ()
    kept: tuple[Skip, ...] = ()


class FoldPermutationsPass(ir.passes.InPlacePass):
    """Folds Gathers that permute channels (marked "permutation") into the constants behind them.

    1. A Gather goes only if every path from it ends in a node that sums over the channels, such as a product with a
       constant. Otherwise nothing changes for it.
    2. Constants keep name, shape and dtype. No constant is stored twice: one that another node needs as it is, or that
       is a graph input too, keeps the Gather.
    3. Shapes must be known along the paths, up to symbols: infer shapes first.
    4. Weights in external files are not read: they are permuted when the model is saved.

    Args:
        replace: Stores a permuted weight. A data file that holds the weight already can overwrite it in place.
    """

    def __init__(self, *, replace: Replace = lazily) -> None:
        super().__init__()
        self._replace = replace

    def call(self, model: ir.Model) -> FoldPermutationsResult:
        """Fold wherever it is possible, in graph order: a Gather may be folded into a later one."""
        folded: list[str] = []
        kept: list[Skip] = []
        positions: dict[ir.Node, int] = {node: at for at, node in enumerate(model.graph.all_nodes())}
        for gather in [node for node in positions if _is_permutation(node)]:
            try:
                fold = _Fold(model, gather, positions)
                fold.plan()
                constants = fold.constants()
            except MixesError as reason:
                kept.append(Skip(node=name_of(gather), op_type=gather.op_type, reason=str(reason)))
                continue
            for weight, place in constants:
                set_constant(weight.root, self._replace(weight.tensor, _Permuted(weight, place, fold.order)))
            _remove(gather)
            folded.append(name_of(gather))
        return FoldPermutationsResult(model, bool(folded), tuple(folded), tuple(kept))

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> FoldPermutationsResult:
        """Run the pass; the result names the Gathers."""
        return cast(FoldPermutationsResult, super().__call__(model_or_result))


@dataclass(frozen=True)
class _Permuted:
    """The stored array of a weight that is permuted along an axis; computed when it is called."""

    weight: Weight
    place: BatchPlace
    order: Array

    def __call__(self) -> Array:
        """Return the array in the layout of the stored tensor."""
        array = self.weight.numpy()
        blocks = np.arange(self.place.outer)[:, None, None] * len(self.order) + self.order[:, None]
        order = (blocks * self.place.inner + np.arange(self.place.inner)).reshape(-1)  # y[j] = y'[order[j]]
        if self.place.axis == POSITIONS:
            return self.weight.as_stored(order[array].astype(array.dtype))
        return self.weight.as_stored(array.take(np.argsort(order), self.place.axis))


@dataclass
class _Fold:
    """The plan for one Gather: what is permuted along which axis once the Gather is gone.

    Attributes:
        model: The model.
        gather: The Gather.
        positions: node -> its place in graph order.
        order: The indices of the Gather.
        values: What is known of the values behind it; permuted ones have a place.
        uses: Uses of operands that must be permuted and are not: they must be constant.
        sizes: Symbol, or value and axis -> the number of its stand-in size.
    """

    model: ir.Model
    gather: ir.Node
    positions: Mapping[ir.Node, int]
    order: Array = field(init=False)
    values: dict[ir.Value, Value] = field(default_factory=dict)
    uses: dict[_Use, BatchPlace] = field(default_factory=dict)
    sizes: dict[object, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data, indices = self.gather.inputs[:2]
        order = stored_array(indices)
        if data is None or order is None or not np.array_equal(np.sort(order, None), np.arange(order.size)):
            raise MixesError("the indices are not a constant permutation")
        self.order = order
        output = self.gather.outputs[0]
        value = self._declared(output if output.shape is not None else data)
        axis = self.gather.attributes.get_int("axis", 0)
        if value.shapes is None or order.ndim != 1 or not -len(value.shapes[0]) <= axis < len(value.shapes[0]):
            raise MixesError("the shape of the output is unknown: infer shapes first")
        axis %= len(value.shapes[0])
        shapes = [each[0] for each in (value.shapes, self._declared(data).shapes) if each is not None]
        if any(len(shape) != len(shapes[0]) or shape[axis] != order.size for shape in shapes):
            raise MixesError(f"the indices do not permute axis {axis} of {data.name!r}")
        self.values[output] = replace(value, place=BatchPlace(axis))

    def plan(self) -> None:
        """Follow the permuted values in graph order to the ends of all paths.

        Raises:
            MixesError: A path has no end.
        """
        output = self.gather.outputs[0]
        if np.array_equal(self.order, np.arange(self.order.size)):
            self._consumers(output)
            return
        pending = [(self.positions[node], node) for node in self._consumers(output)]
        heapq.heapify(pending)  # a position has one node, so nodes are never compared
        done = -1
        while pending:
            position, node = heapq.heappop(pending)
            if position == done:
                continue
            done = position
            try:
                permuted = self._follow(node)
            except MixesError:
                raise
            except Exception as error:  # any exception of a malformed node: nothing is changed
                what = f"{node.op_type} {name_of(node)!r}"
                raise MixesError(f"{what} cannot be followed: {type(error).__name__}") from error
            for value in permuted:
                for consumer in self._consumers(value):
                    if self.positions[consumer] <= position:
                        raise MixesError("the nodes of the graph are not in topological order")
                    heapq.heappush(pending, (self.positions[consumer], consumer))

    def constants(self) -> list[tuple[Weight, BatchPlace]]:
        """Return the constants to permute, each once.

        Raises:
            MixesError: An operand is not constant, or other nodes need it as it is.
        """
        uses: dict[_Use, BatchPlace] = {}
        for use, place in self.uses.items():
            use, place = self._of_other_gather(*use, place) or (use, place)
            if use in uses or (use in self.uses and self.uses[use] != place):
                raise MixesError(f"{use[0].op_type} {name_of(use[0])!r} needs two permutations")
            uses[use] = place
        weights = {use: (self._constant(*use, place), place) for use, place in uses.items()}
        chosen: dict[ir.Value, tuple[Weight, BatchPlace]] = {}
        for weight, place in weights.values():
            permuted = _Permuted(weight, place, self.order)
            if max(weight.shape, default=1) == weight.tensor.size and np.array_equal(permuted(), weight.tensor.numpy()):
                continue  # a vector of equal numbers, which other nodes may share
            users = [use for use in other_consumers(weight.root) if use[0] is None or use[0].op_type != "Shape"]
            for user, index in users:
                other = None if user is None else weights.get((user, index))
                if other is None or (other[0].steps, other[1]) != (weight.steps, place):
                    who = "the caller" if user is None else f"{user.op_type} {name_of(user)!r}"
                    raise MixesError(f"{who} needs {weight.name!r} in the present order")
            chosen[weight.root] = weight, place
        return list(chosen.values())

    def _consumers(self, value: ir.Value) -> list[ir.Node]:
        """Return the nodes that read a permuted value."""
        if value.is_graph_output():
            raise MixesError(f"{value.name!r} is an output of the graph")
        nodes = [node for node, _ in value.uses()]
        if any(node.graph is not self.gather.graph for node in nodes):
            raise MixesError(f"{value.name!r} is used in a subgraph")
        return nodes

    def _follow(self, node: ir.Node) -> list[ir.Value]:
        """Note what a node needs; return its permuted outputs."""
        call = self._call(node)
        places = {at: value.place for at, value in enumerate(call.inputs) if value is not None and value.place}
        holds_graph = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        if node.op_identifier() in self.model.functions or holds_graph:
            raise call.mixes("is a function or holds a subgraph")
        effect = effect_of(call, min(places))
        for index, place in effect.needs.items():
            if index not in places:
                self.uses[node, index] = place
        if {at: effect.needs.get(at) for at in places} != places:
            raise call.mixes("brings values together whose channels are permuted otherwise")
        self._note_outputs(node, call, effect)
        return [node.outputs[at] for at in effect.outputs]

    def _note_outputs(self, node: ir.Node, call: NodeCall, effect: Effect) -> None:
        """Keep the shapes of all outputs, as ONNX infers them or as the model declares them."""
        for at, (output, (kind, dims)) in enumerate(zip(node.outputs, shapes_of(call), strict=True)):
            value = self._declared(output)
            if dims is not None and (value.shapes is None or None not in dims):
                value = replace(value, shapes=(dims,), kind=kind or value.kind)
            place = effect.outputs.get(at)
            if place is not None and value.shapes is not None:
                size = place.outer * place.inner * self.order.size
                if place.axis >= len(value.shapes[0]) or value.shapes[0][place.axis] not in (None, size):
                    raise call.mixes("has an output of another shape than expected")
            self.values[output] = replace(value, place=place)

    def _call(self, node: ir.Node) -> NodeCall:
        proto = ir.serde.serialize_node(node)
        inputs = [None if value is None else self.values.get(value) or self._declared(value) for value in node.inputs]
        if node.op_type == "Reshape" and (shape := self._declared(node.outputs[0]).shapes) and None not in shape[0]:
            inputs[1] = inputs[1] and replace(inputs[1], data=inputs[1].data or (np.array(shape[0], np.int64),))
        return NodeCall(
            node=proto,
            inputs=inputs,
            opset=self.model.opset_imports.get("", 0),
            sizes=(self.order.size,),
            attributes={attribute.name: attribute for attribute in proto.attribute},
        )

    def _declared(self, value: ir.Value) -> Value:
        """Return what the model says of a value."""
        if (weight := constant_of(value)) is not None:
            data = stored_array(value) if weight.tensor.size <= MOST_NUMBERS else None
            return Value(kind=int(weight.dtype), shapes=(weight.shape,), data=None if data is None else (data,))
        kind = int(value.dtype or ir.DataType.FLOAT)
        if value.shape is None:
            return Value(kind=kind)
        return Value(kind=kind, shapes=(tuple(self._size(value, at, dim) for at, dim in enumerate(value.shape)),))

    def _size(self, value: ir.Value, axis: int, dim: int | ir.SymbolicDim) -> int | None:
        """Return a dimension; a size of its own for every symbol, as long as there are some."""
        if isinstance(dim, int):
            return dim
        number = self.sizes.setdefault(dim.value or (value, axis), len(self.sizes))
        return _OPEN_SIZES[number] if number < len(_OPEN_SIZES) else None

    def _of_other_gather(self, node: ir.Node, index: int, place: BatchPlace) -> tuple[_Use, BatchPlace] | None:
        """Return the indices of another marked Gather in place of its output; None for other operands."""
        value = node.inputs[index]
        other = None if value is None else value.producer()
        if value is None or other is None or not _is_permutation(other) or other.graph is not self.gather.graph:
            return None
        shapes, axis = self._declared(value).shapes, other.attributes.get_int("axis", 0)
        is_along = shapes is not None and place == BatchPlace(axis % len(shapes[0]))
        return ((other, 1), BatchPlace(0)) if is_along and len(value.uses()) == 1 else None

    def _constant(self, node: ir.Node, index: int, place: BatchPlace) -> Weight:
        """Return the constant behind an operand that must be permuted.

        Raises:
            MixesError: It is not a constant, or a caller may feed another one.
        """
        value = node.inputs[index]
        weight = None if value is None else constant_of(value)
        if value is None or weight is None:
            name = "" if value is None else value.name
            raise MixesError(f"{node.op_type} {name_of(node)!r} needs {name!r} in the order of the Gather")
        if weight.is_overridable and self.model.ir_version >= OVERRIDABLE_IR_VERSION:
            raise MixesError(f"overridable: {weight.name!r} is a graph input too")
        size = place.outer * place.inner * self.order.size
        if place.axis != POSITIONS and (place.axis >= len(weight.shape) or weight.shape[place.axis] != size):
            raise MixesError(f"{node.op_type} {name_of(node)!r} does not fit {weight.name!r} of shape {weight.shape}")
        if place.axis == POSITIONS and not np.isin(weight.numpy(), np.arange(-size, size)).all():
            raise MixesError(f"{node.op_type} {name_of(node)!r} looks up others than the {size} channels")
        return weight


def _is_permutation(node: ir.Node) -> bool:
    return node.op_type == "Gather" and node.domain == "" and node.metadata_props.get(MARK) == PERMUTATION


def _remove(gather: ir.Node) -> None:
    """Let the readers of a Gather read its data."""
    data, indices = gather.inputs[:2]
    if data is None or gather.graph is None:
        raise ValueError(f"Gather {name_of(gather)!r} has no data or no graph")
    gather.outputs[0].replace_all_uses_with(data)
    gather.graph.remove(gather, safe=True)
    remove_unused(indices)
