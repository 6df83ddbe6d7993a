"""How an operator moves axes, and where that puts the samples of its outputs.

    MatMul (b, m, k) @ (k, n) -> (b, m, n)

    input 0     0 -> 0    1 -> 1    2: "sums over"          an axis of the output, or what the operator
    input 1     0: "sums over"      1 -> 2                  does along the axis

Samples stay apart where every batch axis goes to one and the same axis of the output, and all other operands are
the same for every entry of that axis.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

from graph_passes.axis_rules.values import Array, BatchPlace, Dims, NodeCall, Value

WEIGHS = "multiplies by weights along"
STEPS = "steps through time along"
CHANNELS = "takes for channels"
FEATURES = frozenset((WEIGHS, STEPS, CHANNELS))
"""What operators do along an axis that cannot be the batch."""

Target: TypeAlias = int | str
Map: TypeAlias = Sequence[Target]


@dataclass(frozen=True, kw_only=True)
class Moves:
    """The positions of the inputs' axes in one output.

    Attributes:
        inputs: input index -> for each of its axes the axis of the output, or what the operator does along it. Inputs
            that are not listed must be the same for every sample.
        dims: the output's shape for a trial size, where ONNX does not infer it.
        like: an operator of ONNX with the same shapes.
        strict: whether all listed inputs must have a batch axis once one has it: nothing is broadcast.
        arguments: inputs that may depend on the size of the batch, such as shapes, which the rule itself checks.
    """

    inputs: Mapping[int, Map]
    dims: Callable[[int], Dims] | None = None
    like: str = ""
    strict: bool = False
    arguments: frozenset[int] = field(default_factory=frozenset)


Rule: TypeAlias = Callable[[NodeCall], "Moves | Sequence[Moves] | Sequence[Value]"]

RULES: dict[tuple[str, str], Rule] = {}
"""(domain, operator) -> its rule."""

MICROSOFT = "com.microsoft"
NCHWC = "com.microsoft.nchwc"
NHWC = "com.ms.internal.nhwc"


_Rule = TypeVar("_Rule", bound=Rule)


def rule(names: str, domain: str = "") -> Callable[[_Rule], _Rule]:
    """Return a decorator, or a function, that enters a rule into the table for the operators in `names`."""

    def enter(function: _Rule) -> _Rule:
        for name in names.split():
            RULES[domain, name] = function
        return function

    return enter


def kept(rank: int, reason: str = "", axes: Iterable[int] = ()) -> list[Target]:
    """Return targets of axes that stay in place, except `axes`, along which the operator does `reason`."""
    cut = {axis % rank for axis in axes if -rank <= axis < rank}
    return [reason if axis in cut else axis for axis in range(rank)]


def only(rank: int, reason: str, targets: Mapping[int, int]) -> list[Target]:
    """Return targets of axes along which the operator does `reason`, except those in `targets`."""
    return [targets.get(axis, reason) for axis in range(rank)]


def aligned(rank: int, output: int) -> list[Target]:
    """Return the targets of axes that broadcasting aligns from the right."""
    return [output - rank + axis for axis in range(rank)]


def unknown_dims(rank: int) -> Callable[[int], Dims]:
    """Return shapes of a known rank whose sizes are not known."""
    return lambda _: (None,) * rank


def dims_of(call: NodeCall, index: int = 0) -> Callable[[int], Dims]:
    """Return the shapes of an input."""
    return lambda trial: call.dims(index, trial)


def place_of(call: NodeCall, moves: Moves) -> BatchPlace | None:
    """Return where the samples of an output lie; None where no input has any.

    Raises:
        MixesError: samples meet, with the node and the axis.
    """
    places: set[BatchPlace] = set()
    for index, value in enumerate(call.inputs):
        if value is None or value.free or index in moves.arguments:
            continue
        if value.place is None:
            raise call.mixes(f"computes with the size of the batch ({call.input_name(index)})")
        if index not in moves.inputs:
            raise call.mixes(f"takes {call.input_name(index)} from samples, where it needs one value for all of them")
        target = moves.inputs[index][value.place.axis]
        if isinstance(target, str):
            where = f"the batch axis (axis {value.place.axis} of {call.input_name(index)})"
            raise call.mixes(f"{target} {where}", feature=target in FEATURES)
        places.add(BatchPlace(target, value.place.outer, value.place.inner))
    if len(places) > 1:
        axes = " and ".join(sorted({f"{p.axis}" if p.plain else f"{p.axis} (in blocks)" for p in places}))
        raise call.mixes(f"brings samples together that lie along different axes ({axes} of its output)")
    if not places:
        return None
    (place,) = places
    for index, targets in moves.inputs.items():
        _check_same_for_all(call, index, targets, place, moves)
    return place


def outputs(call: NodeCall, moves: Moves, index: int, kind: int, shapes: tuple[Dims, ...] | None) -> Value:
    """Return the output at `index` with its place and its shape.

    Raises:
        MixesError: samples meet, or the shape shows that they do.
    """
    place = place_of(call, moves)
    if shapes is None and moves.dims is not None:
        shapes = tuple(moves.dims(trial) for trial in range(len(call.sizes)))
    if place is None:
        return Value(kind=kind, shapes=shapes)
    return settled(call, place, kind, shapes)


def settled(call: NodeCall, place: BatchPlace, kind: int, shapes: tuple[Dims, ...] | None) -> Value:
    """Return a value with samples after a check of its shapes against its place.

    Raises:
        MixesError: the shapes are not those of a value whose samples lie there.
    """
    if shapes is None:
        raise call.mixes("gives an output of unknown rank")
    whole = []
    for dims, size in zip(shapes, call.sizes, strict=True):
        expected = place.outer * size * place.inner
        if place.axis >= len(dims) or dims[place.axis] not in (None, expected):
            raise call.mixes(f"gives a shape {dims} for a batch of {size} in which axis {place.axis} is no batch")
        whole.append((*dims[: place.axis], expected, *dims[place.axis + 1 :]))
    for axis, sizes in enumerate(zip(*whole, strict=True)):
        if axis != place.axis and len({size for size in sizes if size is not None}) > 1:
            raise call.mixes(f"gives two axes that grow with the batch ({place.axis} and {axis})")
    return Value(kind=kind, shapes=tuple(whole), place=place)


def same_everywhere(arrays: Sequence[Array]) -> bool:
    """Return whether one number fills the arrays of all trial sizes."""
    first = arrays[0].reshape(-1)[:1]
    return all(array.size and (array == first).all() for array in arrays)


def _check_same_for_all(call: NodeCall, index: int, targets: Map, place: BatchPlace, moves: Moves) -> None:
    """Refuse an operand without samples that has an entry for each place in the batch."""
    value = call.value(index)
    if value is None or value.place is not None or index in moves.arguments:
        return
    if moves.strict:
        raise call.mixes(f"needs an entry of {call.input_name(index)} for every sample, but it has none")
    for axis, target in enumerate(targets):
        if target != place.axis:
            continue
        sizes = {None} if value.shapes is None else {dims[axis] for dims in value.shapes}
        if sizes != {1}:
            found = " or ".join("?" if size is None else str(size) for size in sizes)
            what = f"has constants along the batch axis (axis {axis} of {call.input_name(index)}, {found} entries)"
            raise call.mixes(what, feature=True)
