"""Rules of operators that hold graphs: If, Loop, Scan.

Loop   carried values must keep their axes from turn to turn; outputs of the turns are stacked in front, so their
       axes move by one
If     both branches, unless all shapes take the same one
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import onnx

from graph_passes.axis_rules.moves import settled
from graph_passes.axis_rules.values import BatchPlace, Dims, NodeCall, Value

Body: TypeAlias = Callable[[onnx.GraphProto, Sequence[Value]], list[Value]]
"""A function that follows a graph called with values and returns its outputs."""

MOST_TURNS = 5


def followed(call: NodeCall, body: Body, *, open_shapes: bool) -> list[Value]:
    """Return the outputs of an If, a Loop or a Scan.

    Args:
        call: the node.
        body: follows one of its graphs.
        open_shapes: whether the model runs on shapes other than those that are tried.

    Raises:
        MixesError: samples mix in it, or it cannot be followed.
    """
    if call.node.op_type == "If":
        return _if(call, body, open_shapes=open_shapes)
    return _loop(call, body) if call.node.op_type == "Loop" else _scan(call, body)


def _if(call: NodeCall, body: Body, *, open_shapes: bool) -> list[Value]:
    condition = call.inputs[0]
    if condition is None or not condition.free:
        raise call.mixes("takes one branch for the whole batch, by what the batch holds or how large it is")
    branches = [call.attribute("then_branch"), call.attribute("else_branch")]
    taken = call.constant(0)
    if taken is not None and not open_shapes:
        return body(branches[0 if taken.all() else 1], ())
    first, second = (body(branch, ()) for branch in branches)
    return [_either(call, a, b) for a, b in zip(first, second, strict=True)]


def _loop(call: NodeCall, body: Body) -> list[Value]:
    turns, going, *carried = call.inputs
    for value in (turns, going):
        if value is not None and not value.free:
            raise call.mixes("runs as often as samples or their number say")
    graph = call.attribute("body")
    number = Value(kind=onnx.TensorProto.INT64, shapes=((),) * len(call.sizes))
    truth = Value(kind=onnx.TensorProto.BOOL, shapes=((),) * len(call.sizes))
    state = [replace(value or Value(), data=None) for value in carried]
    for _ in range(MOST_TURNS):
        made = body(graph, [number, truth, *state])
        if not made[0].free:
            raise call.mixes("ends when samples say so")
        after = [_either(call, a, b) for a, b in zip(state, made[1 : 1 + len(state)], strict=True)]
        if after == state:
            return [*state, *(_stacked(call, value, 0) for value in made[1 + len(state) :])]
        state = after
    raise call.mixes("carries values whose shapes change from turn to turn")


def _scan(call: NodeCall, body: Body) -> list[Value]:
    count = int(call.attribute("num_scan_inputs", 0))
    if call.opset < 9 or not count:
        raise call.mixes("is a Scan as before opset 9, which is not followed")
    states, rows = call.inputs[:-count], call.inputs[-count:]
    axes = call.attribute("scan_input_axes", [0] * count)
    taken = [_slice(call, value, axis) for value, axis in zip(rows, axes, strict=True)]
    state = [replace(value or Value(), data=None) for value in states]
    for _ in range(MOST_TURNS):
        made = body(call.attribute("body"), [*state, *taken])
        after = [_either(call, a, b) for a, b in zip(state, made[: len(state)], strict=True)]
        if after == state:
            given = made[len(state) :]
            at = call.attribute("scan_output_axes", [0] * len(given))
            return [*state, *(_stacked(call, value, axis) for value, axis in zip(given, at, strict=True))]
        state = after
    raise call.mixes("carries values whose shapes change from turn to turn")


def _slice(call: NodeCall, value: Value | None, axis: int) -> Value:
    """Return one entry of an input along an axis, which the body of a Scan reads."""
    if value is None or value.shapes is None:
        raise call.mixes("scans an input of unknown rank")
    if value.counted or value.rows:
        raise call.mixes("scans what follows from the size of the batch")
    axis %= len(value.shapes[0])
    shapes = tuple((*dims[:axis], *dims[axis + 1 :]) for dims in value.shapes)
    place = value.place
    if place is not None and place.axis == axis:
        raise call.mixes(f"runs along the batch axis (axis {axis} of its input)")
    if place is not None and place.axis > axis:
        place = replace(place, axis=place.axis - 1)
    return Value(kind=value.kind, shapes=shapes, place=place)


def _stacked(call: NodeCall, value: Value, axis: int) -> Value:
    """Stack an output of all turns along a new axis."""
    if value.counted or value.rows:
        raise call.mixes("gives what follows from the size of the batch")
    if value.shapes is None:
        return Value(kind=value.kind)
    axis %= len(value.shapes[0]) + 1
    shapes: tuple[Dims, ...] = tuple((*dims[:axis], None, *dims[axis:]) for dims in value.shapes)
    if value.place is None:
        return Value(kind=value.kind, shapes=shapes)
    at = value.place.axis + (value.place.axis >= axis)
    return settled(call, replace(value.place, axis=at), value.kind, shapes)


def _either(call: NodeCall, first: Value, second: Value) -> Value:
    """Return a value that is one of two; its samples must lie at the same place in both."""
    if first.rows or second.rows:
        raise call.mixes("gives the number that a sample has in its batch")
    if first.place != second.place:
        where = " or ".join(sorted({_named(first.place), _named(second.place)}))
        raise call.mixes(f"gives a value with {where}")
    shapes = None
    if first.shapes is not None and second.shapes is not None and first.rank == second.rank:
        pairs = zip(first.shapes, second.shapes, strict=True)
        shapes = tuple(tuple(a if a == b else None for a, b in zip(*pair, strict=True)) for pair in pairs)
    if first.place is not None and shapes is None:
        raise call.mixes("gives a value of one rank or another")
    return Value(
        kind=first.kind or second.kind, shapes=shapes, place=first.place, counted=first.counted or second.counted
    )


def _named(place: BatchPlace | None) -> str:
    return "no samples in it" if place is None else f"samples along axis {place.axis}"
